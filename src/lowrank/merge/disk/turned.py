"""An expert whose matrix the files have otherwise than the model: merged as the model has it, and turned back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.checkpoint.fusions import Turn
from lowrank.core.merging import merge_weight, share_left
from lowrank.errors import MergeError
from lowrank.files.safetensors import DTYPES
from lowrank.merge.disk.changes import check_finite, compute_dtype, make_changes
from lowrank.merge.disk.exact import ExactRows
from lowrank.merge.disk.recipe import Recipe
from lowrank.merge.disk.stored_rows import read_rows
from lowrank.modelfiles.blocks import opened
from lowrank.modelfiles.one_expert import turned
from lowrank.modelfiles.workspace import Workspace


@dataclass(frozen=True, eq=False)
class Turned:
    """matrices: the expert's row blocks as the model has them; turn: how the files have the whole."""

    name: str
    matrices: tuple[Recipe, ...]
    turn: Turn

    def parts(self) -> dict[str, Tensor]:
        """The merged expert as the files have it."""
        merged = torch.cat([self._merged(recipe) for recipe in self.matrices])
        return {"weight": turned(merged, self.turn, back=True).contiguous()}

    def _merged(self, recipe: Recipe) -> Tensor:
        stored = _stored(recipe)
        into = torch.empty(recipe.shape, dtype=DTYPES[recipe.dtype])
        merged = merge_weight(stored.to(compute_dtype(recipe)), make_changes(recipe), into)
        check_finite(recipe, stored, merged)
        return merged

    def check(self, written: Tensor) -> float | None:
        """The share of ‖ΔW‖² left after rounding. Raises MergeError where a number is not W0 + ΔW within one."""
        rows, lost, changed = turned(written, self.turn), 0.0, 0.0
        for recipe in self.matrices:
            stored = _stored(recipe).double()
            exact, allowed = ExactRows(recipe)(stored, torch.arange(len(stored)))
            here, rows = rows[: len(stored)].double(), rows[len(stored) :]
            error = (here - exact).abs_()
            if not bool((error <= allowed).all()):
                raise MergeError(
                    f"verification: {self.name} is not W0 + ΔW within one rounding; the result is discarded"
                )
            lost += float(error.square_().sum())
            changed += float((exact - stored).square_().sum())
        return share_left(lost, changed)


def _stored(recipe: Recipe) -> Tensor:
    """W0 of the whole recipe."""
    with opened(recipe.source) as descriptor:
        return read_rows(recipe, descriptor, slice(0, recipe.matrix[0]), Workspace())
