"""Triton: dS = dY·B and dB = dYᵀ·S from one reading of dY.

Each program takes a block of tokens and walks over dY's columns once: its rows of dS are summed in registers, and its
share of dBᵀ is written as a partial sum in float32. The shares are added afterwards in a fixed order, so the result
does not depend on which program finished first (an atomic addition would).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D = 128, 64


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_kernel(
    dy, s, b, ds, partial,
    tokens, width, rank,
    dy_row, dy_col, s_row, s_col, b_row, b_col,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # 64 bits: T·d can be beyond 32
    r = tl.arange(0, BLOCK_R)
    in_t, in_r = t < tokens, r < rank
    middle = tl.load(s + r[:, None] * s_col + t[None, :] * s_row, mask=in_r[:, None] & in_t[None, :], other=0.0)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_d = d < width
        rows = tl.load(dy + t[:, None] * dy_row + d[None, :] * dy_col, mask=in_t[:, None] & in_d[None, :], other=0.0)
        cols = tl.load(b + d[:, None] * b_row + r[None, :] * b_col, mask=in_d[:, None] & in_r[None, :], other=0.0)
        total = tl.dot(rows, cols, total, input_precision="ieee")
        share = tl.dot(middle, rows, input_precision="ieee")
        place = partial + (block * rank + r[:, None]) * width + d[None, :]
        tl.store(place, share, mask=in_r[:, None] & in_d[None, :])
    tl.store(ds + t[:, None] * rank + r[None, :], total.to(ds.dtype.element_ty), mask=in_t[:, None] & in_r[None, :])


def two_gradients(dy: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(dS, dB): dy (T, d), s (T, r), b (d, r) → dS = dY·B (T, r) and dB = dYᵀ·S (d, r), in dy's dtype."""
    tokens, width = dy.shape
    rank = s.shape[1]
    blocks = triton.cdiv(tokens, BLOCK_T)
    ds = torch.empty(tokens, rank, dtype=dy.dtype, device=dy.device)
    partial = torch.empty(blocks, rank, width, dtype=torch.float32, device=dy.device)
    _gradients_kernel[(blocks,)](
        dy, s, b, ds, partial,
        tokens, width, rank,
        *dy.stride(), *s.stride(), *b.stride(),
        BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, BLOCK_R=max(16, triton.next_power_of_2(rank)),
    )  # fmt: skip
    return ds, partial.sum(0).t().to(dy.dtype)
