"""Reading the adapters that loralib, the paper's own code, saves: one `.bin` with keys `<module>.lora_A`, no config.

A plain layer has A (r, k) and B (d, r). A MergedLinear, a fused projection of which n parts are adapted, has the A of
its parts stacked, (n·r, k), and their B too, (Σ d_i, r). In both s = alpha/r (github.com/microsoft/LoRA, layers.py).
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lowrank.checkpoint.companion import Companion, Fused
from lowrank.checkpoint.config_file import AdapterConfig
from lowrank.checkpoint.describe import describe
from lowrank.checkpoint.keys import EMBEDDING_A, EMBEDDING_B, A, B
from lowrank.checkpoint.load import load_files
from lowrank.checkpoint.read import AdapterFiles, read_pickle, read_safetensors, sort_tensors
from lowrank.checkpoint.renaming import find_renaming
from lowrank.checkpoint.report import LoadReport
from lowrank.core.factors import LoraFactors
from lowrank.errors import CheckpointError
from lowrank.injection.apply import check_new_name
from lowrank.injection.config import LoraConfig
from lowrank.injection.fused import part_rows
from lowrank.injection.state import unwrapped
from lowrank.injection.targets import named_targets
from lowrank.layers.base import dimensions
from lowrank.layers.kinds import kind_of

Pair = dict[str, Tensor]


def load_loralib(
    model: nn.Module,
    file: str | os.PathLike[str],
    alpha: float,
    adapter_name: str = "default",
    parts: tuple[str, ...] = ("q", "v"),
    trainable: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """In place: give `model` the adapter that loralib saved in `file`.

    alpha: the lora_alpha it was trained with, which the file does not tell; parts: which parts of a fused projection
    its MergedLinear layers adapt (enable_lora), in order. Tensors that are no factors (a classifier, biases) are loaded
    in full. Otherwise as `load_adapter`; a `.bin` is a pickle, read by torch.load(weights_only=True) if allow_pickle.

    Raises CheckpointError with the model as it was; TargetError where a fused projection's rows cannot be known.
    """
    model = unwrapped(model)
    check_new_name(model, adapter_name)
    if isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"alpha must be the finite number the adapter was trained with, not {alpha!r}")
    return load_files(model, _read(model, Path(file), alpha, parts, allow_pickle), adapter_name, trainable)


def _read(model: nn.Module, file: Path, alpha: float, parts: tuple[str, ...], allow_pickle: bool) -> AdapterFiles:
    """The file as if PEFT had saved it: one pair (A, B) for a whole weight, fused ones padded with zeros."""
    low_rank, full = sort_tensors(_tensors(file, allow_pickle), file)
    modules = named_targets(model)
    rename = find_renaming([*low_rank, *(key.path for key in full)], {"", *modules})
    pairs: dict[str, Pair] = {}
    scales: dict[str, float] = {}
    fused: dict[str, Fused] = {}
    for path, tensors in low_rank.items():
        _check(path, tensors, file)
        scales[path] = alpha / tensors[B].shape[1]
        module = modules.get(rename(path))
        if module is not None and tensors[A].shape[0] != tensors[B].shape[1]:
            fused[path] = _parts(model, rename(path), module, tensors, parts)
        pairs[path] = _pair(module, tensors, fused.get(path))
    ranks = describe({path: (next(iter(p.values())).shape[0], scales[path]) for path, p in pairs.items()}, rslora=False)
    config = AdapterConfig(LoraConfig(**ranks._asdict()), (), {})
    return AdapterFiles(file, config, pairs, full, Companion(fused=fused))


def _tensors(file: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    if not allow_pickle:
        raise CheckpointError(
            f"{file} is a pickle: if you trust where it came from, pass allow_pickle=True, "
            "which reads it with torch.load(weights_only=True)"
        )
    return read_pickle(file)


def _check(path: str, tensors: Mapping[str, Tensor], file: Path) -> None:
    if set(tensors) != {A, B} or any(tensor.ndim != 2 or tensor.numel() == 0 for tensor in tensors.values()):
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(tensors.items()))
        raise CheckpointError(f"{file}: {path} has {shapes}, wanted matrices lora_A and lora_B")


def _parts(
    model: nn.Module, path: str, module: nn.Module, tensors: Mapping[str, Tensor], names: tuple[str, ...]
) -> Fused:
    stacked, rank = tensors[A].shape[0], tensors[B].shape[1]
    kind = kind_of(module)
    if kind is None or stacked != rank * len(names):
        raise CheckpointError(
            f"{path}: lora_A has {stacked} rows and lora_B rank {rank}, which is no stack of the {len(names)} parts "
            f"{', '.join(names)}: give the parts that were adapted (enable_lora)"
        )
    rows = part_rows(path, dimensions(kind, module)[0], names, getattr(model, "config", None))
    if (total := sum(part.size for part in rows)) != tensors[B].shape[0]:
        raise CheckpointError(f"{path}: lora_B has {tensors[B].shape[0]} rows, and {', '.join(names)} have {total}")
    return Fused(names, rows)


def _pair(module: nn.Module | None, tensors: Mapping[str, Tensor], fused: Fused | None) -> Pair:
    a, b = tensors[A], tensors[B]
    if fused is not None and module is not None:
        kind = kind_of(module)
        assert kind is not None
        b = LoraFactors(a, b, 1.0, parts=fused.parts, out_features=dimensions(kind, module)[0]).full_b(b)
    if isinstance(module, nn.Embedding):
        return {EMBEDDING_A: a, EMBEDDING_B: b}
    return {A: a, B: b}
