"""The differentiable low-rank linear map, by the fastest path that gives the same."""

import torch
from torch import Tensor

from lowrank.kernels import reference
from lowrank.kernels.fused import fused_linear, reason_against


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
    x, weight, bias = autocast_inputs(x, weight, bias)
    if reason_against(x, weight, bias) is not None:
        return reference.lora_linear(x, weight, bias, a, b, scale, dropout, training)
    return fused_linear(x, weight, bias, a, b, scale, dropout if training else 0.0)


def autocast_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three as autocast would cast them for a linear map; as they are outside of autocast."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
