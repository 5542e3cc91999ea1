"""`lowrank.json`: what PEFT's files cannot say. PEFT and vLLM do not look at it, and without it an adapter still loads.

    {"format": 1,
     "base":  {"architecture": ..., "config_sha256": ..., "shapes": {path: [..]}},
     "fused": {path: {"names": ["q", "v"], "rows": [[start, width, stride, count], ...]}},
     "start": [path, ...],
     "scales": {path: s},
     "stored": {"form": ..., "dtype": ..., "block": 64, "probe": {path: [..]}, "plain": [path, ...],
                "rest": [path, ...]}}

fused: modules of which only some rows are adapted, which the weights file holds padded with zeros.
start: modules whose file factors are [A; A_start] and [B, −B_start], because training did not start at ΔW = 0.
scales: the s of modules that the config gives another one, so that their B took the quotient (`checkpoint.one_scale`).
stored: in which form the base was held in training (`checkpoint.stored_base`), where that was a quantised one.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lowrank.checkpoint.fingerprint import Fingerprint
from lowrank.checkpoint.stored_base import StoredBase
from lowrank.core.rows import RowBlock
from lowrank.errors import CheckpointError, short
from lowrank.files.json_file import read_object
from lowrank.files.names import is_name

Kind = TypeVar("Kind")
NAME = "lowrank.json"
FORMAT = 1
DTYPES = ("float16", "bfloat16", "float32", "float64")  # in which a stored form can be read
BLOCKS = range(1, 2**20)
MOST_PARTS = 1000  # of one fused projection; q, k and v are three


@dataclass(frozen=True, slots=True)
class Fused:
    """The adapted parts of a fused projection: their names, where they are known, and their rows."""

    names: tuple[str, ...]
    parts: tuple[RowBlock, ...]


@dataclass(frozen=True, slots=True)
class Companion:
    """The content of `lowrank.json`; an adapter of another maker has none, and an empty one says the same."""

    base: Fingerprint | None = None
    fused: dict[str, Fused] = field(default_factory=dict)
    start: frozenset[str] = frozenset()
    scales: dict[str, float] = field(default_factory=dict)
    stored: StoredBase | None = None

    def to_bytes(self) -> bytes:
        """The file's content: same value, same bytes."""
        base = self.base
        content = {
            "format": FORMAT,
            "base": base
            and {"architecture": base.architecture, "config_sha256": base.config_sha256, "shapes": base.shapes},
            "fused": {
                path: {"names": fused.names, "rows": [[p.start, p.width, p.stride, p.count] for p in fused.parts]}
                for path, fused in self.fused.items()
            },
            "start": sorted(self.start),
            "scales": self.scales,
        } | ({} if self.stored is None else {"stored": self.stored.as_json()})
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def read_companion(folder: Path) -> Companion:
    """The companion of the adapter in `folder`, empty where there is none.

    Raises CheckpointError for a damaged file or one of a later format.
    """
    path = folder / NAME
    if not path.exists():
        return Companion()
    remedy = "upgrade lowrank if a later version wrote it, or delete it to load the adapter as any other PEFT adapter"
    content = read_object(path, remedy)
    try:
        return _parse(content)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {remedy}") from error


def _parse(content: dict[str, Any]) -> Companion:
    number = _checked(content.get("format"), int, "format")
    if number > FORMAT:
        raise ValueError(f"it has format {number}, this version reads up to {FORMAT}")
    base, fused = content.get("base"), _table(content.get("fused"), "fused")
    return Companion(
        None if base is None else _fingerprint(_table(base, "base")),
        {path: _fused(_table(entry, "fused")) for path, entry in fused.items()},
        frozenset(_items(content.get("start"), str, "start")),
        {path: _number(scale) for path, scale in _table(content.get("scales", {}), "scales").items()},
        None if content.get("stored") is None else _stored(_table(content["stored"], "stored")),
    )


def _stored(stored: dict[str, Any]) -> StoredBase:
    probe = {
        path: tuple(_number(number) for number in _checked(numbers, list, "probe"))
        for path, numbers in _table(stored.get("probe"), "probe").items()
    }
    dtype = _checked(stored.get("dtype"), str, "dtype")
    if dtype not in DTYPES:
        raise ValueError(f"its stored form is read in {short(dtype, 40)!r}, which is none of {', '.join(DTYPES)}")
    block = stored.get("block")
    if block is not None and _checked(block, int, "block") not in BLOCKS:
        raise ValueError(f"{block} numbers cannot share a scale in any form")
    plain, rest = (tuple(_items(stored.get(key, []), str, key)) for key in ("plain", "rest"))
    return StoredBase(short(_checked(stored.get("form"), str, "form"), 80), dtype, probe, block, plain, rest)


def _fingerprint(base: dict[str, Any]) -> Fingerprint:
    shapes = {path: _items(shape, int, "shapes") for path, shape in _table(base.get("shapes"), "shapes").items()}
    digest = base.get("config_sha256")
    digest = None if digest is None else _checked(digest, str, "config_sha256")
    return Fingerprint(_checked(base.get("architecture"), str, "architecture"), digest, shapes)


def _fused(entry: dict[str, Any]) -> Fused:
    given = _items(entry.get("rows"), list, "rows")
    if len(given) > MOST_PARTS:
        raise ValueError(f"its rows are {len(given):,} parts of one projection")
    rows = [_items(row, int, "rows") for row in given]
    if any(len(row) != 4 for row in rows):
        raise ValueError("its rows are not start, width, stride and count")
    return Fused(tuple(_items(entry.get("names"), str, "names")), tuple(RowBlock(*row) for row in rows))


def _checked(value: object, kind: type[Kind], where: str) -> Kind:
    """The value, which must be of this very kind: true is no number."""
    if type(value) is not kind:
        raise ValueError(f"its {where} holds {short(repr(value), 80)}")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"its scales hold {short(repr(value), 80)}")
    return float(value)


def _table(value: object, where: str) -> dict[str, Any]:
    table: dict[str, Any] = _checked(value, dict, where)
    if strange := [name for name in table if not (is_name(name) or name == "")]:
        raise ValueError(f"its {where} names {short(repr(strange[0]), 80)}")
    return table


def _items(value: object, kind: type[Kind], where: str) -> list[Kind]:
    return [_checked(item, kind, where) for item in _checked(value, list, where)]
