"""Saving an adapter of a model in PEFT's format."""

import os
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from lowrank.checkpoint import companion, config_file
from lowrank.checkpoint.atomic import write_folder
from lowrank.checkpoint.one_scale import Scales
from lowrank.checkpoint.peft_rules import TRIED, peft_faults
from lowrank.checkpoint.read import SAFETENSORS
from lowrank.checkpoint.written import adapter_files
from lowrank.core.shards import is_sharded
from lowrank.errors import CheckpointError, LowrankWarning
from lowrank.injection.adapters import lora_layers
from lowrank.injection.saving import adapter_state
from lowrank.injection.state import require_adapter, unwrapped
from lowrank.layers.stack import LoraStack

# What PEFT and the Hub put into an adapter's folder besides the three files that are written here.
USUAL = frozenset({"README.md", ".gitattributes", ".git", "adapter_model.bin"})


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    beside: Collection[str] = (),
    scales: Scales = "one",
) -> None:
    """Write one adapter of `model` to `folder`, in PEFT's format.

    Every module's factors are written as the one pair (A, B) with ΔW = s·B·A over the whole weight: parts of a fused
    projection padded with zeros, start factors (PiSSA, OLoRA) stacked as [A; A_start], [B, −B_start]. So PEFT loads the
    adapter onto the unchanged base. `adapter_config.json` says s as lora_alpha/r of the largest rank r (with rsLoRA
    too), and by patterns each module's own rank R and alpha = s·R; `adapter_model.safetensors` keeps the factors'
    dtype; `lowrank.json` holds a fingerprint of the base and what it takes to have the same factors again. Same model,
    same bytes. All three files change in one step, or not at all (`checkpoint.atomic` says exactly what is guaranteed).

    scales: "one", so that who reads r and lora_alpha and no patterns (vLLM before 0.32) computes every ΔW too: where
    modules differ in s, B takes the quotient (`checkpoint.one_scale` says how exactly), and loading divides it out
    again, bit for bit where the quotients are powers of two. "own": every B as it is, and s in the patterns alone.

    A model in DDP's or torch.compile's wrapper is saved as itself. Where FSDP2 shards the adapter, every process has to
    call this, and the first one writes. Warns (LowrankWarning) where PEFT would refuse or turn the adapter's modules.

    beside: names of other files and folders that may lie in `folder` (a training run's); they are left alone.

    Raises LowrankError for an unknown adapter, and CheckpointError for a folder that holds something else, tensors that
    are empty (sharded and not gathered), on the meta device or not finite, and files that cannot be written.
    """
    model, folder = unwrapped(model), Path(folder)
    require_adapter(model, adapter_name)
    check_folder(folder, {*USUAL, *beside})
    warn_of_peft(model, [adapter_name])
    files = adapter_files(model, adapter_name, scales)
    if not any(is_sharded(tensor) for tensor in adapter_state(model).values()):
        write_folder(folder, files)
        return
    if torch.distributed.get_rank() == 0:
        write_folder(folder, files)
    torch.distributed.barrier()


def warn_of_peft(model: nn.Module, adapters: Iterable[str]) -> None:
    """Warn (LowrankWarning) where PEFT would not load one of these adapters as it is meant."""
    for name in adapters:
        layers = [(path, layer) for path, layer in lora_layers(model) if name in layer.adapter_names]
        faults = peft_faults(model, [path for path, layer in layers if not isinstance(layer, LoraStack)])
        if any(isinstance(layer, LoraStack) and layer.factors(name).magnitude is not None for _, layer in layers):
            faults.append("it refuses DoRA (use_dora) on stacked experts")
        if faults:
            warnings.warn(
                f"adapter {name!r} is for lowrank alone: {TRIED} does not load it, since {'; '.join(faults)}",
                LowrankWarning,
                stacklevel=3,
            )


def check_folder(folder: Path, allowed: Collection[str]) -> None:
    """Raise CheckpointError where `folder` is in use for something that is not an adapter."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder to save the adapter in")
    if not folder.exists() or (folder / config_file.NAME).exists():
        return
    names = {SAFETENSORS, companion.NAME, *allowed}
    strange = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.name not in names and not entry.name.endswith(".tmp") and not (entry / config_file.NAME).exists()
    )
    if strange:
        raise CheckpointError(
            f"{folder} holds something that is no adapter ({', '.join(strange[:5])}{', ...' if strange[5:] else ''}): "
            "give an empty or a new folder"
        )


__all__ = ["check_folder", "save_adapter"]
