"""W0·x + bias for a W0 in a stored form, which is read once forward and once backward, and never kept dense."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowrank.core.stored import Stored
from lowrank.kernels import pieces, products
from lowrank.kernels.autocast import under_autocast
from lowrank.kernels.fused import in_dtype_of, is_transformed


def frozen_linear(x: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
    """W0·x + bias: x (..., k), weight (d, k), bias (d,) → (..., d), in x's dtype (autocast's where that is on)."""
    x = under_autocast(x)
    _, bias = in_dtype_of(x, weight, bias)
    tracked = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if is_transformed() is not None or not tracked:
        return F.linear(x, weight.matrix(x.dtype), bias)
    answer: Tensor = _FrozenLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return answer


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        return pieces.base(x, weight.matrix(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        rows = dh.reshape(-1, dh.shape[-1])  # (T, d)
        needs_x, _, needs_bias = ctx.needs_input_grad
        dx = products.input_gradient(rows, ctx.weight.matrix(rows.dtype)).view(ctx.shape) if needs_x else None
        return dx, None, rows.sum(0) if needs_bias else None
