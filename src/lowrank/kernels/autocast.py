"""Autocast: an input is cast once for all projections that read it.

torch casts at every linear map, so q, k and v would each get a copy of x of their own: three copies to write and to
keep, and nothing left by which they are known to share an input. Here the copy lives as long as x does.
"""

import torch
from torch import Tensor

from lowrank.kernels.remembered import Remembered

_casts: Remembered[Tensor] = Remembered()


def dtype_for(x: Tensor) -> torch.dtype | None:
    """The dtype autocast computes a linear map of x in; None outside of autocast, and for float64, which it leaves."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def under_autocast(x: Tensor) -> Tensor:
    """x as autocast would cast it for a linear map, the same tensor for every call with x; x outside of autocast."""
    dtype = dtype_for(x)
    if dtype is None or x.dtype is dtype:
        return x
    return cast_once(x, dtype)


def cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, the same tensor for every call with x while it lives."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None or x.is_inference():
        return x.to(dtype)
    key = (dtype, x.requires_grad, torch.is_grad_enabled())
    cast = _casts.of(x, key)
    return _casts.keep(x, key, x.to(dtype)) if cast is None else cast
