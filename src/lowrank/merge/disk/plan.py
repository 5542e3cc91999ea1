"""The whole merge, decided before a byte is written: a recipe for every tensor of the result."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank.core.token_rows import TokenRows
from lowrank.errors import MergeError, some
from lowrank.files.safetensors import DTYPE_NAMES, DTYPES, FLOATS, build_layout
from lowrank.merge.disk.adapters import Adapter, Contribution
from lowrank.merge.disk.as_trained import as_trained
from lowrank.merge.disk.found import Match
from lowrank.merge.disk.growth import longer
from lowrank.merge.disk.match import another_base, match
from lowrank.merge.disk.onto_original import check_original
from lowrank.merge.disk.recipe import Recipe, ResultFile
from lowrank.merge.disk.requantised import requantised_recipes, survey
from lowrank.merge.disk.tie import Ties, settle_ties
from lowrank.merge.onto import Onto
from lowrank.modelfiles.base import BaseFiles, Shard, Source
from lowrank.modelfiles.quantised import unread_form
from lowrank.modelfiles.tensors import StoredEntry


@dataclass(frozen=True, slots=True)
class MergePlan:
    """files: what to write; untie: whether config.json must say that embedding and head are two tensors now;

    renamed: leading parts of names that were exchanged, per adapter; notes: what a careful reader would want to know;

    words: how many the vocabulary had and has, where an adapter brings new ones;

    shares: of weights that go back into a stored form, how much of ‖ΔW‖² that holds.
    """

    files: tuple[ResultFile, ...]
    untie: bool
    renamed: tuple[str, ...]
    notes: tuple[str, ...]
    shares: Mapping[str, float] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    words: tuple[int, int] | None = None

    @property
    def recipes(self) -> list[Recipe]:
        """Every tensor of the result, in order."""
        return [recipe for file in self.files for recipe in file.recipes]

    @property
    def small_parts(self) -> int:
        """How many tensors are scales and descriptions of weights that go back into a stored form."""
        return sum(recipe.replacement is not None and recipe.name not in self.replaced for recipe in self.recipes)

    @property
    def nbytes(self) -> int:
        """The size of all weight files."""
        return sum(file.layout.size for file in self.files)


def plan_merge(
    base: BaseFiles,
    adapters: Sequence[Adapter],
    dtype: torch.dtype | None,
    onto: Onto = "16bit",
    anyway: bool = False,
) -> MergePlan:
    """Decide the result's every tensor.

    Raises CheckpointError for an adapter that does not fit, MergeError for a merge that cannot be meant.
    """
    matches = [match(base, adapter) for adapter in adapters]
    replaced = _replaced(adapters, matches)
    changed = _changed(matches)
    heads = {head: embedding for found in matches for head, embedding in found.heads.items()}
    rows = _rows(adapters, matches)
    ties = settle_ties(base, changed, replaced, heads, rows)
    if onto == "original":
        check_original(base, adapters, matches)
    if onto == "quantised" and rows:
        raise MergeError(f"onto quantised: an adapter has single rows of {next(iter(rows))}: merge onto 16bit")
    if onto == "quantised":
        return _requantised(base, adapters, matches, changed, replaced, ties, anyway)
    _check_all_read(base)
    plain = dtype or _commonest_float(base)
    base, made = as_trained(base, adapters, matches) if onto == "16bit" else (base, [])
    grown = longer(base, rows, changed, heads)
    recipes = {
        name: _recipe(
            name,
            Source(*place),
            changed,
            replaced,
            plain if isinstance(place[1], StoredEntry) else dtype,
            rows,
            grown.get(name),
        )
        for name, place in base.tensors.items()
    }
    for head, embedding in ties.heads.items():
        recipes[head] = _recipe(head, Source(*base.tensors[embedding]), changed, replaced, dtype, rows)
    for name, tensor in replaced.items():
        if name not in recipes and name not in ties.dropped:
            recipes[name] = _new(name, tensor, plain)
    files = _files(base, recipes, ties.heads)
    notes = [*made, *_notes(base, adapters, matches), *ties.notes]
    replacing = frozenset(recipe.name for file in files for recipe in file.recipes if recipe.replacement is not None)
    words = next(((base.tensors[name][1].shape[0], length) for name, length in grown.items()), None)
    renamed = tuple(_renamings(adapters, matches))
    return MergePlan(files, ties.untie, renamed, tuple(notes), replaced=replacing, words=words)


def _check_all_read(base: BaseFiles) -> None:
    """Raise MergeError where some quantised weights would become plain, and others cannot."""
    if not any(isinstance(entry, StoredEntry) for _, entry in base.tensors.values()):
        return
    left = [name for name, (_, entry) in base.tensors.items() if entry.dtype.startswith(("F8_", "F4", "F6_"))]
    if left or (method := unread_form(base)) is not None:
        what = f"{some(left, 2)} (stacks, or without scales)" if left else method
        raise MergeError(
            f"onto 16bit: {base.label} holds {what} in a form that is not read here, so it cannot become plain as a "
            "whole: give the model that it was made from"
        )


def _requantised(
    base: BaseFiles,
    adapters: Sequence[Adapter],
    matches: Sequence[Match],
    changed: Mapping[str, tuple[Contribution, ...]],
    replaced: Mapping[str, Tensor],
    ties: Ties,
    anyway: bool,
) -> MergePlan:
    """The plan for a base that keeps its stored form."""
    if ties.heads or ties.dropped:
        raise MergeError("onto quantised: the adapter changes a head that the base stores as its embedding: use 16bit")
    recipes = requantised_recipes(base, changed, replaced)
    for name, tensor in replaced.items():
        if name not in recipes:
            recipes[name] = _new(name, tensor, _commonest_float(base))
    shares = survey(recipes, anyway)
    notes = [*_notes(base, adapters, matches), *ties.notes]
    renamed = tuple(_renamings(adapters, matches))
    return MergePlan(_files(base, recipes, {}), ties.untie, renamed, tuple(notes), shares, frozenset(replaced))


def _notes(base: BaseFiles, adapters: Sequence[Adapter], matches: Sequence[Match]) -> list[str]:
    """What was found when the adapters were matched, and over which other numbers they were trained."""
    found = [note for match in matches for note in match.notes]
    return found + [n for pair in zip(adapters, matches, strict=True) for n in another_base(base, *pair)]


def _changed(matches: Sequence[Match]) -> dict[str, tuple[Contribution, ...]]:
    names = dict.fromkeys(name for found in matches for name in found.changed)
    return {name: tuple(found.changed[name] for found in matches if name in found.changed) for name in names}


def _replaced(adapters: Sequence[Adapter], matches: Sequence[Match]) -> dict[str, Tensor]:
    """The full copies that adapters bring, each from one adapter of weight 1."""
    owners: dict[str, Adapter] = {}
    tensors: dict[str, Tensor] = {}
    for adapter, found in zip(adapters, matches, strict=True):
        for name, tensor in (found.replaced | found.added).items():
            if name in owners:
                raise MergeError(f"{owners[name].folder} and {adapter.folder} each bring a full copy of {name}")
            if adapter.weight != 1:
                raise MergeError(
                    f"{adapter.folder} brings a full copy of {name}, which has no weighted form: give it the weight 1"
                )
            owners[name], tensors[name] = adapter, tensor
    return tensors


def _rows(adapters: Sequence[Adapter], matches: Sequence[Match]) -> dict[str, tuple[TokenRows, ...]]:
    """The single rows that adapters own of each tensor, every row one adapter's, of weight 1."""
    owners: dict[tuple[str, int], Adapter] = {}
    rows: dict[str, tuple[TokenRows, ...]] = {}
    for adapter, found in zip(adapters, matches, strict=True):
        for name, owned in found.rows.items():
            if adapter.weight != 1:
                raise MergeError(f"{adapter.folder} brings rows of {name}, which have no weighted form: weight it 1")
            if twice := [row for row in owned.indices if (name, row) in owners]:
                other = owners[name, twice[0]].folder
                raise MergeError(f"{other} and {adapter.folder} each bring row {twice[0]} of {name}")
            owners |= {(name, row): adapter for row in owned.indices}
            rows[name] = (*rows.get(name, ()), owned)
    return rows


def _recipe(
    name: str,
    source: Source,
    changed: Mapping[str, tuple[Contribution, ...]],
    replaced: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    rows: Mapping[str, tuple[TokenRows, ...]],
    length: int | None = None,
) -> Recipe:
    entry, contributions, owned = source.entry, changed.get(name, ()), rows.get(name, ())
    if ((contributions or owned) and entry.dtype not in FLOATS) or (name in replaced and entry.dtype not in DTYPES):
        raise MergeError(
            f"{name} is stored as {entry.dtype}, a form that is not read here: give the model that it was made from, "
            "in float16, bfloat16, float32 or float64"
        )
    converted = DTYPE_NAMES[dtype] if dtype is not None and entry.dtype in FLOATS else entry.dtype
    shape = entry.shape if length is None else (length, *entry.shape[1:])
    return Recipe(name, converted, shape, source, replaced.get(name), contributions, rows=owned)


def _new(name: str, tensor: Tensor, dtype: torch.dtype) -> Recipe:
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    return Recipe(name, DTYPE_NAMES[kept], tuple(tensor.shape), None, tensor)


def _commonest_float(base: BaseFiles) -> torch.dtype:
    """The dtype of most of the base's floating tensors."""
    floats = [entry for _, entry in base.tensors.values() if entry.dtype in FLOATS]
    counts = Counter(entry.dtype for entry in floats if not isinstance(entry, StoredEntry))
    return FLOATS[counts.most_common(1)[0][0]] if counts else torch.bfloat16 if floats else torch.float32


def _files(base: BaseFiles, recipes: Mapping[str, Recipe], heads: Mapping[str, str]) -> tuple[ResultFile, ...]:
    """The result's files: the base's, tensor for tensor, and what is new behind the tensors of one of them."""
    placed: dict[str, list[Recipe]] = {shard.name: [] for shard in base.shards}
    for name, recipe in recipes.items():
        home = base.in_files.get(name) or base.tensors.get(name) or base.tensors.get(heads.get(name, ""))
        placed[(home[0] if home else base.shards[-1]).name].append(recipe)
    return tuple(_file(shard, placed[shard.name]) for shard in base.shards)


def _file(shard: Shard, recipes: list[Recipe]) -> ResultFile:
    before = shard.layout
    same = [(r.name, r.dtype, r.shape) for r in recipes] == [(e.name, e.dtype, e.shape) for e in before.entries]
    layout = before if same else build_layout(((r.name, r.dtype, r.shape) for r in recipes), before.metadata)
    return ResultFile(shard.name, layout, tuple(recipes), shard)


def _renamings(adapters: Sequence[Adapter], matches: Sequence[Match]) -> list[str]:
    return [
        f"{adapter.label}: {old or '(nothing)'} → {new or '(nothing)'}"
        for adapter, found in zip(adapters, matches, strict=True)
        for old, new in found.renamed
    ]
