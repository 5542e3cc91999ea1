"""What was made from a tensor, given again while the tensor lives and is not written to.

A transformer block calls q, k and v with one and the same tensor. What each of them needs of it (a cast copy, a dropout
mask) is made once, whatever the architecture, since the tensor itself says who belongs together.
"""

import threading
import weakref
from collections.abc import Hashable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class _Made(Generic[T]):
    """What was made from x, by key: it goes when x goes."""

    def __init__(self, x: Tensor) -> None:
        me = weakref.ref(self)
        self._x = weakref.ref(x, lambda _: _Made._x_died(me))
        self._version = x._version
        self.values: dict[Hashable, T] = {}

    @staticmethod
    def _x_died(me: "weakref.ref[_Made[T]]") -> None:
        if (made := me()) is not None:
            made.values.clear()

    def is_for(self, x: Tensor) -> bool:
        return self._x() is x and self._version == x._version


class Remembered(threading.local, Generic[T]):
    """The values made from the last tensor of which any was kept, for each thread."""

    _last: _Made[T] | None = None

    def of(self, x: Tensor, key: Hashable) -> T | None:
        """What was kept for this very tensor, as it is now, under this key; None where nothing was, or no longer is."""
        return self._last.values.get(key) if self._last is not None and self._last.is_for(x) else None

    def keep(self, x: Tensor, key: Hashable, value: T) -> T:
        """The value, remembered; what was made from another tensor is forgotten."""
        if self._last is None or not self._last.is_for(x):
            self._last = _Made(x)
        self._last.values[key] = value
        return value
