"""From the factors of a file to those of training: parts and start factors as they were before saving folded them."""

import torch
from torch import Tensor

from lowrank.checkpoint.companion import Companion
from lowrank.checkpoint.one_scale import folded
from lowrank.core.factors import LoraFactors
from lowrank.core.finite import all_finite
from lowrank.core.init import Site, find_init
from lowrank.core.rows import RowBlock, are_disjoint

Pair = tuple[Tensor, Tensor]


def unfold(factors: LoraFactors, path: str, companion: Companion) -> LoraFactors:
    """The factors whose `effective()` are `factors`, by what the companion says of `path`; `factors` where that fails.

    Another tool may have changed the weights and left our `lowrank.json` beside them, so nothing is believed that the
    tensors do not show.
    """
    factors = _with_own_scale(factors, companion.scales.get(path, factors.scale))
    fused = companion.fused.get(path)
    pairs: list[Pair] = [(factors.a.detach(), factors.b.detach())]
    if path in companion.start:
        if factors.rank % 2:
            return factors
        pairs = _halves(*pairs[0])
    if fused is not None:
        compact = [_compact(a, b, fused.parts) for a, b in pairs]
        if None in compact:
            return factors
        pairs = [pair for pair in compact if pair is not None]
    if len(pairs) == 1 and fused is None:
        return factors
    return LoraFactors(
        *pairs[0],
        factors.scale,
        factors.dropout,
        magnitude=None if factors.magnitude is None else factors.magnitude.detach(),
        start=pairs[1] if len(pairs) == 2 else None,
        parts=fused.parts if fused else (),
        out_features=factors.out_features,
    )


def _with_own_scale(factors: LoraFactors, own: float) -> LoraFactors:
    """The same ΔW at the scale the module had before it was saved; `factors` where that cannot be."""
    if own == factors.scale or not 0 < abs(own) <= torch.finfo(factors.a.dtype).max or factors.scale == 0:
        return factors
    b = folded(factors.b.detach(), factors.scale, own)
    if not all_finite(b):
        return factors
    magnitude = None if factors.magnitude is None else factors.magnitude.detach()
    return LoraFactors(factors.a.detach(), b, own, factors.dropout, magnitude=magnitude)


def _halves(a: Tensor, b: Tensor) -> list[Pair]:
    """[A; A_start], [B, −B_start] → (A, B), (A_start, B_start)."""
    rank = a.shape[-2] // 2
    return [
        (a[..., :rank, :].clone(), b[..., :rank].contiguous()),
        (a[..., rank:, :].clone(), -b[..., rank:].contiguous()),
    ]


def _compact(a: Tensor, b: Tensor, parts: tuple[RowBlock, ...]) -> Pair | None:
    """(n·r, k), (d, n·r) → (n·r, k), (Σ d_i, r) where B is zero outside the parts' own rows and columns, else None."""
    width, rows = a.shape[-2], b.shape[-2]
    if not 0 < len(parts) <= width or width % len(parts) or not are_disjoint(parts, rows):
        return None
    rank = width // len(parts)
    blocks = [b[..., part.indices().to(b.device), i * rank : (i + 1) * rank] for i, part in enumerate(parts)]
    small = torch.cat(blocks, dim=-2)
    whole = LoraFactors(a, small, 1.0, parts=parts, out_features=rows).full_b(small)
    return (a, small) if torch.equal(whole, b) else None


def with_moved_base(factors: LoraFactors, method: str, weight: Tensor) -> LoraFactors:
    """The same factors for an unchanged base, where training took s·B_start·A_start off it (PiSSA, OLoRA).

    weight: W0 (d, k). The start is found again from W0 by the same decomposition.
    """
    d, k = weight.shape
    site = Site(d, k, factors.rank, factors.scale, lambda: weight.float(), weight.device, factors.a.dtype)
    start = find_init(method)(site)
    return LoraFactors(
        factors.a.detach(),
        factors.b.detach(),
        factors.scale,
        factors.dropout,
        magnitude=None if factors.magnitude is None else factors.magnitude.detach(),
        start=(start.a, start.b),
    )
