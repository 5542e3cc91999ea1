"""A merged weight that goes back into the base's own stored form: its parts, and how much of ΔW they hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.merging import merge_block, row_blocks, share_left
from lowrank.core.stored import Stored, requantise
from lowrank.errors import MergeError
from lowrank.files.safetensors import READABLE
from lowrank.merge.disk.adapters import Contribution
from lowrank.merge.disk.changes import compute_dtype, make_changes
from lowrank.merge.disk.grid import steps
from lowrank.merge.disk.recipe import Recipe
from lowrank.merge.disk.requantised_stack import RequantisedStack
from lowrank.merge.onto import require_survival
from lowrank.modelfiles.base import BaseFiles, Source
from lowrank.modelfiles.tensors import Form, PackedForm, PackedStack, StoredEntry


@dataclass(eq=False)
class Requantised:
    """W0 + Σ ΔW of one weight, summed in float32, in the form that the base has it in. small: parts that are ready."""

    name: str
    sums: Recipe
    form: PackedForm
    small: dict[str, Tensor]

    @property
    def like(self) -> Stored:
        """The base's own."""
        return self.form.stored()

    def total(self) -> Tensor:
        """W0 + Σ ΔW, (n, m) in float32, in the blocks and order of every merge."""
        total = torch.empty(self.sums.matrix)
        changes, dtype, memory = make_changes(self.sums), compute_dtype(self.sums), None
        for rows in row_blocks(*self.sums.matrix):
            memory = merge_block(self.form.rows(rows).to(dtype), changes, rows, memory)
            total[rows] = memory
        return total

    def parts(self) -> dict[str, Tensor]:
        """What the files hold of it, by role."""
        return self.form.parts_of(requantise(self.total(), self.like))

    def survey(self) -> float:
        """In place: keep the small parts. Returns the share of ‖ΔW‖² that the form holds."""
        total = self.total()
        stored = requantise(total, self.like)
        lost = changed = 0.0
        for rows in row_blocks(*self.sums.matrix):
            lost += float((stored.rows(rows, torch.float32) - total[rows]).square().sum())
            changed += float((total[rows] - self.form.rows(rows).float()).square().sum())
        self.small = {role: tensor for role, tensor in self.form.parts_of(stored).items() if role != "weight"}
        return share_left(lost, changed)

    def check(self, written: Tensor) -> None:
        """Raise MergeError where the packed numbers that were written are not W0 + ΔW within a step of the form."""
        total, stored = self.total(), self.like_written(written)
        step = steps(stored)
        for rows in row_blocks(*self.sums.matrix):
            if not bool(((stored.rows(rows, torch.float32) - total[rows]).abs() <= step[rows] + 1e-6).all()):
                raise MergeError(f"verification: {self.name} is not W0 + ΔW within a step of its quantiser")

    def like_written(self, written: Tensor) -> Stored:
        """The stored form that the written parts make up."""
        return self.form.assembled({**self.small, "weight": written})


def requantised_recipes(
    base: BaseFiles, changed: Mapping[str, tuple[Contribution, ...]], replaced: Mapping[str, Tensor]
) -> dict[str, Recipe]:
    """Every tensor of the files: what a change reaches is computed, everything else is taken over.

    Raises MergeError for full copies of quantised weights and for forms that are only read.
    """
    files = base.in_files.items()
    recipes = {name: Recipe(name, entry.dtype, entry.shape, Source(shard, entry)) for name, (shard, entry) in files}
    for name, (shard, entry) in base.tensors.items():
        if not isinstance(entry, StoredEntry):
            recipes[name] = Recipe(
                name, entry.dtype, entry.shape, Source(shard, entry), replaced.get(name), changed.get(name, ())
            )
        elif name in replaced:
            raise MergeError(
                f"onto quantised: the adapter brings {name} in full, and it is quantised: merge onto 16bit"
            )
        elif name in changed:
            packed = _weight(name, Source(shard, entry), entry.form, changed[name])
            recipes[packed.name] = packed
    return recipes


def _weight(name: str, source: Source, form: Form, contributions: tuple[Contribution, ...]) -> Recipe:
    """The recipe of its packed numbers."""
    entry, part = source.entry, form.parts["weight"]
    sums = Recipe(name, entry.dtype, entry.shape, source, None, contributions)
    lazy: Requantised | RequantisedStack
    if part.entry.dtype in READABLE and isinstance(form, PackedForm):
        lazy = Requantised(name, sums, form, {})
    elif part.entry.dtype in READABLE and isinstance(form, PackedStack) and _as_in_files(contributions):
        lazy = RequantisedStack(name, sums, form, {})
    else:
        raise MergeError(f"onto quantised: {name} is in a form that is read here, and not written: merge onto 16bit")
    return Recipe(part.entry.name, part.entry.dtype, part.entry.shape, part, repacked=lazy)


def _as_in_files(contributions: tuple[Contribution, ...]) -> bool:
    """Whether the experts are merged in the order of the numbers that the files have."""
    return all(one.stack is not None and not one.stack.turn for one in contributions)


def survey(recipes: dict[str, Recipe], anyway: bool) -> dict[str, float]:
    """In place: the small parts of all that is requantised are there. Returns {weight: the share of ‖ΔW‖² left}.

    Raises MergeError, with the table, where a weight keeps less than half.
    """
    kinds = Requantised | RequantisedStack
    lazy = [recipe.repacked for recipe in recipes.values() if isinstance(recipe.repacked, kinds)]
    if not lazy:
        raise MergeError("onto quantised: no weight that the adapter changes is quantised in this base; leave it out")
    try:
        shares = {one.name: one.survey() for one in lazy}
    except NotImplementedError as error:
        raise MergeError(f"onto quantised: {error}: merge onto 16bit") from error
    require_survival(shares, anyway)
    for one in lazy:
        for role, tensor in one.small.items():
            entry, home = one.form.parts[role].entry, one.form.parts[role]
            recipes[entry.name] = Recipe(entry.name, entry.dtype, tuple(tensor.shape), home, tensor)
    return shares
