"""`--init loftq` and `loftq_N`: adapters that start from what quantising took off, and the base that N rounds moved.

One round leaves the base as everybody has it, Q(W0), and starts at the best rank-r part of W0 − Q(W0). With more, as in
the paper, the frozen weight is Q(W0 − s·B·A), A and B of the round before: it belongs to this adapter alone. What was
taken off before the last quantising is kept beside the adapter, so that the same base is made again from W0.
"""

import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.checkpoint.loftq_file import Off, read_off, unfit, write_off
from lowrank.checkpoint.stored_base import MOVED
from lowrank.core.init.loftq import loftq, moved, taken_off
from lowrank.core.stored import Stored, requantise
from lowrank.core.stored.of_module import stored_weight
from lowrank.errors import CheckpointError, ConfigError, some
from lowrank.injection.adapters import lora_layers
from lowrank.injection.traversal import base_modules
from lowrank.layers.plain import put_stored
from lowrank.layers.quantised import LoraQuantised
from lowrank.merge.onto import stored_layers
from lowrank.merge.originals import original_weights
from lowrank.stages import stage

INIT = re.compile(r"loftq(?:_([1-9]\d{0,2}))?")


def rounds_of(init: str) -> int:
    """1 of "loftq", N of "loftq_N", 0 of every other start."""
    found = INIT.fullmatch(init)
    return int(found[1] or 1) if found else 0


@torch.no_grad()
def start(model: nn.Module, base: Path, rounds: int) -> int:
    """In place: the adapter `default` starts where LoftQ does after `rounds`. Returns in how many layers.

    base: the folder of the model as numbers, from which W0 is read, one weight at a time.
    """
    layers = {
        path: layer
        for path, layer in lora_layers(model)
        if isinstance(layer, LoraQuantised) and not layer.factors("default").parts
    }
    weights = original_weights(base, layers)
    for number, (path, layer) in enumerate(layers.items()):
        stage("finding LoftQ's start", number, len(layers))
        factors, weight, held = layer.factors("default"), weights(path).float(), layer.held()
        assert isinstance(held, Stored)
        rank, scale = factors.a.shape[0], factors.scale
        if rounds > 1:
            off = taken_off(weight, rank, scale, rounds, partial(_quantised, like=held))
            _move(layer, weight, held, off)
        a, b = loftq(weight - layer.dense(layer).float(), rank, scale)
        factors.a.copy_(a)
        factors.b.copy_(b)
    return len(layers)


def _quantised(matrix: Tensor, like: Stored) -> Tensor:
    return requantise(matrix, like).matrix(torch.float32)


def _move(layer: nn.Module, weight: Tensor, held: Stored, off: Off) -> None:
    """In place: the layer holds Q(W0 − B·A), off = (A, B), and remembers what was taken off."""
    put_stored(layer, moved(weight, held, off))
    layer.__dict__[MOVED] = off


def save_moved(model: nn.Module, folder: Path) -> None:
    """Write what was taken off before the last quantising into the adapter's folder; nothing where nothing was."""
    write_off(folder, {path: m.__dict__[MOVED] for path, m in base_modules(model) if MOVED in m.__dict__})


@torch.no_grad()
def move_base(model: nn.Module, base: Path, adapter: Path) -> None:
    """In place: a base that was just quantised is the one that the adapter's training moved, where it moved it.

    Raises CheckpointError for a file that does not fit, ConfigError where the adapter's layers are not quantised here.
    """
    if not (off := read_off(adapter)):
        return
    layers = {path: layer for path, layer in stored_layers(model).items() if path in off}
    if missing := [path for path in off if path not in layers]:
        raise ConfigError(
            f"{adapter} was trained over four or eight bits that LoftQ moved, and here is not quantised "
            f"{some(missing)}: say --quantise as in the training"
        )
    weights = original_weights(base, layers)
    for path, layer in layers.items():
        weight, (a, b) = weights(path).float(), off[path]
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise CheckpointError(unfit(adapter, path))
        _move(layer, weight, stored_weight(layer), (a.to(weight), b.to(weight)))
