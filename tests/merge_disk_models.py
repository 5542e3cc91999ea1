"""Bases and adapters on disk, and the merge of the same files in memory, to compare with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from checkpoint_models import Convolutions, disturb
from lowrank import LoraConfig
from lowrank.core.merging import merge_weight
from lowrank.injection.adapters import lora_layers, override_modules
from lowrank.layers.overrides import keep_override


def save_base(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "50GB") -> Path:
    """The model as a checkpoint, sharded where it is above `shard`."""
    model = model.to(dtype)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, max_shard_size=shard)
    else:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_base(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of the same class with the checkpoint's values."""
    if hasattr(model, "save_pretrained"):
        return type(model).from_pretrained(folder, dtype=dtype or "auto").eval()
    fresh = Convolutions().to(dtype or next(model.parameters()).dtype)
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    return fresh.eval()


def save_adapter(model: nn.Module, folder: Path, seed: int = 1, **config: Any) -> Path:
    """A trained adapter for the model, alpha ≠ r and B ≠ 0; the model is plain again afterwards."""
    lowrank.inject(model, LoraConfig(**({"r": 4, "lora_alpha": 6} | config)))
    disturb(model, seed=seed)
    lowrank.save_adapter(model, folder)
    lowrank.unload(model)
    return folder


@torch.no_grad()
def merged_in_memory(
    model: nn.Module, adapters: Sequence[Path | tuple[Path, float]], dtype: torch.dtype | None = None
) -> nn.Module:
    """In place: the adapters loaded onto the model and merged; weighted ones layer by layer."""
    if dtype is not None:
        model = model.to(dtype)
    weights = {}
    for number, adapter in enumerate(adapters):
        folder, weights[f"a{number}"] = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
        lowrank.load_adapter(model, folder, f"a{number}")
    lowrank.set_active(model, weights)
    if set(weights.values()) == {1.0}:
        return lowrank.merge_and_unload(model)
    values = {}
    for path, layer in lora_layers(model):
        changes = [layer.change(name, weights[name]) for name in layer.adapter_names]
        values[path] = merge_weight(layer.stored(layer.weight.detach()), changes).view_as(layer.weight)
    for name in weights:
        for _, module in list(override_modules(model, name)):
            keep_override(module, name)
    lowrank.unload(model)
    for path, value in values.items():
        model.get_submodule(path).weight = nn.Parameter(value)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor in a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Every tensor of the checkpoint is that of the state, dtype and all; what it lacks is shared with one it has."""
    assert found
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name
    for name in wanted.keys() - found.keys():
        assert any(torch.equal(wanted[name], tensor) for tensor in found.values()), name


def write_base(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    config: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """A checkpoint of random tensors with these names and shapes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator).to(dtype or torch.float32) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """An adapter in PEFT's files, tensor by tensor; keys without the prefix `base_model.model.`."""
    folder.mkdir(parents=True)
    content = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(content, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def pair(d: int, k: int, seed: int = 1, r: int = 2) -> tuple[Tensor, Tensor]:
    """Random A (r, k) and B (d, r)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, k, generator=generator), torch.randn(d, r, generator=generator)


def linear_factors(path: str, d: int, k: int, seed: int = 1) -> dict[str, Tensor]:
    """The factors of a Linear in a file."""
    a, b = pair(d, k, seed)
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def embedding_factors(path: str, rows: int, width: int, seed: int = 1) -> dict[str, Tensor]:
    """The factors of an Embedding in a file."""
    a, b = pair(width, rows, seed)
    return {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
