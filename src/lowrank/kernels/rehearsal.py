"""A step that is only rehearsed: tensors without numbers take the ways that numbers would, so these can be counted."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_place: str | None = None


def is_rehearsed() -> bool:
    """Whether tensors on the meta device go through the fused map, as they do in `rehearsing`."""
    return _place is not None


def device_type(tensor: Tensor) -> str:
    """Of the device that a tensor is on, as in "cpu"; in `rehearsing`, of the one that it stands for."""
    return _place if _place is not None and tensor.is_meta else tensor.device.type


@contextmanager
def rehearsing(place: str) -> Iterator[None]:
    """Inside, a model on the meta device goes the ways of its like on a `place` device. For one thread."""
    global _place
    before, _place = _place, place
    try:
        yield
    finally:
        _place = before
