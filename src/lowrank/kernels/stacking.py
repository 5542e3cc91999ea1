"""S and dA of several projections of one input, from one product each where that keeps their bits.

[A₁; A₂; …] meets x in one product, and so do [dS₁ dS₂ …]ᵀ and x. A library may sum a wider product in another order, so
whether the parts have the bits of the single products is tried, once, for a shape that is met again and again. Stacked
or not can then be told from the time alone.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lowrank.kernels import products

MEETINGS = 12  # a shape is worth trying once it was met so often

_stacks: dict[tuple[Any, ...], int | bool] = {}  # how often a shape was met, then whether its products may be stacked


def down(rows: Tensor, a: Sequence[Tensor], stacked: bool) -> list[Tensor]:
    """Every S = x·Aᵀ, (T, r): from one product where they may be stacked."""
    if not stacked:
        return [products.down(rows, one) for one in a]
    s = products.down(rows, torch.cat(list(a)))  # (T, Σr)
    return [one.contiguous() for one in s.split([one.shape[0] for one in a], dim=1)]


def a_gradients(
    together: Tensor, ds: list[Tensor], live: list[int], wanted: list[int], rows: Tensor, stacked: bool
) -> list[Tensor]:
    """dA = dSᵀ·x, (r, k), of every wanted projection: ds as `live` has them, and all of them side by side."""
    if stacked and len(wanted) == len(live):
        return list(products.weight_gradient(together, rows).split([one.shape[1] for one in ds]))
    return [products.weight_gradient(one, rows) for i, one in zip(live, ds, strict=True) if i in wanted]


def may_be_stacked(rows: Tensor, ranks: Sequence[int]) -> bool:
    """Whether S and dA of projections of these ranks have, stacked, the bits of the single ones: rows (T, k)."""
    key = (*rows.shape, tuple(ranks), rows.dtype, rows.device, torch.get_num_threads())
    known = _stacks.get(key, 0)
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return known is True  # to try is to wait for the GPU, which a stream that is captured must not
    if isinstance(known, bool):
        return known
    known = known + 1 if known < MEETINGS else _same_bits(rows, ranks)
    _stacks[key] = known
    return known is True


def _same_bits(rows: Tensor, ranks: Sequence[int]) -> bool:
    draw = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(rows)

    tokens, k = rows.shape
    x = drawn(tokens, k)
    a, ds = [drawn(r, k) for r in ranks], [drawn(tokens, r) for r in ranks]
    if not all(map(torch.equal, down(x, a, True), down(x, a, False))):
        return False
    for order in (ds, ds[::-1]):
        at = list(accumulate((one.shape[1] for one in order), initial=0))
        stacked = products.weight_gradient(torch.cat(order, dim=1), x)
        parts = [stacked[start:end] for start, end in pairwise(at)]
        if not all(map(torch.equal, parts, (products.weight_gradient(one, x) for one in order))):
            return False
    return True
