"""How the rows of a data set become tokens for one model, by what the user asked for."""

import warnings
from dataclasses import replace
from pathlib import Path

from lowrank.data.dataset import Dataset, label_names
from lowrank.data.recipe import Recipe, make_recipe
from lowrank.data.settings import DataSettings
from lowrank.errors import LowrankWarning
from lowrank.train.models import longest_row, own_labels
from lowrank.train.preference import BETA
from lowrank.train.task import Loaded

MANY = 20  # labels: so many may well be the names of classes in a small file


def labels_of(base: Path, rows: Dataset) -> tuple[str, ...]:
    """The labels by their numbers: as the model has them where it knows them all, else as they occur in the data."""
    if rows.kind != "classification":
        return ()
    known, found = own_labels(base), label_names(rows)
    if len(found) > max(MANY, len(rows.rows) // 2):
        warnings.warn(
            f"{rows.path}: {len(found):,} labels in {len(rows.rows):,} rows: hardly two rows share one; "
            "--kind regression if they are numbers to predict",
            LowrankWarning,
            stacklevel=2,
        )
    return known if set(found) <= set(known) else found


def recipe_of(settings: DataSettings, rows: Dataset, labels: tuple[str, ...], loaded: Loaded) -> Recipe:
    """How the rows become tokens."""
    longest = longest_row(loaded.model, loaded.tokenizer, settings.max_length)
    recipe = make_recipe(settings, rows.kind, loaded.tokenizer, longest, labels, speaks=rows.speaks)
    if rows.kind != "preference":
        return recipe
    whole = not rows.speaks and "prompt" not in rows.names  # texts that hold their prompts
    template = "{prompt}" if whole else recipe.template
    return replace(recipe, beta=getattr(settings, "beta", None) or BETA, template=template)
