"""Whether merged weights will be finite, known before the first weight is touched."""

import torch
from torch import Tensor

from lowrank.core.merging import Change
from lowrank.layers.base import PARAMETRISED, LoraLayer


@torch.no_grad()
def merge_fault(layer: LoraLayer, adapters: tuple[str, ...]) -> str | None:
    """Why W0 + Σ ΔW over `adapters` would hold values that are not finite, in words that end a sentence, or None.

    A bound on the largest entry answers for nearly every layer in one pass over W0; where it exceeds what the dtype
    holds (a large change of a float16 weight), the layer is merged on trial.
    """
    if not layer.holds_weight:
        return PARAMETRISED
    weight = layer.dense(layer)
    largest = _largest(weight)
    if not torch.isfinite(largest):
        return "the base's weight holds values that are not finite"
    try:
        for name in (name for name in adapters if name in layer.row_names):
            largest = torch.maximum(largest, _largest(layer.rows(name).values))
        bounds = [sum(_bound(change, largest) for change in changes) for _, changes in layer.units(weight, adapters)]
        bound = largest + max(bounds, key=float)
    except FloatingPointError as error:
        return str(error)
    limit = torch.finfo(weight.dtype).max
    if bound < 0.99 * limit or torch.isfinite(_largest(layer.merged_weight(adapters))):
        return None
    return f"the merged values do not fit into {weight.dtype}, whose largest number they exceed"


def _largest(tensor: Tensor) -> Tensor:
    """max |t| in float64; NaN where there is one."""
    low, high = torch.aminmax(tensor.detach())
    return torch.maximum(-low.double(), high.double())


def _bound(change: Change, largest: Tensor) -> Tensor:
    """At least max |ΔW|: |s|·max‖left_i‖·max‖right_j‖; with DoRA's gain g, max|g|·(max|W0| + that) + max|W0|."""
    plain: Tensor = abs(change.scale) * change.left.double().norm(dim=1).max() * change.right.double().norm(dim=0).max()
    gains = [gain for gain in (change.row_gain, change.column_gain) if gain is not None]
    for gain in gains:
        plain = _largest(gain) * (largest + plain) + largest
    return plain
