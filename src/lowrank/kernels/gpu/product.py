"""Triton: out = X·M + S·N in one pass, the low-rank part inside the accumulator of the big product.

Forward it is h = x·W0ᵀ + bias + S·(sB)ᵀ; backward dX = dY·W0 + dS·A. The output is written once and, where it adds onto
an earlier result, read once. The accumulator starts at S·N, so the low-rank part is summed in float32 and rounded with
the rest, once. Every output tile is summed by one program in a fixed order: the result is deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # rows of tiles computed side by side, so that they find each other's columns of M in the GPU's cache


class Tile(NamedTuple):
    """What one program computes: `tokens`×`width` of the output, `inner` terms of the sum at a time."""

    tokens: int
    width: int
    inner: int
    warps: int
    stages: int


# from what the largest GPUs can hold to what every one can
TILES = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 4, 3), Tile(64, 64, 32, 4, 2))


@triton.jit  # type: ignore[untyped-decorator]
def _product_kernel(
    x, m, s, n, bias, out,
    tokens, width, inner, rank,
    x_row, x_col, m_row, m_col, s_row, s_col, n_row, n_col, out_row, out_col,
    HAS_BIAS: tl.constexpr, ONTO: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(width, BLOCK_OUT)
    first = program // in_group * GROUP
    group_rows = tl.minimum(tl.cdiv(tokens, BLOCK_T) - first, GROUP)
    row, column = first + program % in_group % group_rows, program % in_group // group_rows
    t = row.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # 64 bits: T·d can be beyond 32
    o = column * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    r = tl.arange(0, BLOCK_R)
    in_t, in_o, in_r = t[:, None] < tokens, o[None, :] < width, r < rank
    left = tl.load(s + t[:, None] * s_row + r[None, :] * s_col, mask=in_t & in_r[None, :], other=0.0)
    right = tl.load(n + r[:, None] * n_row + o[None, :] * n_col, mask=in_r[:, None] & in_o, other=0.0)
    total = tl.dot(left, right, input_precision="ieee")
    for start in range(0, inner, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        rows = tl.load(x + t[:, None] * x_row + i[None, :] * x_col, mask=in_t & (i[None, :] < inner), other=0.0)
        cols = tl.load(m + i[:, None] * m_row + o[None, :] * m_col, mask=(i[:, None] < inner) & in_o, other=0.0)
        total = tl.dot(rows, cols, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    target = out + t[:, None] * out_row + o[None, :] * out_col
    if ONTO:
        total += tl.load(target, mask=in_t & in_o, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=in_t & in_o)


def plus_low_rank(
    x: Tensor,
    m: Tensor,
    s: Tensor,
    n: Tensor,
    bias: Tensor | None = None,
    onto: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile = TILES[-1],
) -> Tensor:
    """x·m + s·n + bias: x (T, K), m (K, N), s (T, r), n (r, N) → (T, N).

    Added in place to `onto` or written to `out`, where one is given. All of one dtype; any strides. Sums are float32.
    """
    tokens, inner = x.shape
    width, rank = m.shape[1], s.shape[1]
    if out is None:
        out = torch.empty(tokens, width, dtype=x.dtype, device=x.device) if onto is None else onto
    programs = triton.cdiv(tokens, tile.tokens) * triton.cdiv(width, tile.width)
    _product_kernel[(programs,)](
        x, m, s, n, out if bias is None else bias, out,
        tokens, width, inner, rank,
        *x.stride(), *m.stride(), *s.stride(), *n.stride(), *out.stride(),
        HAS_BIAS=bias is not None, ONTO=onto is not None,
        BLOCK_T=tile.tokens, BLOCK_OUT=tile.width, BLOCK_IN=tile.inner, BLOCK_R=max(16, triton.next_power_of_2(rank)),
        GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
