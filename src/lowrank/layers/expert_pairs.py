"""What a forward adds to a stack of experts: the factors of the active adapters, few pairs where they allow it."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.layers.expert_gains import ExpertGains

if TYPE_CHECKING:
    from lowrank.layers.stack import LoraStack


@dataclass(frozen=True)
class Pair:
    """The active adapters of one dropout as one: ΔW_e = s·B_e·A_e, a (E, r, k), b (E, d, r).

    gains: of an adapter with DoRA, which is always alone in a pair.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float
    gains: ExpertGains | None = None

    @cached_property
    def of_expert(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) expert by expert, taken apart once for all of them, so that their gradients are put together once."""
        return list(zip(self.a.unbind(), self.b.unbind(), strict=True))

    def dropped(self, x: Tensor) -> Tensor:
        """x̂: what dropout leaves of x, drawn anew at every call."""
        return F.dropout(x, self.dropout) if self.dropout else x


def active_pairs(layer: "LoraStack") -> list[Pair]:
    """The active adapters, those that drop alike stacked along the rank, but for such with DoRA."""
    together: dict[float, list[tuple[Tensor, Tensor, float]]] = {}
    pairs = []
    for factors in layer.active_factors:
        dropout = factors.dropout if layer.experts.training else 0.0
        if factors.magnitude is not None:
            pairs.append(Pair(*factors.moved(), factors.scale, dropout, ExpertGains(layer, factors)))
        else:
            together.setdefault(dropout, []).append((*factors.moved(), factors.scale))
    for dropout, found in together.items():
        a, b, scale = found[0]
        if len(found) > 1:
            a, b, scale = torch.cat([a for a, _, _ in found], 1), torch.cat([b * s for _, b, s in found], 2), 1.0
        pairs.append(Pair(a, b, scale, dropout))
    return pairs


def first_goes_with_base(pairs: list[Pair]) -> bool:
    """Whether W0·x is wanted with the first pair's change in it: DoRA's gain of one is not for another's change."""
    return len(pairs) == 1 or all(pair.gains is None for pair in pairs)
