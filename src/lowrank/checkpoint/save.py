"""Saving an adapter of a model in PEFT's format."""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from lowrank.checkpoint import companion, config_file
from lowrank.checkpoint.atomic import write_folder
from lowrank.checkpoint.companion import Companion, Fused
from lowrank.checkpoint.describe import unsaid
from lowrank.checkpoint.fingerprint import fingerprint
from lowrank.checkpoint.keys import MAGNITUDE, full_key, low_rank_key
from lowrank.checkpoint.layout import file_rank, pair_roles, to_file
from lowrank.checkpoint.one_scale import Scales, folded, written_scales
from lowrank.checkpoint.read import SAFETENSORS
from lowrank.checkpoint.write_config import config_bytes
from lowrank.errors import CheckpointError
from lowrank.injection.adapters import lora_layers, override_modules
from lowrank.injection.config import LoraConfig
from lowrank.injection.patterns import matches_name, split_parts
from lowrank.injection.state import require_adapter
from lowrank.injection.targets import named_targets
from lowrank.layers.base import LoraLayer
from lowrank.layers.overrides import override_tensors, own_tensors

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

    beside: names of other files and folders that may lie in `folder` (a training run's); they are left alone.

    Raises LowrankError for an unknown adapter, and CheckpointError for a folder that holds something else, tensors that
    are empty (sharded and not gathered), on the meta device or not finite, and files that cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model is its own first child
    folder = Path(folder)
    config = require_adapter(model, adapter_name)
    check_folder(folder, {*USUAL, *beside})
    layers = {path: layer for path, layer in lora_layers(model) if adapter_name in layer.adapter_names}
    written = written_scales({path: layer.factors(adapter_name).scale for path, layer in layers.items()}, scales)
    tensors = dict(_low_rank_tensors(layers, adapter_name, written))
    tensors |= _full_tensors(model, adapter_name, config, set(layers))
    _check(tensors)
    write_folder(
        folder,
        {
            SAFETENSORS: _serialise(tensors),
            companion.NAME: _companion(model, layers, adapter_name, config, written).to_bytes(),
            config_file.NAME: _config(model, layers, adapter_name, config, written),
        },
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


def _groups(layer: LoraLayer) -> int:
    return cast(int, getattr(layer, "groups", 1))


def _low_rank_tensors(
    layers: dict[str, LoraLayer], adapter: str, written: Mapping[str, float]
) -> Iterator[tuple[str, Tensor]]:
    for path, layer in layers.items():
        factors = layer.factors(adapter)
        a, b = (tensor.detach() for tensor in factors.effective())
        pair = to_file(
            layer.kind, a, folded(b, factors.scale, written[path]), tuple(layer.weight.shape), _groups(layer)
        )
        for role, tensor in zip(pair_roles(layer.kind), pair, strict=True):
            yield low_rank_key(path, role), tensor
        if factors.magnitude is not None:
            yield low_rank_key(path, MAGNITUDE), factors.magnitude.detach()


def _full_tensors(model: nn.Module, adapter: str, config: LoraConfig, adapted: set[str]) -> dict[str, Tensor]:
    """What the adapter owns in full, and what PEFT takes for owned: it matches `modules_to_save` by any ending."""
    tensors = {
        full_key(path, name, adapted=path in adapted): tensor.detach()
        for path, module in override_modules(model, adapter)
        for name, tensor in override_tensors(module, adapter).items()
    }
    for root, module in named_targets(model).items():
        if root.endswith(tuple(config.modules_to_save)) and not _is_saved(root, config):
            for path, inner in module.named_modules(prefix=root):
                for name in own_tensors(inner):
                    value = cast(Tensor, getattr(inner, name)).detach()
                    tensors.setdefault(full_key(path, name, adapted=False), value)
    return tensors


def _is_saved(path: str, config: LoraConfig) -> bool:
    return any(matches_name(path, name) for name in config.modules_to_save)


def _check(tensors: dict[str, Tensor]) -> None:
    faults = []
    for key, tensor in tensors.items():
        if tensor.is_meta:
            faults.append(f"{key} is on the meta device and has no values")
        elif tensor.numel() == 0:
            faults.append(f"{key} has shape {list(tensor.shape)}: gather the sharded parameters before saving")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            faults.append(f"{key} holds values that are not finite")
    if faults:
        raise CheckpointError(f"the adapter cannot be saved: {'; '.join(faults)}")


def _serialise(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    ready = {key: tensors[key].to("cpu", copy=True).contiguous() for key in tensors}
    return cast(bytes, save(ready, metadata={"format": "pt"}))


def _described(
    layers: dict[str, LoraLayer], adapter: str, written: Mapping[str, float]
) -> dict[str, tuple[int, float]]:
    """{path: (rank, scale)} as the file has them."""
    return {
        path: (file_rank(layer.factors(adapter).effective_rank, _groups(layer)), written[path])
        for path, layer in layers.items()
    }


def _config(
    model: nn.Module, layers: dict[str, LoraLayer], adapter: str, config: LoraConfig, written: Mapping[str, float]
) -> bytes:
    return config_bytes(
        model,
        config,
        _described(layers, adapter, written),
        list(named_targets(model)),
        transposed=any(layer.kind == "conv1d-linear" for layer in layers.values()),
    )


def _companion(
    model: nn.Module, layers: dict[str, LoraLayer], adapter: str, config: LoraConfig, written: Mapping[str, float]
) -> Companion:
    all_factors = {path: layer.factors(adapter) for path, layer in layers.items()}
    return Companion(
        base=fingerprint(model, layers),
        fused={
            path: Fused(_part_names(path, config), factors.parts)
            for path, factors in sorted(all_factors.items())
            if factors.parts
        },
        start=frozenset(path for path, factors in all_factors.items() if factors.start_a is not None),
        scales=unsaid(
            _described(layers, adapter, written), {path: factors.scale for path, factors in all_factors.items()}
        ),
    )


def _part_names(path: str, config: LoraConfig) -> tuple[str, ...]:
    """The names of a fused projection's parts, as the selector in the config has them."""
    selectors = config.target_modules or ()
    for selector in [selectors] if isinstance(selectors, str) else selectors:
        name, parts = split_parts(selector)
        if parts and matches_name(path, name):
            return parts
    return ()


__all__ = ["check_folder", "save_adapter"]
