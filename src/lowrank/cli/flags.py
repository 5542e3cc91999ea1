"""Flags that come in groups: which were given."""

from pydantic import BaseModel


def given(*groups: BaseModel | None, **single: object) -> dict[str, object]:
    """{name: value} of every flag the user gave; what was left out must not beat a configuration file."""
    flags = {name: value for name, value in single.items() if value is not None}
    for group in groups:
        if group is not None:
            flags |= group.model_dump(exclude_unset=True)
    return flags
