"""Which module names a pattern means, with PEFT's semantics, and what was probably meant when it means none."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import TypeVar

from lowrank.errors import ConfigError, TargetError, quoted, short
from lowrank.injection.regex import Table

Value = TypeVar("Value")
FUSED = re.compile(r"(?P<name>[^\[\]*+?()|^$\\]+)\[(?P<parts>\w+(?:,\s*\w+)*)\]")


def split_parts(pattern: str) -> tuple[str, tuple[str, ...]]:
    """ "c_attn[q,v]" → ("c_attn", ("q", "v")); a name without brackets has no parts."""
    match = FUSED.fullmatch(pattern)
    if match is None:
        return pattern, ()
    return match["name"], tuple(part.strip() for part in match["parts"].split(","))


def matches_name(path: str, name: str) -> bool:
    """True where `name` is the module's path or the end of it after a dot."""
    return path == name or path.endswith("." + name)


def check_expressions(expressions: Iterable[str], field: str) -> None:
    """Raise a ConfigError that names the field for what is no regular expression, or one that has no bounds."""
    _table(tuple(expressions), field)


@lru_cache(maxsize=64)
def _table(expressions: tuple[str, ...], field: str) -> Table:
    try:
        return Table(expressions)
    except ValueError as error:
        wrong = next((one for one in expressions if _fault(one)), expressions[0])
        text = f"{field}={short(repr(wrong), 200)} is not a regular expression that can be read: {error}"
        raise ConfigError(text) from None


def _fault(expression: str) -> bool:
    try:
        Table([expression])
    except ValueError:
        return True
    return False


def _first(path: str, expressions: tuple[str, ...], field: str, *, whole: bool) -> int | None:
    """The number of the first expression that means the path, or the end of it where not `whole`."""
    try:
        return _table(expressions, field).first(path, whole=whole)
    except ValueError as error:
        raise ConfigError(f"{field}={short(repr(expressions[0]), 200)}: {error}") from None


def matches(path: str, patterns: str | Sequence[str], field: str) -> bool:
    """A string is one regex for the whole path; a sequence holds names, exact or as suffixes."""
    if isinstance(patterns, str):
        return _first(path, (patterns,), field, whole=True) is not None
    return any(matches_name(path, name) for name in patterns)


def layer_index(path: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number of the outermost layer around the module: `layers.3.experts.0.` → 3.

    `layers_pattern` names the list to count in, where the first numbered one is not meant.
    """
    lists = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    parts = path.split(".")
    for end in range(1, len(parts) - 1):
        number = parts[end]
        if not (number.isdecimal() and len(number) < 10):
            continue
        if not lists or any(matches_name(".".join(parts[:end]), name) for name in lists):
            return int(number)
    return None


def pattern_value(path: str, table: Mapping[str, Value], default: Value, field: str) -> Value:
    """The value of the first key of `table` that is a regex for the end of the path, else `default`."""
    keys = tuple(table)
    number = _first(path, keys, field, whole=False) if keys else None
    return default if number is None else table[keys[number]]


def check_patterns(field: str, keys: Iterable[str], paths: Collection[str]) -> None:
    """Raise TargetError for the first key that, as `pattern_value` reads it, means none of the paths."""
    keys = tuple(keys)
    used = {_first(path, keys, field, whole=False) for path in paths} if keys else set()
    for number, key in enumerate(keys):
        if number not in used and all(_first(path, (key,), field, whole=False) is None for path in paths):
            raise TargetError(f"{field}: {quoted(key)} matches no target{suggestion(key, paths)}")


def nearest(name: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The module names most like `name`: full paths for a dotted name, last parts otherwise."""
    tails = name.count(".") + 1
    candidates = sorted({".".join(path.split(".")[-tails:]) for path in paths if path})
    return get_close_matches(name, candidates, n=count, cutoff=0.5)


def suggestion(name: str, paths: Iterable[str]) -> str:
    """The end of an error sentence: the nearest names, or nothing."""
    close = nearest(name, paths)
    return f" (nearest: {', '.join(close)})" if close else ""
