"""All settings of a training as a file to fill in, made from the settings themselves, so that none can be missing.

A setting that was not given is a line of comment with its default: what is taken into use is what its `#` is taken
from.
"""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lowrank.data.settings import DataSettings
from lowrank.train.settings import AdapterSettings, LoopSettings, ShardSettings, TrainSettings

GROUPS: tuple[tuple[str, type[BaseModel] | None], ...] = (
    ("The run", None),  # what is in no other
    ("The adapter", AdapterSettings),
    ("The data", DataSettings),
    ("The training", LoopSettings),
    ("The machine", ShardSettings),
)
HEAD = """\
# Settings of `lowrank train --config FILE`. A line `#name: value` is a default; without its # it holds.
# Flags beat these lines.
"""
WIDTH = 100


def settings_file(given: Mapping[str, object]) -> str:
    """The text of the file. given: settings that hold already, by name."""
    placed = {name for _, group in GROUPS if group for name in group.model_fields}
    parts = [HEAD]
    for title, group in GROUPS:
        names = group.model_fields if group else [name for name in TrainSettings.model_fields if name not in placed]
        parts.append(f"\n# {title} {'-' * (WIDTH - 3 - len(title))}\n")
        parts += ["\n".join(_lines(name, given)) + "\n" for name in names]
    return "\n".join(parts)


def _lines(name: str, given: Mapping[str, object]) -> Iterator[str]:
    field = TrainSettings.model_fields[name]
    words = textwrap.TextWrapper(WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    yield from words.wrap(_meaning(field))
    if name in given:
        yield _written(name, given[name])
    else:
        yield "#" + _written(name, None if field.is_required() else field.get_default())


def _meaning(field: FieldInfo) -> str:
    """What a setting is, with the values it may have where its words do not name them all."""
    words = str(field.description)
    choices = [choice for choice in _choices(field.annotation) if isinstance(choice, str)]
    needed = " (needed)" if field.is_required() else ""
    return f"{words}{needed}" + ("" if all(one in words for one in choices) else f" ({', '.join(choices)})")


def _choices(annotation: Any) -> list[Any]:
    """The values of a Literal, within a union too."""
    found = get_args(annotation)
    return [one for part in found for one in (_choices(part) if get_args(part) else [part])]


def _written(name: str, value: object) -> str:
    """One line of YAML, of a value that is no list with anything in it."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump({name: plain}, allow_unicode=True, width=2**30).rstrip("\n")
    return text.removesuffix(" null")
