"""GGUF adapters, as llama.cpp loads them with `--lora`.

What src/llama-adapter.cpp wants: `general.type` is "adapter", `adapter.type` "lora", one `adapter.lora.alpha`, with
s = alpha/r; for every weight W two tensors `W.lora_a` (r, k) and `W.lora_b` (d, r), but (V, r) and (d, r) for the token
embedding. Rows of W that llama.cpp keeps in another order than transformers are in that order in lora_b too.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters.convert.gguf_file import gguf_bytes, read_gguf
from lowrank.adapters.convert.gguf_names import Family, check_rows, family_of, heads_of, to_halves, to_pairs
from lowrank.adapters.convert.options import ConvertOptions, Read
from lowrank.adapters.convert.sound import ready
from lowrank.adapters.convert.uniform import at_scale, common_alpha, refuse
from lowrank.checkpoint.adapter_folder import AdapterContent, exact_names
from lowrank.checkpoint.atomic import write_file
from lowrank.checkpoint.target import Target
from lowrank.errors import CheckpointError, ConfigError, short, some
from lowrank.modelfiles.base import read_json

TABLE = "token_embd.weight"
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
QUANTIZATION_VERSION = 2


def write_gguf(content: AdapterContent, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    """Write the file `out`, float32 unless the options say float16 or bfloat16. Scales that differ go into B.

    Raises CheckpointError for what such a file cannot hold, and for modules and architectures without a name there.
    """
    config = _config(options.model)
    family, dtype = family_of(config), options.dtype or torch.float32
    refuse(content, "a GGUF adapter", dora=True, full=True, conv=True)
    if dtype not in FILE_TYPES:
        raise ConfigError(f"a GGUF adapter cannot be of {dtype}: choose float32, float16 or bfloat16")
    _check_names(content, family, config)
    alpha = common_alpha(content.targets)
    tensors: dict[str, Tensor] = {}
    for path, target in content.targets.items():
        name = str(family.gguf_name(path))
        a, b = _to_gguf(name, path, at_scale(target, alpha / target.a.shape[0]), family, config)
        tensors |= ready({f"{name}.lora_a": a, f"{name}.lora_b": b}, dtype, out)
    values: dict[str, str | int | float] = {
        "general.architecture": family.name,
        "general.type": "adapter",
        "general.name": out.stem,
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": QUANTIZATION_VERSION,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    write_file(out, gguf_bytes(values, tensors))
    return ()


def _config(model: Path | None) -> dict[str, Any]:
    if model is None:
        raise ConfigError("GGUF needs the base model's config.json for its names and heads: give the model's folder")
    if not (model / "config.json").is_file():
        raise CheckpointError(f"{model} has no config.json: give the folder of the adapter's base model")
    return read_json(model / "config.json")


def _check_names(content: AdapterContent, family: Family, config: Mapping[str, Any]) -> None:
    unknown = sorted(path for path in content.targets if family.gguf_name(path) is None)
    if unknown:
        raise CheckpointError(f"llama.cpp's {family.name} has no name for {some(unknown)}: leave them out")
    if not config.get("tie_word_embeddings", family.tied):
        return
    if "lm_head" in content.targets:
        raise CheckpointError(
            "lm_head is adapted, and llama.cpp keeps no output weight where it is tied to the embedding"
        )
    if table := next((path for path in content.targets if family.gguf_name(path) == TABLE), None):
        raise CheckpointError(
            f"{table} is adapted and tied to the output head, and llama.cpp ends in an assertion where it takes "
            "an adapter for both: leave it out, or merge it"
        )


def _to_gguf(name: str, path: str, target: Target, family: Family, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    a, b = target.a, target.b
    heads = heads_of(config, path) if family.permuted else None
    if heads is not None:
        check_rows(b, heads, path)
        b = to_pairs(b, heads)
    if name == TABLE:
        return a.t().contiguous(), b.contiguous()
    return a, b


def read_gguf_adapter(source: Path, options: ConvertOptions) -> Read:
    """The adapter in the GGUF file `source`, for the base model in options.model."""
    file, config = read_gguf(source), _config(options.model)
    family = family_of(config)
    _check_values(source, file.values, family)
    alpha = float(file.values["adapter.lora.alpha"])
    targets: dict[str, Target] = {}
    for tensor in file.tensors:
        name, _, role = tensor.rpartition(".")
        path = family.path(name)
        if role not in ("lora_a", "lora_b") or path is None:
            raise CheckpointError(f"{source}: {short(tensor)} is no factor of a module of {family.name}")
        targets[path] = _from_gguf(source, name, path, file.tensors, alpha, family, config)
    if not targets:
        raise CheckpointError(f"{source} holds no factors")
    return Read(AdapterContent(targets, exact_names(targets), {"task_type": "CAUSAL_LM"}))


def _check_values(source: Path, values: Mapping[str, Any], family: Family) -> None:
    if values.get("general.type") != "adapter" or values.get("adapter.type") != "lora":
        raise CheckpointError(f"{source} is no LoRA adapter but a {short(values.get('general.type', 'model'), 60)}")
    if values.get("general.architecture") != family.name:
        raise CheckpointError(
            f"{source} is for the architecture {short(values.get('general.architecture'), 60)}, and the model is "
            f"{family.name}"
        )
    alpha = values.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise CheckpointError(f"{source} does not say its adapter.lora.alpha")


def _from_gguf(
    source: Path,
    name: str,
    path: str,
    tensors: Mapping[str, Tensor],
    alpha: float,
    family: Family,
    config: Mapping[str, Any],
) -> Target:
    a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        raise CheckpointError(f"{source}: {name} has not both lora_a and lora_b as matrices")
    a, b = a.float(), b.float()
    a = a.t().contiguous() if name == TABLE else a
    if a.shape[0] != b.shape[1] or a.numel() == 0 or b.numel() == 0:
        raise CheckpointError(f"{source}: {name} has A {list(a.shape)} and B {list(b.shape)}, which are no pair")
    heads = heads_of(config, path) if family.permuted else None
    if heads is not None:
        check_rows(b, heads, path)
        b = to_halves(b, heads)
    return Target("embedding" if name == TABLE else "linear", a, b, alpha / a.shape[0])
