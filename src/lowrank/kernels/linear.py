"""The differentiable low-rank linear map, by the fastest path that gives the same."""

from torch import Tensor

from lowrank.kernels import reference
from lowrank.kernels.autocast import dtype_for, under_autocast
from lowrank.kernels.dropout import draw
from lowrank.kernels.fused import fused_linear, in_dtype_of, reason_against


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = True,
) -> Tensor:
    """h = W0·x + bias + s·B·A·dropout(x): x (..., k), weight (d, k), bias (d,), a (r, k), b (d, r) → (..., d).

    Differentiable in x, bias, a and b (and, by the reference path, in weight). a and b may be wider than x and are
    rounded to its dtype. `dropout` is the probability that an entry of x is dropped on the way to A, where `training`.
    Under autocast everything is computed in autocast's dtype.
    """
    x = under_autocast(x)
    if dtype_for(x) is not None:
        weight, bias = in_dtype_of(x, weight, bias)
    if reason_against(x, weight, bias) is not None:
        return reference.lora_linear(x, weight, bias, a, b, scale, dropout, training)
    return fused_linear(x, weight, bias, a, b, scale, draw(dropout, x) if dropout and training else None)
