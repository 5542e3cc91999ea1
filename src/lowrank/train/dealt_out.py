"""Whether each of several processes holds a part of the base, and what stays whole: as asked, or as a GPU has room."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.checkpoint.read import open_adapter
from lowrank.core.shards import is_sharded
from lowrank.data.rows import JUDGES, Kind
from lowrank.errors import CheckpointError, ConfigError
from lowrank.modelfiles.base import read_base
from lowrank.train import processes
from lowrank.train.memory import memory_of
from lowrank.train.models import device_of, dtype_of, head_modules, quantiser_in
from lowrank.train.settings import TrainSettings
from lowrank.train.sharding import Whole, is_in_parts

ROOM = 0.9  # of a GPU's memory, for the base; something has to be left for the steps


def is_dealt_out(settings: TrainSettings, base: Path) -> bool:
    """Whether each process is to hold a part: as the settings say, else where a GPU cannot hold the whole.

    Raises ConfigError where the base cannot be in parts, though that is asked for, and for a single process that
    cannot hold it.
    """
    if settings.shard is None:
        return _is_too_large(settings, base)
    if settings.shard and not processes.grouped():
        raise ConfigError(
            "--shard gives each of several processes a part of the base, and this one is alone: start them with "
            "torchrun --nproc-per-node N -m lowrank train ..., or leave it out (--no-shard where the settings say it)"
        )
    if settings.shard and quantiser_in(base):
        raise ConfigError(f"--shard: model {base} is quantised, and such weights are not dealt out; leave --shard out")
    return settings.shard


def _is_too_large(settings: TrainSettings, base: Path) -> bool:
    device = device_of(settings)
    has = memory_of(device)
    if has is None or settings.full or settings.quantise or quantiser_in(base):
        return False
    needs = _size(base) * dtype_of(settings, device).itemsize
    if processes.grouped():
        return needs > ROOM * has
    if needs > has:
        raise ConfigError(
            f"model {settings.model}: its weights take {needs / 1e9:.1f} GB, and {device} has {has / 1e9:.1f}: hold "
            "them in four bits (--quantise nf4), or in parts, one on each of several GPUs (torchrun --nproc-per-node N "
            "-m lowrank train ... --shard)"
        )
    return False


def _size(base: Path) -> int:
    """The numbers in a model's files; 0 where these do not say it."""
    try:
        return sum(math.prod(entry.shape) for _, entry in read_base(base).tensors.values())
    except CheckpointError:
        return 0


def said(settings: TrainSettings, model: nn.Module) -> str:
    """How many processes there are, which part of the base each holds, and why, in words."""
    share = f"{processes.count()}, which share the rows of a step; each holds"
    if not is_in_parts(model):
        return f"{share} the whole base"
    size = sum(p.numel() * p.element_size() for p in model.parameters() if is_sharded(p))
    why = "" if settings.shard else ", more than one GPU has room for"
    return f"{share} a part of the base (FSDP2; {size / 1e9:,.1f} GB in all{why})"


def whole_of(settings: TrainSettings, kind: Kind) -> Whole:
    """What the settings mean to be trained in full of a model for a kind of row."""

    def names(model: Any) -> list[str]:
        found = list(settings.modules_to_save)
        if kind in JUDGES:
            found += [*head_modules(model, ()), "pooler"]  # which may start new
        if settings.trainable_tokens:
            tables = model.get_input_embeddings(), model.get_output_embeddings()
            found += [path for path, module in model.named_modules() if any(module is table for table in tables)]
        if settings.init_from is not None:
            files = open_adapter(settings.init_from, allow_pickle=False)
            found += [*(key.path for key in files.full), *files.rows]
        return found

    return names
