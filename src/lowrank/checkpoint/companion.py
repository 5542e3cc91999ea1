"""`lowrank.json`: what PEFT's files cannot say. PEFT and vLLM do not look at it, and without it an adapter still loads.

    {"format": 1,
     "base":  {"architecture": ..., "config_sha256": ..., "shapes": {path: [..]}},
     "fused": {path: {"names": ["q", "v"], "rows": [[start, width, stride, count], ...]}},
     "start": [path, ...],
     "scales": {path: s}}

fused: modules of which only some rows are adapted, which the weights file holds padded with zeros.
start: modules whose file factors are [A; A_start] and [B, −B_start], because training did not start at ΔW = 0.
scales: the s of modules that the config gives another one, so that their B took the quotient (`checkpoint.one_scale`).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.checkpoint.fingerprint import Fingerprint
from lowrank.core.rows import RowBlock
from lowrank.errors import CheckpointError

NAME = "lowrank.json"
FORMAT = 1


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
        }
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def read_companion(folder: Path) -> Companion:
    """The companion of the adapter in `folder`, empty where there is none.

    Raises CheckpointError for a damaged file or one of a later format.
    """
    path = folder / NAME
    if not path.is_file():
        return Companion()
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise ValueError("it does not say its format")
        if content["format"] > FORMAT:
            raise ValueError(f"it has format {content['format']}, this version reads up to {FORMAT}")
        return _parse(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): upgrade lowrank if a later version wrote it, "
            "or delete it to load the adapter as any other PEFT adapter"
        ) from error


def _parse(content: dict[str, Any]) -> Companion:
    base = content["base"]
    fused = {
        str(path): Fused(tuple(map(str, entry["names"])), tuple(RowBlock(*map(int, row)) for row in entry["rows"]))
        for path, entry in content["fused"].items()
    }
    shapes = {str(path): [int(n) for n in shape] for path, shape in base["shapes"].items()} if base else {}
    return Companion(
        base and Fingerprint(str(base["architecture"]), base["config_sha256"], shapes),
        fused,
        frozenset(map(str, content["start"])),
        {str(path): float(scale) for path, scale in content.get("scales", {}).items()},
    )
