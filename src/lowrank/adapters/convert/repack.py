"""PEFT's format to PEFT's format: the same tensors and the same config, bit for bit, in the other kind of file."""

import io
from pathlib import Path
from typing import cast

import torch

from lowrank.adapters.convert.options import ConvertOptions
from lowrank.adapters.convert.sound import ready
from lowrank.checkpoint import config_file
from lowrank.checkpoint.atomic import write_folder
from lowrank.checkpoint.read import PICKLE, SAFETENSORS, read_adapter, read_pickle, read_safetensors
from lowrank.files.regular import read_bytes


def to_safetensors(source: Path, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    """The adapter in `source` with its weights as safetensors; a dtype in the options is applied."""
    return _repack(source, out, options, SAFETENSORS)


def to_pickle(source: Path, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    """The adapter in `source` with its weights as the `adapter_model.bin` that PEFT before 0.6 reads."""
    return _repack(source, out, options, PICKLE)


def _repack(source: Path, out: Path, options: ConvertOptions, name: str) -> tuple[str, ...]:
    files = read_adapter(source, options.allow_pickle)
    pickled = not (source / SAFETENSORS).is_file()
    tensors = read_pickle(source / PICKLE) if pickled else read_safetensors(source / SAFETENSORS)
    cast = ready(tensors, options.dtype, out)
    content = {name: _safetensors(cast) if name == SAFETENSORS else pickle_bytes(cast)}
    for other in (config_file.NAME, "lowrank.json", "README.md"):
        if (source / other).is_file():
            content[other] = bytes(read_bytes(source / other))
    write_folder(out, content)
    return (f"{len(files.low_rank)} modules, tensors and config as they were",)


def _safetensors(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return cast(bytes, save({key: tensor.clone() for key, tensor in tensors.items()}, metadata={"format": "pt"}))


def pickle_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """What torch.save would write."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()
