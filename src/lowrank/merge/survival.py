"""How much of ΔW is left once W0 + ΔW is rounded to the weight's dtype."""

import torch
from torch import Tensor

from lowrank.layers.base import LoraLayer

ROWS = 256  # of a weight, evenly spaced: they tell whether the whole survives, at a small part of the merge's time


@torch.no_grad()
def surviving(layer: LoraLayer, adapters: tuple[str, ...], merged: Tensor, weight: Tensor | None = None) -> float:
    """1 − ‖merged − (W0 + ΔW)‖² / ‖ΔW‖² over some rows, at least 0; merged: W0 + Σ ΔW over `adapters`, rounded.

    weight: W0, as stored; the layer's own where not given.
    """
    weight = layer.dense(layer) if weight is None else weight
    wide = torch.promote_types(torch.float32, weight.dtype)
    rows = torch.linspace(0, weight.shape[0] - 1, min(ROWS, weight.shape[0]), device=weight.device).long()
    base = weight[rows].to(wide)
    exact = base.clone()
    for name in adapters:
        layer.change(name, weight=weight).add_to(exact, base, rows)
    changed = float((exact - base).square().sum())
    lost = float((layer.stored(merged)[rows].to(wide) - exact).square().sum())
    noise = (8 * torch.finfo(wide).eps) ** 2 * float(
        base.square().sum()
    )  # start factors that cancel out leave that much
    return max(0.0, 1 - lost / changed) if changed > noise else 1.0
