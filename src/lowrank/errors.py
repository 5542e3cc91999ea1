"""The errors a user can cause. Each message is one sentence: the place, what was wanted, what to do.

LowrankError
├── ConfigError      a LoraConfig or command option that cannot be meant
├── TargetError      patterns that match nothing, or modules that cannot be adapted
├── CheckpointError  adapter or model files that are missing, damaged or of another shape
│   └── OutputError  a place where no result can go: an input, in use, or refused by the disk
├── MergeError       a merge that would not be exact, or not finite
├── DataError        rows, columns or files of training data
└── Diverged         a training whose loss, gradient or evaluation is not finite

Names come from files, and files may hold thousands of faults: `some` and `short` keep a sentence a sentence.
"""

from collections.abc import Iterable

ROOM = 300  # characters of a sentence that is read at a glance, beside the words around them


class LowrankError(Exception):
    """Base of every error caused by a wrong call or wrong input; the command line exits with status 2 on it."""


class ConfigError(LowrankError):
    """A configuration value that cannot be meant (rank 0, alpha not finite, unknown initialisation...)."""


class TargetError(LowrankError):
    """A target pattern that matches nothing, or a module that cannot be adapted."""


class CheckpointError(LowrankError):
    """An adapter or model file that is missing, damaged, or made for another model."""


class OutputError(CheckpointError):
    """A place where no result can go: it is an input or holds something, another process writes there, a full disk."""


class MergeError(LowrankError):
    """A merge that cannot be exact: non-finite factors, or adapters whose meaning depends on the unmerged base."""


class DataError(LowrankError):
    """Training data that cannot be used, named by file, line and field."""


class ProcessLost(LowrankError):  # noqa: N818  as the next one
    """Of several processes of one training another one ended: the cause is its to say."""


class Diverged(LowrankError):  # noqa: N818  the field's word
    """Numbers that are not finite: a training's loss or gradient, from which nothing can be learned, or an answer's."""


class Stopped(KeyboardInterrupt):
    """A training that was asked to stop and did, written down: by a signal, or because its time was up.

    The message says how it is gone on with. number: the signal, None where the time was up.
    """

    def __init__(self, message: str, number: int | None) -> None:
        super().__init__(message)
        self.number = number


class LowrankWarning(UserWarning):
    """Something that works but is probably not what was meant."""


def some(items: Iterable[object], most: int = 3, separator: str = ", ") -> str:
    """The first `most` items, fewer where they are long, and how many there are besides: "a, b, c and 106 more".

    An item is cut by `short`; together they have ROOM characters at most.
    """
    every = list(items)
    told: list[str] = []
    left = ROOM
    for item in every[:most]:
        text = short(item, ROOM)
        left -= len(text)
        if told and left < 0:
            break
        told.append(text)
    more = f" and {len(every) - len(told)} more" if len(every) > len(told) else ""
    return separator.join(told) + more


def short(item: object, most: int = 300) -> str:
    """The item as printable text of at most `most` characters: a longer one loses its middle."""
    text = printable(item)
    if len(text) <= most:
        return text
    kept = (most - 1) // 2
    return f"{text[:kept]}…{text[-kept:]}"


def quoted(name: object) -> str:
    """A name or value of a file, as a message says it: in quotes, printable, at most 80 characters."""
    return short(repr(name), 80)


def printable(text: object, keep: str = "") -> str:
    """The text with every character that a terminal would not show as it is, but those of `keep`, as its escape.

    A name from a file may hold a line break, a terminal's command or a sign that turns the line around; printed like
    this it stays within its place in the line. What is shown already stays the same.
    """
    return "".join(sign if sign.isprintable() or sign in keep else _escape(sign) for sign in str(text))


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
