"""DoRA's row norms from low-rank identities (Liu et al. 2024, arXiv 2402.09353), and what they rescale.

‖w_i + s·b_i·A‖² = ‖w_i‖² + 2·s·b_i·(A·w_i) + s²·b_i·(A·Aᵀ)·b_iᵀ: no matrix of W0's size is formed.
"""

import torch
from torch import Tensor

from lowrank.core.unrounded import unrounded

ROWS_AT_ONCE = 1024  # so that the widened copy of W0 stays small whatever d is


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W0 + s·B·A‖ of every output row: weight (d, k), a (r, k), b (d, r) → (d,), in float32 or wider.

    Of a stack of experts, weight (E, d, k), a (E, r, k), b (E, d, r) → (E, d), one expert after the other.
    """
    if weight.dim() == 3:
        return torch.stack([row_norms(*expert, scale) for expert in zip(weight, a, b, strict=True)])
    wide = torch.promote_types(torch.float32, weight.dtype)
    a, b = a.to(wide), b.to(wide)
    with unrounded(weight):
        gram = a @ a.t()  # (r, r)
        squares = []
        for rows, b_rows in zip(weight.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True):
            rows = rows.to(wide)
            cross = (b_rows * (rows @ a.t())).sum(1)
            change = ((b_rows @ gram) * b_rows).sum(1)
            squares.append(rows.square().sum(1) + 2 * scale * cross + scale**2 * change)
    return torch.cat(squares).clamp_min(0).sqrt()


def row_gain(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """g = m / ‖W0 + ΔW‖_row, of m's shape, with the norm held constant in differentiation as DoRA §4.3 prescribes."""
    with torch.no_grad():
        norms = row_norms(weight.detach(), a, b, scale)
    return gain_of(magnitude, norms)


def gain_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g = m / norms, in the norms' dtype; a row of zeros has a gain that is finite."""
    return magnitude.to(norms.dtype) / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def rescaled(h: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """g·(W0 + ΔW)·x + bias from h = (W0 + ΔW)·x + bias: that is g·h + (1 − g)·bias, which at g = 1 is h bit for bit."""
    answer = gain * h if bias is None else torch.addcmul((1 - gain) * bias, gain, h)
    return answer.to(h.dtype)


def rescaled_change(base: Tensor, change: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """g·(W0 + ΔW)·x − W0·x from base = W0·x + bias and change = ΔW·x, which is zero at g = 1 and ΔW = 0."""
    plain = base if bias is None else base - bias
    return ((gain - 1) * plain + gain * change).to(base.dtype)
