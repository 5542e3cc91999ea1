"""The products of the fused map, each by the form that is fastest where its tensors are.

On a CPU that has no fast half-precision product (`processor.half_products_are_slow`) all but W0·x, which is to have the
base's bits, are computed in float32 and rounded once: there dY·W0 takes a thirtieth of the time, copies included.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lowrank.kernels import onednn, pieces
from lowrank.kernels.gpu import choice
from lowrank.kernels.order import accumulates
from lowrank.kernels.processor import half_products_are_slow, has_avx2_alone
from lowrank.kernels.rehearsal import device_type

WIDE = 1536  # columns from which oneDNN's half-precision Sᵀ·Y gains more than laying Sᵀ out anew costs (Xeon with AMX)
TURNED = 16  # MKL with AVX2 (an EPYC): below this rank X·M takes half the time and less if M (k, r) lies transposed
# two threads of it: Sᵀ·Y takes 0.6 to 0.8 of its time as a batch of so many products, which MKL deals out to them; a
# block of Y's columns is a multiple of 64 bytes wide
BLOCKS, COLUMNS, MANY = 8, 16, 512
SUMMED = 512  # rows below which MKL's Sᵀ·Y beats oneDNN's (an EPYC with AVX-512, 256 rows: 132 µs against 154)


def one_kernel(x: Tensor, m: Tensor, rank: int, onto: bool) -> Callable[..., Tensor] | None:
    """The Triton kernel for x·m plus its low-rank part, where it computes it: else None."""
    tile = choice.product_tile(x, m.shape[1], rank, onto) if choice.available(x) else None
    if tile is None:
        return None
    from lowrank.kernels.gpu.product import plus_low_rank as kernel

    return partial(kernel, tile=tile)


def plus_low_rank(
    x: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """W0·x + bias + s·S·Bᵀ, into `out` where given.

    x (..., k) and the same as rows (T, k), weight (d, k), bias (d,), s (T, r), b (d, r) → (..., d).
    """
    if (kernel := one_kernel(rows, weight.t(), s.shape[1], onto=False)) is not None:
        scaled = b if scale == 1.0 else b * scale
        flat = None if out is None else out.view(-1, weight.shape[0])
        h = kernel(rows, weight.t(), s, scaled.t(), bias, out=flat)
        return h.view(*x.shape[:-1], weight.shape[0])
    h = pieces.base(x, weight, bias, out)  # (..., d)
    add_product_(h.view(-1, weight.shape[0]), s, b.t(), scale)
    return h


def add_product_(onto: Tensor, s: Tensor, m: Tensor, scale: float = 1.0) -> None:
    """onto += scale·s·m, in place: onto (T, n), s (T, r), m (r, n)."""
    if are_widened(onto):
        onto.add_(torch.mm(s.float(), m.float()), alpha=scale)
    else:
        onto.addmm_(s, m, alpha=scale)


def are_widened(like: Tensor) -> bool:
    """Whether products of `like`'s dtype and device are computed in float32."""
    return like.dtype.itemsize == 2 and device_type(like) == "cpu" and half_products_are_slow(like.dtype)


def two_gradients(dy: Tensor, s: Tensor, b: Tensor, scale: float, needs_b: bool) -> tuple[Tensor, Tensor | None]:
    """(dS, dBᵀ) = (scale·dY·B, Sᵀ·dY): dy (T, d), s (T, r), b (d, r) → (T, r), (r, d). dBᵀ is not scaled.

    dB is computed transposed: the same sums, for which the CPU libraries need up to half the time.
    """
    if needs_b and choice.available(dy) and choice.serves_gradients(dy, s.shape[1]):
        from lowrank.kernels.gpu.gradients import two_gradients as kernel

        ds, db = kernel(dy, s, b)
        return ds if scale == 1.0 else ds.mul_(scale), db.t()
    return up(dy, b, scale), weight_gradient(s, dy) if needs_b else None


def up(dy: Tensor, b: Tensor, scale: float) -> Tensor:
    """dS = scale·dY·B: dy (T, d), b (d, r) → (T, r)."""
    if are_widened(dy):
        return torch.mm(dy.float(), b.float()).mul_(scale).to(dy.dtype)
    if onednn.serves(dy, dy.shape[0], b.shape[1]):
        return onednn.times_transposed(dy, b.t()).mul_(scale)
    if b.shape[1] < TURNED and _is_single_on_avx2(dy):
        b = b.t().contiguous().t()
    return torch.mm(dy, b) if scale == 1.0 else dy.new_empty(dy.shape[0], b.shape[1]).addmm_(dy, b, beta=0, alpha=scale)


def down(x: Tensor, a: Tensor) -> Tensor:
    """S = x·Aᵀ: x (T, k), a (r, k) → (T, r)."""
    if are_widened(x):
        return torch.mm(x.float(), a.float().t()).to(x.dtype)
    if onednn.serves(x, x.shape[0], a.shape[0]):
        return onednn.times_transposed(x, a)
    return torch.mm(x, a.t())


def _is_single_on_avx2(x: Tensor) -> bool:
    return x.dtype is torch.float32 and device_type(x) == "cpu" and has_avx2_alone()


def input_gradient(dy: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """dX = dY·W0, added in place to `onto` where given: dy (T, d), weight (d, k) → (T, k)."""
    if are_widened(dy):
        wide = torch.mm(dy.float(), weight.float())
        return wide.to(dy.dtype) if onto is None else onto.add_(wide)
    if onednn.serves(dy, dy.shape[0], min(weight.shape)):
        dx = onednn.times_transposed(dy, weight.t())
    elif onto is None or accumulates(dy.dtype, device_type(dy)):
        return pieces.product(dy, weight, onto)
    else:
        dx = pieces.product(dy, weight)
    return dx if onto is None else onto.add_(dx)


def weight_gradient(s: Tensor, y: Tensor) -> Tensor:
    """Sᵀ·Y, which is dA or dBᵀ: s (T, r), y (T, n) → (r, n), in y's dtype or float32."""
    if are_widened(y):
        return torch.mm(s.float().t(), y.float())
    if y.shape[0] >= SUMMED and onednn.serves(y, y.shape[0], s.shape[1]):
        return onednn.times_transposed(s.t(), y.t())
    if _is_dealt_out(y):
        blocks = y.unflatten(1, (BLOCKS, -1)).transpose(0, 1)  # (blocks, T, n / blocks)
        return torch.bmm(s.t().expand(BLOCKS, -1, -1), blocks).transpose(0, 1).reshape(s.shape[1], -1)
    wide = y.dtype.itemsize == 2 and y.shape[1] >= WIDE and device_type(y) == "cpu"
    return torch.mm(s.t().contiguous() if wide else s.t(), y)


def _is_dealt_out(y: Tensor) -> bool:
    """Whether Sᵀ·Y, y (T, n), is left to MKL as a batch."""
    rows, columns = y.shape
    fits = rows >= MANY and columns % (BLOCKS * COLUMNS) == 0
    return fits and _is_single_on_avx2(y) and torch.get_num_threads() == 2
