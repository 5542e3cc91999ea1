"""The command line's only way to standard output: text as it is meant to look, never a command to the terminal.

What is told holds names, notes and rows of files that somebody else wrote. Line ends and tabs are ours (names from
files have theirs escaped by `errors.short` and `some`); every other sign that a terminal would not show is printed as
its escape.
"""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from lowrank.errors import printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from rich.text import Text

OURS = "\n\t"


def say(*lines: object) -> None:
    """Print each as a line."""
    for line in lines:
        print(printable(line, OURS), flush=True)


def say_written(report: "DataclassInstance", out: object, as_json: bool) -> None:
    """What a command that wrote `out` reports: a sentence and the place, or one JSON object."""
    say(json.dumps(asdict(report)) if as_json else f"{report}\nsaved to {printable(out)}")


def say_part(text: str) -> None:
    """Print a part of a line that is still written; whoever reads it by a pipe gets it as it is."""
    print(printable(text, OURS + "\r") if sys.stdout.isatty() else text, end="", flush=True)


def styled(text: object, style: str = "") -> "Text":
    """The same for rich: brackets and colons mean nothing special in it, and escapes are shown."""
    from rich.text import Text

    return Text(printable(text, OURS), style)
