"""Rows longer than the longest length: cut, left out, split, or an error. What is done with them is counted."""

from collections.abc import Sequence

from lowrank.data.examples import IGNORED, Example
from lowrank.data.rows import Kind
from lowrank.errors import ConfigError

CUT, DROP, SPLIT, ERROR = "cut", "drop", "split", "error"
USUAL: dict[Kind, str] = {"text": SPLIT}  # all others are cut


def policy_of(kind: Kind, asked: str | None) -> str:
    """What is done with rows of this kind. Raises ConfigError for what has no sense for them."""
    if asked == SPLIT and kind != "text":
        raise ConfigError(
            f"--too-long split is for rows of text; the parts of a row of kind {kind} would have no beginning: "
            "use cut, drop or error"
        )
    return asked or USUAL.get(kind, CUT)


def without_beginning(example: Example, longest: int, bos: Sequence[int]) -> Example | None:
    """The row with the beginning of its prompt cut away, but for bos; None where its answers alone are too long.

    What is answered is never cut, and one token stays before it: the first of a row is not trained.
    """
    start = next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
    first = [*bos] if bos and list(example.ids[: len(bos)]) == [*bos] and start > len(bos) else []
    room = longest - len(first)
    cut = len(example.ids) - room
    if room <= 0 or cut > start - (0 if first else 1):
        return None
    return Example([*first, *example.ids[cut:]], [IGNORED] * len(first) + list(example.labels[cut:]))


def pieces(example: Example, longest: int) -> list[Example]:
    """A text in rows of the longest length. Each begins with the last token of the one before, so all are predicted."""
    step = longest - 1
    starts = range(0, max(1, len(example.ids) - 1), step)
    parts = [(example.ids[at : at + longest], example.labels[at : at + longest]) for at in starts]
    return [Example(ids, [IGNORED, *labels[1:]]) for ids, labels in parts]
