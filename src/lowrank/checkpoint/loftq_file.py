"""`loftq.safetensors`: what LoftQ's further rounds took off W0 before the base was quantised, beside the adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from lowrank.errors import CheckpointError
from lowrank.files.safetensors import read_tensors

NAME = "loftq.safetensors"  # {path.a: A, path.b: s·B}
Off = tuple[Tensor, Tensor]  # (A (r, k), s·B (d, r))


def write_off(folder: Path, off: Mapping[str, Off]) -> None:
    """Write what was taken off each module, {path: (A, s·B)}, into the adapter's folder; nothing where nothing was."""
    if off:
        (folder / NAME).write_bytes(as_bytes(off))


def as_bytes(off: Mapping[str, Off]) -> bytes:
    """The file's content."""
    from safetensors.torch import save

    tensors = {f"{path}.{name}": t.cpu() for path, pair in off.items() for name, t in zip("ab", pair, strict=True)}
    return cast(bytes, save(tensors, metadata={"format": "pt"}))


def read_off(folder: Path) -> dict[str, Off]:
    """The same again; empty where there is no such file. Raises CheckpointError for one that is damaged."""
    if not (folder / NAME).exists():
        return {}
    tensors = read_tensors(folder / NAME)
    paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    pairs = {path: (tensors.get(f"{path}.a"), tensors.get(f"{path}.b")) for path in paths}
    found = {path: (a, b) for path, (a, b) in pairs.items() if a is not None and b is not None and a.dim() == 2}
    for path in paths:
        if path not in found or found[path][1].shape[1:] != found[path][0].shape[:1]:
            raise CheckpointError(unfit(folder, path))
    return found


def unfit(folder: Path, path: str) -> str:
    """The sentence for a module that what the file has for it does not fit."""
    return f"{folder / NAME} does not fit {path}: copy the adapter again"
