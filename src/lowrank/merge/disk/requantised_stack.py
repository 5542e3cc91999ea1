"""Merged experts that go back into the base's own stored form, one at a time: MXFP4 (gpt-oss), stacks of FP8."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.core.merging import merge_weight, share_left
from lowrank.core.stored import Stored, requantise
from lowrank.errors import MergeError
from lowrank.merge.disk.changes import compute_dtype, make_changes
from lowrank.merge.disk.grid import steps
from lowrank.merge.disk.recipe import Recipe
from lowrank.merge.disk.stack_recipes import matrices
from lowrank.merge.disk.stored_rows import read_rows
from lowrank.modelfiles.blocks import opened
from lowrank.modelfiles.tensors import PackedStack
from lowrank.modelfiles.workspace import Workspace


@dataclass(eq=False)
class RequantisedStack:
    """W0 + Σ ΔW of all experts of a tensor, summed in float32, in the base's own form. small: parts that are ready."""

    name: str
    sums: Recipe
    form: PackedStack
    small: dict[str, Tensor]

    def _experts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(W0, W0 + Σ ΔW) of one after another, as the form holds it, in float32."""
        stack = self.sums.contributions[0].stack
        assert stack is not None
        pairs = []
        for recipe, _ in matrices(self.sums):
            with opened(recipe.source) as descriptor:
                stored = read_rows(recipe, descriptor, slice(0, recipe.matrix[0]), Workspace()).clone()
            into = torch.empty(recipe.shape)
            pairs.append((stored.float(), merge_weight(stored.to(compute_dtype(recipe)), make_changes(recipe), into)))
            if len(pairs) == len(stack.rows):
                before, after = (torch.cat(both) for both in zip(*pairs, strict=True))
                yield (before.t(), after.t()) if self.form.transposed else (before, after)
                pairs = []

    def parts(self) -> dict[str, Tensor]:
        """What the files hold of it, by role."""
        both = zip(self.form.unstacked({}), self._experts(), strict=True)
        return self.form.stacked([requantise(after.contiguous(), like) for like, (_, after) in both])

    def survey(self) -> float:
        """In place: keep the small parts. Returns the share of ‖ΔW‖² that the form holds."""
        experts: list[Stored] = []
        lost = changed = 0.0
        for like, (before, after) in zip(self.form.unstacked({}), self._experts(), strict=True):
            experts.append(requantise(after.contiguous(), like))
            lost += float((experts[-1].matrix(torch.float32) - after).square().sum())
            changed += float((after - before).square().sum())
        self.small = {role: tensor for role, tensor in self.form.stacked(experts).items() if role != "weight"}
        return share_left(lost, changed)

    def check(self, written: Tensor) -> None:
        """Raise MergeError where packed numbers that were written are not W0 + ΔW within a step of the form."""
        experts = self.form.unstacked({**self.small, "weight": written})
        for number, (expert, (_, after)) in enumerate(zip(experts, self._experts(), strict=True)):
            if not bool(((expert.matrix(torch.float32) - after).abs() <= steps(expert) + 1e-6).all()):
                raise MergeError(
                    f"verification: expert {number} of {self.name} is not W0 + ΔW within a step of its quantiser"
                )
