"""The products of the fused map, each by the form that is fastest where its tensors are."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.kernels import onednn
from lowrank.kernels.gpu import choice


def fits_one_kernel(x: Tensor, m: Tensor, rank: int, onto: bool) -> bool:
    """Whether x·m plus its low-rank part is one Triton kernel here, measured faster than two products."""
    return choice.available(x) and choice.product_is_faster(x.shape[0], x.shape[1], m.shape[1], rank, x.dtype, onto)


def plus_low_rank(x: Tensor, m: Tensor, s: Tensor, n: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·m + bias + s·n: x (T, k), m (k, d), s (T, r), n (r, d), bias (d,) → (T, d)."""
    if fits_one_kernel(x, m, s.shape[1], onto=False):
        from lowrank.kernels.gpu.product import plus_low_rank as kernel

        return kernel(x, m, s, n, bias)
    return F.linear(x, m.t(), bias).addmm_(s, n)


def two_gradients(dy: Tensor, s: Tensor, b: Tensor, needs_b: bool) -> tuple[Tensor, Tensor | None]:
    """(dS, dB) = (dY·B, dYᵀ·S): dy (T, d), s (T, r), b (d, r) → (T, r), (d, r).

    dB is computed as (Sᵀ·dY)ᵀ: the same sums, for which the CPU libraries need up to half the time.
    """
    if needs_b and choice.available(dy) and choice.gradients_are_faster(dy.shape[0], dy.shape[1], s.shape[1], dy.dtype):
        from lowrank.kernels.gpu.gradients import two_gradients as kernel

        return kernel(dy, s, b)
    return input_gradient(dy, b), weight_gradient(s, dy).t() if needs_b else None


def down(x: Tensor, a: Tensor) -> Tensor:
    """S = x·Aᵀ: x (T, k), a (r, k) → (T, r)."""
    return onednn.times_transposed(x, a) if onednn.serves(x, x.shape[0], a.shape[0]) else torch.mm(x, a.t())


def input_gradient(dy: Tensor, m: Tensor) -> Tensor:
    """dY·M, for M = W0 or B: dy (T, d), m (d, n) → (T, n)."""
    thin = min(m.shape)
    return onednn.times_transposed(dy, m.t()) if onednn.serves(dy, dy.shape[0], thin) else torch.mm(dy, m)


def weight_gradient(s: Tensor, y: Tensor) -> Tensor:
    """Sᵀ·Y, which is dA or dBᵀ: s (T, r), y (T, n) → (r, n)."""
    if onednn.serves(y, y.shape[0], s.shape[1]):
        return onednn.times_transposed(s.t(), y.t())
    return torch.mm(s.t(), y)
