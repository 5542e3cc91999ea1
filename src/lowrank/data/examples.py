"""Rows as tokens, and what of them is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Encoded:
    """A data set as tokens.

    cut: rows shortened to max_length; dropped: those left out, too long or with nothing to train; split: rows that
    became several for their length; rewritten: conversations that became several rows, since their template writes
    earlier turns in another way than it wrote them when they were answers; packed: how many rows the examples
    hold, where several are put end to end; reused: whether the tokens were made by an earlier run.
    """

    examples: Sequence[Example]
    cut: int = 0
    dropped: int = 0
    split: int = 0
    rewritten: int = 0
    packed: int = 0
    reused: bool = False

    @property
    def tokens(self) -> int:
        """All tokens, those of the prompts included."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def trained(self) -> int:
        """The labels that count: tokens to predict, or rows to classify."""
        return sum(example.trained for example in self.examples)
