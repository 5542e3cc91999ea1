"""Warnings that belong to what is kept: said when it is made, and again when it is met."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lowrank.errors import LowrankWarning


@contextmanager
def heard() -> Iterator[list[str]]:
    """Inside, lowrank's warnings are noted in the list; all are given on at the end."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LowrankWarning)
        try:
            yield said
        finally:
            found = list(caught)
    said += [str(one.message) for one in found if issubclass(one.category, LowrankWarning)]
    for one in found:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def repeat(said: Sequence[str]) -> None:
    """Warn of it again."""
    for text in said:
        warnings.warn(text, LowrankWarning, stacklevel=3)
