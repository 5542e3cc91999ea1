"""How much of ΔW is left once W0 + ΔW is rounded to the weight's dtype."""

import math

import torch
from torch import Tensor

from lowrank.core.merging import share_left
from lowrank.layers.base import LoraLayer

ROWS = 256  # of a weight, evenly spaced: they tell whether the whole survives, at a small part of the merge's time


@torch.no_grad()
def surviving(layer: LoraLayer, adapters: tuple[str, ...], merged: Tensor, weight: Tensor | None = None) -> float:
    """1 − ‖merged − (W0 + ΔW)‖² / ‖ΔW‖² over some rows, at least 0; merged: W0 + Σ ΔW over `adapters`, rounded.

    weight: W0, as stored; the layer's own where not given.
    """
    weight = layer.dense(layer) if weight is None else weight
    units = list(layer.units(weight, ()))
    changed = lost = noise = 0.0
    rounded = (place for place, _ in layer.units(layer.stored(merged), ()))
    for (matrix, changes), place in zip(layer.units(weight, adapters), rounded, strict=True):
        wide = torch.promote_types(torch.float32, matrix.dtype)
        count = min(math.ceil(ROWS / len(units)), matrix.shape[0])
        rows = torch.linspace(0, matrix.shape[0] - 1, count, device=matrix.device).long()
        base = matrix[rows].to(wide)
        exact = base.clone()
        for change in changes:
            change.add_to(exact, base, rows)
        changed += float((exact - base).square().sum())
        lost += float((place[rows].to(wide) - exact).square().sum())
        noise += (8 * torch.finfo(wide).eps) ** 2 * float(
            base.square().sum()
        )  # start factors that cancel out leave that much
    return share_left(lost, changed, noise)
