"""A step that is only rehearsed: tensors without numbers take the ways that numbers would, so these can be counted."""

from collections.abc import Iterator
from contextlib import contextmanager

_rehearsed = False


def is_rehearsed() -> bool:
    """Whether tensors on the meta device go through the fused map, as they do in `rehearsing`."""
    return _rehearsed


@contextmanager
def rehearsing() -> Iterator[None]:
    """Inside, a model on the meta device is computed as its like with numbers is. For one thread."""
    global _rehearsed
    before, _rehearsed = _rehearsed, True
    try:
        yield
    finally:
        _rehearsed = before
