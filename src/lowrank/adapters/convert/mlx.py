"""mlx-lm: a folder with `adapters.safetensors` and an `adapter_config.json` of its own kind.

https://github.com/ml-explore/mlx-lm, tuner/lora.py and tuner/utils.py. Factors lie transposed, lora_a (k, r) and lora_b
(r, d), with h = W0·x + scale·((x·lora_a)·lora_b); DoRA's magnitude is `m`. rank and scale are one for all modules;
`keys` name the modules, in full or within a layer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.adapters.convert.mlx_names import check_tie, mlx_names, path_of
from lowrank.adapters.convert.options import ConvertOptions, Read
from lowrank.adapters.convert.sound import ready, widened
from lowrank.adapters.convert.uniform import at_scale, refuse
from lowrank.checkpoint.adapter_folder import AdapterContent, exact_names
from lowrank.checkpoint.atomic import write_folder
from lowrank.checkpoint.config_file import NAME
from lowrank.checkpoint.one_scale import common_scale
from lowrank.checkpoint.read import read_safetensors
from lowrank.checkpoint.target import Target
from lowrank.errors import CheckpointError, short
from lowrank.modelfiles.base import read_json
from lowrank.modelfiles.lookup import is_table
from lowrank.modelfiles.tied import architectures

WEIGHTS = "adapters.safetensors"
FACTOR = re.compile(r"(?P<path>.+)\.(?P<role>lora_a|lora_b|m)")


def read_mlx(source: Path, options: ConvertOptions) -> Read:
    """The adapter in the folder `source`. Raises CheckpointError for full fine-tunings, experts and damaged files."""
    del options
    config = read_json(source / NAME)
    kind = config.get("fine_tune_type", "lora")
    parameters = config.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(parameters, dict):
        text = f"{source / NAME} is of a {short(repr(kind), 60)} fine-tuning, and only lora and dora have factors"
        raise CheckpointError(text)
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
    return {path_of(name): _target(source, name, roles, scale) for name, roles in found.items()}


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
    """Write the folder `out`. Ranks are filled up with zeros to the largest, scales that differ go into B.

    Experts that were adapted one by one become one module, a (experts, r, k), b (experts, d, r). Raises CheckpointError
    for what mlx-lm has no place or no name for.
    """
    refuse(content, "an mlx-lm adapter", dora=False, full=True, conv=True)
    base = options.model / "config.json" if options.model else None
    config = read_json(base) if base and base.is_file() else {}
    architecture = next(iter(architectures(config)), None) or _architecture(content)
    names = mlx_names(content.targets.keys(), architecture)
    note = check_tie(content.targets.keys(), architecture, config)
    rank = max(target.a.shape[0] for target in content.targets.values())
    scale = common_scale(target.scale for target in content.targets.values()) or 1.0
    tensors: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Target]] = {}
    for path, target in content.targets.items():
        (name, expert), equal = names[path], at_scale(target, scale)
        if expert is not None:
            experts.setdefault(name, {})[expert] = equal
            continue
        tensors[f"{name}.lora_a"] = _filled(equal.a, rank).t()
        tensors[f"{name}.lora_b"] = _filled(equal.b.t(), rank)
        if equal.magnitude is not None:
            tensors[f"{name}.m"] = equal.magnitude
    for name, group in experts.items():
        tensors |= _stacked(name, group, rank, _expert_count(config))
    keys = sorted({name for name, _ in names.values()})
    config_file = _config(content, keys, rank, scale)
    write_folder(out, {WEIGHTS: _serialise(ready(tensors, options.dtype, out)), NAME: config_file})
    return (note,) if note else ()


def _architecture(content: AdapterContent) -> str | None:
    """What the adapter itself says of its base."""
    if content.companion.base is not None:
        return content.companion.base.architecture
    mapping = content.origin.get("auto_mapping")
    return str(mapping.get("base_model_class")) if isinstance(mapping, dict) else None


def _expert_count(config: Mapping[str, Any]) -> int | None:
    counts = (config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    return next((count for count in counts if type(count) is int), None)


def _stacked(name: str, group: Mapping[int, Target], rank: int, count: int | None) -> dict[str, Tensor]:
    """lora_a (experts, r, k) and lora_b (experts, d, r) of a layer; experts that are not adapted have zeros."""
    if any(target.magnitude is not None for target in group.values()):
        raise CheckpointError(f"{name} is DoRA, which mlx-lm has not for experts")
    most = max(group) + 1
    if most > (count or most) or (count is None and len(group) < most):
        told = f"{count} experts" if count else "nobody says how many experts"
        raise CheckpointError(f"{name}: expert {most - 1} is adapted, and {told} the base has: give the base, --model")
    some_target = next(iter(group.values()))
    zero = some_target.a.new_zeros(rank, some_target.a.shape[1]), some_target.b.new_zeros(some_target.b.shape[0], rank)
    pairs = {number: (_filled(one.a, rank), _filled(one.b.t(), rank).t()) for number, one in group.items()}
    a, b = zip(*(pairs.get(number, zero) for number in range(count or most)), strict=True)
    return {f"{name}.lora_a": torch.stack(a), f"{name}.lora_b": torch.stack(b)}


def _filled(rows: Tensor, rank: int) -> Tensor:
    """(r, n) → (rank, n), with zeros."""
    return torch.cat([rows, rows.new_zeros(rank - rows.shape[0], rows.shape[1])])


def _serialise(tensors: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return cast(bytes, save(tensors))


def _config(content: AdapterContent, keys: Sequence[str], rank: int, scale: float) -> bytes:
    dora = any(target.magnitude is not None for target in content.targets.values())
    fields = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {
            "dropout": content.origin.get("lora_dropout", 0.0),
            "keys": list(keys),
            "rank": rank,
            "scale": scale,
        },
        "model": content.origin.get("base_model_name_or_path"),
        "num_layers": -1,
    }
    return (json.dumps(fields, indent=4, sort_keys=True) + "\n").encode()
