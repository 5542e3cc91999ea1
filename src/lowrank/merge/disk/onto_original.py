"""A merge onto the original of a quantised base: is it that, and how far is each weight from what was trained."""

import threading
from collections.abc import Sequence

from lowrank.checkpoint.loftq_file import read_off
from lowrank.checkpoint.stored_base import StoredBase
from lowrank.core.stored.held_as import is_at_hand
from lowrank.errors import MergeError
from lowrank.merge.apart import ANOTHER, Apart, apart
from lowrank.merge.disk.adapters import Adapter
from lowrank.merge.disk.as_trained import MadeAgain
from lowrank.merge.disk.changes import make_changes
from lowrank.merge.disk.found import Match
from lowrank.merge.disk.match import distance_of_bases
from lowrank.merge.disk.recipe import Recipe
from lowrank.modelfiles.base import BaseFiles
from lowrank.modelfiles.blocks import whole
from lowrank.modelfiles.pool import run_tasks


def check_original(base: BaseFiles, adapters: Sequence[Adapter], matches: Sequence[Match]) -> None:
    """Raise MergeError where the base is another model than the one that the adapter's base was made from."""
    for adapter, found in zip(adapters, matches, strict=True):
        share = distance_of_bases(base, adapter, found)
        if share is not None and share > ANOTHER:
            raise MergeError(
                f"onto original: {base.label} is not the model that the base of {adapter.label} was made from: W0 "
                f"differs by {share:.0%}; give the one that was quantised"
            )


def distances(recipes: Sequence[Recipe], threads: int) -> dict[str, Apart]:
    """{weight: how far its merge is from what was trained}: each quantised again as it was, one for each thread.

    Only what was quantised in training, in a form that is made here, by an adapter that says so.
    """
    found: dict[str, Apart] = {}
    lock = threading.Lock()

    def measure(recipe: Recipe) -> None:
        if (one := _distance(recipe)) is not None:
            with lock:
                found[recipe.name] = one

    run_tasks([recipe for recipe in recipes if recipe.contributions], lambda: measure, threads)
    return {recipe.name: found[recipe.name] for recipe in recipes if recipe.name in found}


def _distance(recipe: Recipe) -> Apart | None:
    stored, first = _trained_over(recipe), recipe.contributions[0]
    stack = any(one.stack is not None for one in recipe.contributions)
    if stored is None or recipe.source is None or recipe.replacement is not None or stack:
        return None
    if not is_at_hand(stored.quantised):
        return None
    off = read_off(first.adapter.folder).get(first.path) if stored.moved else None
    form = MadeAgain({"weight": recipe.source}, stored, first.transposed, off)
    original, over = whole(recipe.source), form.hold().matrix
    trained = tuple(one.change(recipe.shape, over) for one in recipe.contributions)
    return apart([(original, over, make_changes(recipe), trained)])


def _trained_over(recipe: Recipe) -> StoredBase | None:
    """The form in which all of the weight's adapters were trained over it; None where they were not, or do not say."""
    forms = [one.adapter.files.companion.stored for one in recipe.contributions]
    said = {None if form is None else (form.form, form.dtype, form.block) for form in forms}
    plain = any(
        form is not None and one.path in form.plain for form, one in zip(forms, recipe.contributions, strict=True)
    )
    return None if len(said) > 1 or plain or recipe.contributions[0].kind == "embedding" else forms[0]
