"""A base model as files: its weight files, their tensors, its config, and what lies beside them."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowrank.errors import CheckpointError, quoted, some
from lowrank.files.json_file import read_object
from lowrank.files.safetensors import Entry, read_layout
from lowrank.hub import local_folder, origin
from lowrank.modelfiles.forms import find_forms
from lowrank.modelfiles.tensors import Shard, Source

SINGLE = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHER_WEIGHTS = (".safetensors", *PICKLES, ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot")


__all__ = ["BaseFiles", "Shard", "Source", "inside", "read_base", "read_json"]


@dataclass(frozen=True, eq=False)
class BaseFiles:
    """A checkpoint of safetensors files.

    folder: as given, symbolic links resolved; shards: in the order of their names; index: the index file of a sharded
    checkpoint, as it is; config: the content of config.json, None where there is none.
    """

    folder: Path
    shards: tuple[Shard, ...]
    index_name: str | None
    index: dict[str, Any] | None
    config: dict[str, Any] | None

    @cached_property
    def tensors(self) -> dict[str, tuple[Shard, Entry]]:
        """{name: (its shard, its entry)} of the model's weights, in the order of files and offsets.

        A quantised weight is one tensor (a `StoredEntry`), of the shape and dtype that it is read in.
        """
        sources = {name: Source(*place) for name, place in self.in_files.items()}
        return {name: (found.shard, found.entry) for name, found in find_forms(sources, self.config).items()}

    @cached_property
    def in_files(self) -> dict[str, tuple[Shard, Entry]]:
        """The same, tensor by tensor as the files have them: a quantised weight is several."""
        return {entry.name: (shard, entry) for shard in self.shards for entry in shard.layout.entries}

    @property
    def label(self) -> str:
        """What messages and the card call it: the folder's name, or in the Hub's cache the model's; no path."""
        found = origin(self.folder)
        return found.repo if found else self.folder.name


def read_base(base: str | os.PathLike[str]) -> BaseFiles:
    """The checkpoint in the folder `base`, the one weight file `base`, or that of the model `base` on the Hub.

    Every header and the index are checked.

    Raises CheckpointError: no such folder, no safetensors weights (pickled ones are not read), an index that names what
    is not there, a tensor in two files, a damaged file, a link that leads out of the folder.
    """
    path = local_folder(base)
    if not path.exists():
        raise CheckpointError(f"there is no model at {path}: give a folder with config.json and *.safetensors files")
    folder = Path(os.path.realpath(path if path.is_dir() else path.parent))
    index_name, index, names = (None, None, [path.name]) if path.is_file() else _weight_files(folder)
    shards = tuple(_shard(folder, name) for name in names)
    _check_unique(folder, shards)
    if index is not None:
        _check_index(folder / str(index_name), index, shards)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    files = BaseFiles(folder, shards, index_name, index, config)
    _ = files.tensors  # forms whose parts do not fit are said here
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the base; CheckpointError where it is none."""
    path = inside(path.parent, path.name)
    try:
        return read_object(path, "copy the model again")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def inside(folder: Path, name: str) -> Path:
    """The real path of a file of the folder.

    Links may lead within the folder and, in a Hub cache, from `snapshots/REVISION` to `blobs`; a link to anywhere else
    could bring any file of the machine into the result, and is a CheckpointError.
    """
    real, folder = Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder))
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not real.is_relative_to(folder) and not real.is_relative_to(blobs):
        raise CheckpointError(f"{folder / name} is a link out of the model's folder: put the file itself there")
    return real


def _weight_files(folder: Path) -> tuple[str | None, dict[str, Any] | None, list[str]]:
    """(index file, its content, weight files), chosen as transformers does: one file before an index before a guess."""
    names = sorted(entry.name for entry in folder.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    indices = [name for name in names if name.endswith(INDEX_ENDING)]
    if SINGLE in weights:
        return None, None, [SINGLE]
    if len(indices) == 1:
        index = read_json(folder / indices[0])
        return indices[0], index, _named_files(folder / indices[0], index)
    if len(weights) == 1 and not indices:
        return None, None, weights
    if indices or weights:
        found = some(indices or weights)
        raise CheckpointError(f"{folder} holds several models ({found}): give the path of one file, or leave one there")
    raise CheckpointError(_without_weights(folder, names))


def _without_weights(folder: Path, names: list[str]) -> str:
    pickled = [name for name in names if name.endswith(PICKLES)]
    if "adapter_config.json" in names:
        return f"{folder} is an adapter, not a base model: give the model it was trained on"
    if pickled:
        return (
            f"{folder} has its weights only as pickles ({some(pickled)}), which can run code when they are "
            f"read: make a safetensors copy with `lowrank convert --source {folder} --to safetensors --allow-pickle "
            "--out NEW`, which reads them with weights_only in a process of its own, and merge into that"
        )
    return f"{folder} holds no *.safetensors file, so it has no weights to read"


def _named_files(path: Path, index: dict[str, Any]) -> list[str]:
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files: copy the model again")
    files = sorted(set(table.values()))
    for name in files:
        if name != os.path.basename(name) or not name.endswith(".safetensors") or not name.isprintable():
            raise CheckpointError(f"{path} names the weight file {quoted(name)}, which is no file of its folder")
    if missing := [name for name in files if not (path.parent / name).is_file()]:
        raise CheckpointError(f"{path} names {some(missing)}, which is not there: download the model again")
    return files


def _shard(folder: Path, name: str) -> Shard:
    path = inside(folder, name)
    if not path.is_file():
        raise CheckpointError(f"{folder / name} is no file")
    return Shard(name, path, read_layout(path))


def _check_unique(folder: Path, shards: tuple[Shard, ...]) -> None:
    owners: dict[str, str] = {}
    for shard in shards:
        for entry in shard.layout.entries:
            if entry.name in owners:
                raise CheckpointError(
                    f"{folder}: {quoted(entry.name)} is in {owners[entry.name]} and again in {shard.name}: which one "
                    "is meant cannot be known"
                )
            owners[entry.name] = shard.name


def _check_index(path: Path, index: dict[str, Any], shards: tuple[Shard, ...]) -> None:
    present = {shard.name: {entry.name for entry in shard.layout.entries} for shard in shards}
    lost = [name for name, file in index["weight_map"].items() if name not in present[file]]
    if lost:
        raise CheckpointError(
            f"{path} places {some(map(repr, lost), 1)} in a file that does not hold it: download the model again"
        )
