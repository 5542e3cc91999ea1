"""The matrices of one adapted layer, to be looked at: W0, A, B and ΔW = s·B·A."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lowrank.injection.adapters import lora_layers


@dataclass(frozen=True, slots=True)
class Matrices:
    """W0, A and B of one layer, h = W0·x + s·B·A·x: shapes and norms, s, and the singular values of ΔW = s·B·A."""

    path: str
    shapes: dict[str, tuple[int, int]]
    norms: dict[str, float]
    scale: float
    singular: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The rank of ΔW: its singular values that are more than rounding."""
        least = self.singular[0] * max(self.shapes["W0"]) * torch.finfo(torch.float32).eps
        return sum(value > least for value in self.singular)


def look_at(model: nn.Module, path: str) -> Matrices:
    """The matrices of the adapted layer at `path`."""
    layer = dict(lora_layers(model))[path]
    factors, weight = layer.factors("default"), cast(Tensor, layer.weight)
    a, b = (factor.detach().double() for factor in factors.effective())
    change = factors.scale * b @ a
    found = {"W0": weight.detach().double(), "A": a, "B": b, "ΔW": change}
    return Matrices(
        path,
        {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in found.items()},
        {name: float(matrix.norm()) for name, matrix in found.items()},
        factors.scale,
        tuple(torch.linalg.svdvals(change).tolist()),
    )
