"""JSON that somebody else wrote, within bounds: of the file's size, of depth, and of the digits of a number.

Python's own parser takes numbers of 4,300 digits, which no float holds, and brackets nested until its recursion ends.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank.errors import CheckpointError
from lowrank.files.regular import read_bytes

MOST = 32_000_000  # bytes: the index of a model with 100,000 tensors has 10 million
DEEPEST = 64  # brackets in brackets
DIGITS = 300  # of a whole number: fewer than the largest float has

LONG, LONG_BYTES = re.compile(f"[0-9]{{{DIGITS + 1}}}"), re.compile(b"[0-9]{%d}" % (DIGITS + 1))

Pairs = Callable[[list[tuple[str, Any]]], Any]


def read_object(path: Path, remedy: str, most: int = MOST) -> dict[str, Any]:
    """The JSON object in a file. remedy: what to do where there is none, the end of the error's sentence.

    Raises OSError where the file cannot be opened and CheckpointError, naming it, for anything but a JSON object.
    """
    try:
        content = parse_json(read_bytes(path, most))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: {remedy}")
    return content


def parse_json(text: bytes | bytearray | str, pairs: Pairs | None = None) -> Any:
    """The value. pairs: what makes an object of its (name, value) pairs.

    Raises ValueError for what is no JSON, or out of bounds.
    """
    try:
        whole = _whole if _may_be_long(text) else None  # a call for each of a million numbers takes a second
        value = json.loads(text, parse_int=whole, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    except MemoryError:
        raise ValueError("too large for this machine's memory") from None
    if _brackets(text) > DEEPEST and _depth(value) > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    return value


def _brackets(text: bytes | bytearray | str) -> int:
    if isinstance(text, str):
        return text.count("[") + text.count("{")
    return text.count(b"[") + text.count(b"{")


def _may_be_long(text: bytes | bytearray | str) -> bool:
    if isinstance(text, str):
        return LONG.search(text) is not None
    return LONG_BYTES.search(text) is not None or b"\0" in text[:4]  # UTF-16 and UTF-32 part the digits


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _depth(value: Any) -> int:
    """How many lists and objects lie in each other, as far as DEEPEST + 1."""
    level, deep = [value], 0
    while deep <= DEEPEST:
        inner = [item for item in level if isinstance(item, dict | list)]
        if not inner:
            return deep
        level = [item for outer in inner for item in (outer.values() if isinstance(outer, dict) else outer)]
        deep += 1
    return deep
