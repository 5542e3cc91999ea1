"""Which module names a pattern means, with PEFT's semantics, and what was probably meant when it means none."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

from lowrank.errors import ConfigError, TargetError

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


def compile_regex(pattern: str, field: str) -> re.Pattern[str]:
    """The regex, or a ConfigError that names the field."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{field}={pattern!r} is not a regular expression: {error}") from None


def matches(path: str, patterns: str | Sequence[str], field: str) -> bool:
    """A string is one regex for the whole path; a sequence holds names, exact or as suffixes."""
    if isinstance(patterns, str):
        return compile_regex(patterns, field).fullmatch(path) is not None
    return any(matches_name(path, name) for name in patterns)


def layer_index(path: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number of the outermost layer around the module: `layers.3.experts.0.` → 3.

    `layers_pattern` names the list to count in, where the first numbered one is not meant.
    """
    names = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    for regex in [rf"(?:.*?\.)?{name}\.(\d+)\." for name in names] or [r"(?:.*?\.)?[^.]*\.(\d+)\."]:
        if match := re.match(regex, path):
            return int(match[1])
    return None


def pattern_value(path: str, table: Mapping[str, Value], default: Value, field: str) -> Value:
    """The value of the first key of `table` that is a regex for the end of the path, else `default`."""
    for key, value in table.items():
        if compile_regex(rf"(.*\.)?({key})$", field).match(path):
            return value
    return default


def check_patterns(field: str, keys: Iterable[str], paths: Collection[str]) -> None:
    """Raise TargetError for the first key that, as `pattern_value` reads it, means none of the paths."""
    for key in keys:
        regex = compile_regex(rf"(.*\.)?({key})$", field)
        if not any(regex.match(path) for path in paths):
            raise TargetError(f"{field}: {key!r} matches no target{suggestion(key, paths)}")


def nearest(name: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The module names most like `name`: full paths for a dotted name, last parts otherwise."""
    tails = name.count(".") + 1
    candidates = sorted({".".join(path.split(".")[-tails:]) for path in paths if path})
    return get_close_matches(name, candidates, n=count, cutoff=0.5)


def suggestion(name: str, paths: Iterable[str]) -> str:
    """The end of an error sentence: the nearest names, or nothing."""
    close = nearest(name, paths)
    return f" (nearest: {', '.join(close)})" if close else ""
