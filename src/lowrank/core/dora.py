"""DoRA's row norms from low-rank identities (Liu et al. 2024, arXiv 2402.09353).

‖w_i + s·b_i·A‖² = ‖w_i‖² + 2·s·b_i·(A·w_i) + s²·b_i·(A·Aᵀ)·b_iᵀ: no matrix of W0's size is formed.
"""

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024  # so that the widened copy of W0 stays small whatever d is


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W0 + s·B·A‖ of every output row: weight (d, k), a (r, k), b (d, r) → (d,), in float32 or wider."""
    wide = torch.promote_types(torch.float32, weight.dtype)
    a, b = a.to(wide), b.to(wide)
    gram = a @ a.t()  # (r, r)
    squares = []
    for rows, b_rows in zip(weight.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True):
        rows = rows.to(wide)
        cross = (b_rows * (rows @ a.t())).sum(1)
        change = ((b_rows @ gram) * b_rows).sum(1)
        squares.append(rows.square().sum(1) + 2 * scale * cross + scale**2 * change)
    return torch.cat(squares).clamp_min(0).sqrt()


def row_gain(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """g = m / ‖W0 + ΔW‖_row, (d,), with the norm held constant in differentiation as DoRA §4.3 prescribes."""
    with torch.no_grad():
        norms = row_norms(weight.detach(), a, b, scale)
    return magnitude.to(norms.dtype) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
