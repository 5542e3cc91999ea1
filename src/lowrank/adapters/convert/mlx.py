"""mlx-lm: a folder with `adapters.safetensors` and an `adapter_config.json` of its own kind.

https://github.com/ml-explore/mlx-lm, tuner/lora.py and tuner/utils.py. Factors lie transposed, lora_a (k, r) and lora_b
(r, d), with h = W0·x + scale·((x·lora_a)·lora_b); DoRA's magnitude is `m`. rank and scale are one for all modules;
`keys` name the modules, in full or within a layer.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.adapters.convert.options import ConvertOptions, Read
from lowrank.adapters.convert.sound import ready, widened
from lowrank.adapters.convert.uniform import at_scale, refuse
from lowrank.checkpoint.adapter_folder import AdapterContent, Target, exact_names
from lowrank.checkpoint.atomic import write_folder
from lowrank.checkpoint.config_file import NAME
from lowrank.checkpoint.one_scale import common_scale
from lowrank.checkpoint.read import read_safetensors
from lowrank.errors import CheckpointError
from lowrank.modelfiles.base import read_json
from lowrank.modelfiles.lookup import is_table

WEIGHTS = "adapters.safetensors"
FACTOR = re.compile(r"(?P<path>.+)\.(?P<role>lora_a|lora_b|m)")


def read_mlx(source: Path, options: ConvertOptions) -> Read:
    """The adapter in the folder `source`. Raises CheckpointError for full fine-tunings, experts and damaged files."""
    del options
    config = read_json(source / NAME)
    kind = config.get("fine_tune_type", "lora")
    parameters = config.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(parameters, dict):
        raise CheckpointError(f"{source / NAME} is of a {kind!r} fine-tuning, and only lora and dora have factors")
    scale = parameters.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise CheckpointError(f"{source / NAME} has no number as lora_parameters.scale")
    targets = _targets(source, float(scale), read_safetensors(source / WEIGHTS))
    origin: dict[str, Any] = {"lora_dropout": parameters.get("dropout", 0.0)}
    if isinstance(config.get("model"), str):
        origin["base_model_name_or_path"] = config["model"]
    return Read(AdapterContent(targets, exact_names(targets), origin))


def _targets(source: Path, scale: float, tensors: Mapping[str, Tensor]) -> dict[str, Target]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = FACTOR.fullmatch(name)
        if match is None:
            raise CheckpointError(f"{source / WEIGHTS}: {name} is no lora_a, lora_b or m of a module")
        found.setdefault(match["path"], {})[match["role"]] = widened(tensor, f"{source / WEIGHTS}: {name}")
    return {path: _target(source, path, roles, scale) for path, roles in found.items()}


def _target(source: Path, path: str, roles: Mapping[str, Tensor], scale: float) -> Target:
    a, b = roles.get("lora_a"), roles.get("lora_b")
    if a is not None and a.ndim == 3:
        raise CheckpointError(f"{source}: {path} adapts experts one by one, which PEFT's format has no such place for")
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(roles.items()))
        raise CheckpointError(f"{source}: {path} has {shapes}, wanted lora_a (k, r) and lora_b (r, d)")
    kind = "embedding" if is_table(path) else "linear"
    return Target(kind, a.t().contiguous(), b.t().contiguous(), scale, magnitude=roles.get("m"))


def write_mlx(content: AdapterContent, out: Path, options: ConvertOptions) -> tuple[str, ...]:
    """Write the folder `out`. Ranks are filled up with zeros to the largest, scales that differ go into B."""
    refuse(content, "an mlx-lm adapter", dora=False, full=True, conv=True)
    rank = max(target.a.shape[0] for target in content.targets.values())
    scale = common_scale(target.scale for target in content.targets.values())
    tensors: dict[str, Tensor] = {}
    for path, target in content.targets.items():
        equal = at_scale(target, scale)
        tensors[f"{path}.lora_a"] = _filled(equal.a, rank).t()
        tensors[f"{path}.lora_b"] = _filled(equal.b.t(), rank)
        if equal.magnitude is not None:
            tensors[f"{path}.m"] = equal.magnitude
    write_folder(out, {WEIGHTS: _serialise(ready(tensors, options.dtype, out)), NAME: _config(content, rank, scale)})
    return ()


def _filled(rows: Tensor, rank: int) -> Tensor:
    """(r, n) → (rank, n), with zeros."""
    return torch.cat([rows, rows.new_zeros(rank - rows.shape[0], rows.shape[1])])


def _serialise(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return cast(bytes, save(tensors))


def _config(content: AdapterContent, rank: int, scale: float) -> bytes:
    dora = any(target.magnitude is not None for target in content.targets.values())
    fields = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {
            "dropout": content.origin.get("lora_dropout", 0.0),
            "keys": sorted(content.targets),
            "rank": rank,
            "scale": scale,
        },
        "model": content.origin.get("base_model_name_or_path"),
        "num_layers": -1,
    }
    return (json.dumps(fields, indent=4, sort_keys=True) + "\n").encode()
