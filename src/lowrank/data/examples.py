"""Rows as tokens, and what of them is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

IGNORED = -100  # the label of a token that is not trained, in torch and transformers alike


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. labels: per token (IGNORED where not trained), or the one class or number of a labelled row.

    type_ids: which text of a pair a token belongs to, for tokenizers that say so; which answer, in a row that prefers.
    starts: where rows begin that are put end to end in this one (`data.packing`).
    """

    ids: Sequence[int]
    labels: Sequence[float]
    type_ids: Sequence[int] | None = None
    starts: Sequence[int] = (0,)

    @property
    def trained(self) -> int:
        """How many of the labels count."""
        return sum(label != IGNORED for label in self.labels)


def lengths_of(examples: Sequence[Example]) -> Any:
    """How many tokens each has: (rows,) whole numbers of numpy, 8 bytes a row. Those that are on disk know theirs."""
    import numpy

    known = getattr(examples, "lengths", None)
    return numpy.array([len(example.ids) for example in examples], dtype=numpy.int64) if known is None else known


@dataclass(frozen=True)
class Encoded:
    """A data set as tokens.

    cut: rows shortened to max_length; dropped: those left out, too long or with nothing to train; split: rows that
    became several for their length; rewritten: conversations that became several rows, since their template writes
    earlier turns in another way than it wrote them when they were answers; packed: how many rows the examples
    hold, where several are put end to end; reused: whether the tokens were made by an earlier run.
    totals: (all tokens, labels that count, the least label, the largest), counted where they are not given.
    """

    examples: Sequence[Example]
    cut: int = 0
    dropped: int = 0
    split: int = 0
    rewritten: int = 0
    packed: int = 0
    reused: bool = False
    totals: tuple[int, int, float, float] | None = None

    @property
    def tokens(self) -> int:
        """All tokens, those of the prompts included."""
        return self._totals[0]

    @property
    def trained(self) -> int:
        """The labels that count: tokens to predict, or rows to classify."""
        return self._totals[1]

    @property
    def between(self) -> tuple[float, float]:
        """The least and the largest label: of rows to predict, the numbers; of others it says nothing."""
        return self._totals[2:]

    @cached_property
    def _totals(self) -> tuple[int, int, float, float]:
        if self.totals is not None:
            return self.totals
        labels = [label for example in self.examples for label in example.labels]
        counted = sum(label != IGNORED for label in labels)
        return int(lengths_of(self.examples).sum()), counted, min(labels, default=0), max(labels, default=0)
