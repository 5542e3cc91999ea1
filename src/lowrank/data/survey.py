"""What a data set is as tokens: rows with what is trained in them, lengths, first and last tokens, rows met twice."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lowrank.data.examples import IGNORED, Encoded, Example
from lowrank.errors import printable

BINS = 10
OFTEN = 10

Runs = list[tuple[str, bool]]  # (text, whether it is trained)


@dataclass(frozen=True, slots=True)
class Survey:
    """lengths: (longest length of the bin, rows in it); first, last: (token as text, how often it begins or ends what
    is trained), the most frequent ones; duplicates: rows that stand in the data once more.
    """

    lengths: tuple[tuple[int, int], ...]
    first: tuple[tuple[str, int], ...]
    last: tuple[tuple[str, int], ...]
    duplicates: int


def survey(data: Encoded, tokenizer: Any) -> Survey:
    """The figures of all rows."""
    sizes = [len(example.ids) for example in data.examples]
    low = min(sizes)
    width = -(-(max(sizes) - low + 1) // BINS)
    counts = Counter((size - low) // width for size in sizes)
    edges = tuple((low - 1 + (number + 1) * width, counts[number]) for number in range(max(counts) + 1))
    spans = [run for example in data.examples for run in _trained(example)]
    distinct = {(tuple(example.ids), tuple(example.labels)) for example in data.examples}
    return Survey(
        edges,
        _often([span[0] for span in spans], tokenizer),
        _often([span[-1] for span in spans], tokenizer),
        len(sizes) - len(distinct),
    )


def runs(example: Example, tokenizer: Any, apart: str = "") -> Runs:
    """The row as text, cut where training begins and ends. apart: what is put between two tokens."""
    on = [label != IGNORED for label in example.labels] if len(example.labels) == len(example.ids) else []
    marks = on or [False] * len(example.ids)  # a row to classify has one label for all of it
    found = []
    for trained, group in groupby(zip(example.ids, marks, strict=True), key=lambda pair: pair[1]):
        ids = [token for token, _ in group]
        text = apart.join(tokenizer.decode([token]) for token in ids) if apart else tokenizer.decode(ids)
        found.append((printable(text, "\n\t"), trained))
    return found


def _trained(example: Example) -> list[Sequence[int]]:
    if len(example.labels) != len(example.ids):
        return []
    groups = groupby(example.labels, key=lambda label: label != IGNORED)
    return [[int(token) for token in group] for on, group in groups if on]


def _often(tokens: Sequence[int], tokenizer: Any) -> tuple[tuple[str, int], ...]:
    return tuple((printable(tokenizer.decode([token]), "\n\t"), n) for token, n in Counter(tokens).most_common(OFTEN))
