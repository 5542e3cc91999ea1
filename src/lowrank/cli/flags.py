"""Flags that several commands have, what their values mean, and which of a group were given."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import BaseModel

from lowrank.errors import LowrankError

Weighted = Annotated[
    list[str],
    Parameter(help="An adapter, as DIR or DIR:WEIGHT, a folder or a name on the Hub; repeat the flag for several"),
]
AllowPickle = Annotated[bool, Parameter(negative="", help="Read an old adapter's .bin file, with weights_only")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print the report as one JSON object")]


def weighted(text: str) -> tuple[str, float]:
    """("DIR", weight) of "DIR:WEIGHT"; a folder whose own name ends like that is taken by its name."""
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return folder, float(weight)
    except ValueError:
        raise LowrankError(f"--adapter {text}: {weight!r} after the colon is no weight, a number such as 0.5") from None


def given(*groups: BaseModel | None, **single: object) -> dict[str, object]:
    """{name: value} of every flag the user gave; what was left out must not beat a configuration file."""
    flags = {name: value for name, value in single.items() if value is not None}
    for group in groups:
        if group is not None:
            flags |= group.model_dump(exclude_unset=True)
    return flags
