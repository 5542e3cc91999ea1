"""Autocast: an input is cast once for all projections that read it.

torch casts at every linear map, so q, k and v would each get a copy of x of their own: three copies to write and to
keep, and nothing left by which they are known to share an input. Here the copy lives as long as x does.
"""

import threading
import weakref

import torch
from torch import Tensor


class _Copy:
    """x in another dtype, as long as x lives and is not written to."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        me = weakref.ref(self)
        self._x = weakref.ref(x, lambda _: _Copy._x_died(me))
        self._state = _state_of(x)
        self.cast: Tensor | None = x.to(dtype)

    @staticmethod
    def _x_died(me: "weakref.ref[_Copy]") -> None:
        if (copy := me()) is not None:
            copy.cast = None

    def of(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The copy, if it is this tensor's as it is now."""
        same = self._x() is x and self._state == _state_of(x) and self.cast is not None and self.cast.dtype is dtype
        return self.cast if same else None


def _state_of(x: Tensor) -> tuple[int, bool, bool]:
    return x._version, x.requires_grad, torch.is_grad_enabled()


class _Local(threading.local):
    last: _Copy | None = None


_local = _Local()


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
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None or x.is_inference():
        return x.to(dtype)
    cast = None if _local.last is None else _local.last.of(x, dtype)
    if cast is None:
        _local.last = _Copy(x, dtype)
        cast = _local.last.cast
        assert cast is not None
    return cast
