"""What a data set is as tokens: rows with what is trained in them, lengths, first and last tokens, rows met twice."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lowrank.data.examples import IGNORED, Encoded, Example, lengths_of
from lowrank.data.preference import halves
from lowrank.data.recipe import Recipe
from lowrank.data.rows import JUDGES
from lowrank.errors import printable

BINS = 10
OFTEN = 10
DIGEST = 16  # bytes

Runs = list[tuple[str, bool]]  # (text, whether it is trained)


@dataclass(frozen=True, slots=True)
class Survey:
    """lengths: (longest length of the bin, rows in it); first, last: (token as text, how often it begins or ends what
    is trained), the most frequent ones; labels: (label, rows with it), the most frequent first, of rows that have one;
    duplicates: rows that stand in the data once more.
    """

    lengths: tuple[tuple[int, int], ...]
    first: tuple[tuple[str, int], ...]
    last: tuple[tuple[str, int], ...]
    labels: tuple[tuple[str, int], ...]
    duplicates: int


def survey(data: Encoded, tokenizer: Any, recipe: Recipe) -> Survey:
    """The figures of all rows."""
    import numpy

    first: Counter[int] = Counter()
    last: Counter[int] = Counter()
    labels: Counter[str] = Counter()
    halved: list[int] = []  # both lengths of a preference
    digests = bytearray()  # 16 bytes a row say whether two are one
    for example in data.examples:
        if recipe.kind in JUDGES:
            labels[label(example, recipe)] += 1
        elif recipe.kind == "preference":
            halved += [len(half.ids) for half in halves(example)]
        for span in [] if recipe.kind in JUDGES else _trained(example):
            first[span[0]] += 1
            last[span[-1]] += 1
        said = repr((list(example.ids), list(example.labels))).encode()
        digests += hashlib.blake2b(said, digest_size=DIGEST).digest()
    distinct = numpy.unique(numpy.frombuffer(digests, dtype=f"V{DIGEST}"))
    return Survey(
        _bins(numpy.array(halved) if halved else lengths_of(data.examples)),
        _often(first, tokenizer),
        _often(last, tokenizer),
        tuple(labels.most_common()),
        len(digests) // DIGEST - len(distinct),
    )


def _bins(sizes: Any) -> tuple[tuple[int, int], ...]:
    """(the longest length of a bin, rows in it), from the shortest row to the longest."""
    import numpy

    low, high = int(sizes.min()), int(sizes.max())
    width = -(-(high - low + 1) // BINS)
    counts = numpy.bincount((sizes - low) // width).tolist()
    return tuple((min(low - 1 + (number + 1) * width, high), count) for number, count in enumerate(counts))


def described(example: Example, recipe: Recipe) -> list[tuple[str, Example]]:
    """(what is to be said of it, the row); the two rows of a preference apart."""
    size = f"{len(example.ids)} tokens"
    if recipe.kind == "preference":
        sides = zip(("chosen", "rejected"), halves(example), strict=True)
        return [(f"{side}, {len(half.ids)} tokens, {half.trained} trained", half) for side, half in sides]
    if recipe.kind in JUDGES:
        return [(f"{size}, label {label(example, recipe)}", example)]
    return [(f"{size}, {example.trained} trained", example)]


def label(example: Example, recipe: Recipe) -> str:
    """The label of a row to classify by its name, or the number to predict."""
    value = example.labels[0]
    return repr(recipe.labels[int(value)]) if recipe.kind == "classification" else f"{value:g}"


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
    groups = groupby(example.labels, key=lambda label: label != IGNORED)
    return [[int(token) for token in group] for on, group in groups if on]


def _often(tokens: Counter[int], tokenizer: Any) -> tuple[tuple[str, int], ...]:
    return tuple((printable(tokenizer.decode([token]), "\n\t"), n) for token, n in tokens.most_common(OFTEN))
