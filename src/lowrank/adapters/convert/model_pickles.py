"""A model whose weights are pickles, rewritten as safetensors by a process of its own.

Unpickling even with weights_only=True runs code that was not written for hostile files. So the
`.bin` files are read by a Python process of their own, whose end is not ours; what it wrote is then read as data.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.adapters.convert.options import ConvertOptions
from lowrank.checkpoint.atomic import sync
from lowrank.errors import CheckpointError, OutputError
from lowrank.files.json_file import parse_json
from lowrank.modelfiles.base import read_json
from lowrank.modelfiles.staging import staging

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
WORKER = "lowrank.adapters.convert.unpickle"
NOT_WRITTEN = 3  # its status where the disk took no result
WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".safetensors")


def has_pickles(folder: Path) -> bool:
    """True for the folder of a model with `pytorch_model.bin`, whole or in shards."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def unpickle_model(source: Path, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    """Write to `out` the model in `source` with safetensors weights, and all that lies beside them.

    The folder appears as a whole or not at all. Raises CheckpointError where pickles are not allowed, a shard is
    missing or damaged, or one holds more than tensors.
    """
    if not options.allow_pickle:
        raise CheckpointError(
            f"{source} has its weights as pickles: if you trust where they came from, allow it (allow_pickle=True, "
            "--allow-pickle), and they are read with torch.load(weights_only=True) in a process of its own"
        )
    if any(source.glob("*.safetensors")):
        raise CheckpointError(f"{source} has its weights as safetensors already: there is nothing to convert")
    if options.dtype is not None:
        raise CheckpointError("a model keeps its dtype when it is converted: leave the dtype out")
    with staging(out) as folder:
        files = _convert_shards(source, folder, out)
        _copy_rest(source, folder)
        for path in folder.iterdir():
            sync(path)
    return (f"{files} weight files rewritten as safetensors",)


def _convert_shards(source: Path, folder: Path, out: Path) -> int:
    """Write the weights to `folder`, which will be `out`; the number of their files."""
    if (source / SINGLE).is_file():
        _unpickle({source / SINGLE: folder / "model.safetensors"}, out)
        return 1
    index = read_json(source / INDEX)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not all(_is_shard(source, name) for name in table.values()):
        raise CheckpointError(f"{source / INDEX} names files that are not there: copy the model again")
    renamed = {name: _renamed(name) for name in sorted(set(table.values()))}
    names = _unpickle({source / name: folder / new for name, new in renamed.items()}, out)
    places = {tensor: new for new, tensors in zip(renamed.values(), names, strict=True) for tensor in tensors}
    content: dict[str, Any] = {**index, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
    return len(renamed)


def _is_shard(source: Path, name: object) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and (source / name).is_file()


def _renamed(name: str) -> str:
    """pytorch_model-00001-of-00002.bin → model-00001-of-00002.safetensors"""
    return name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def _unpickle(places: Mapping[Path, Path], out: Path) -> list[list[str]]:
    """Have every pickle rewritten as a safetensors file by another process; the names of their tensors."""
    arguments = [os.fspath(path) for pair in places.items() for path in pair]
    done = subprocess.run([sys.executable, "-m", WORKER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["the process that read it ended without a word"])[-1]
        if done.returncode == NOT_WRITTEN:
            raise OutputError(f"{out}: cannot be written ({reason})")
        raise CheckpointError(f"{next(iter(places)).parent} cannot be converted: {reason}")
    names: list[list[str]] = parse_json(done.stdout)
    return names


def _copy_rest(source: Path, out: Path) -> None:
    """Everything beside the weights: config, tokenizer, templates."""
    for entry in sorted(source.iterdir()):
        if entry.is_file() and not entry.name.endswith((*WEIGHTS, ".index.json")):
            shutil.copyfile(entry, out / entry.name)
