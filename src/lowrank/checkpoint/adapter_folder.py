"""Adapters as values without a model: from a folder in PEFT's format, and into one."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowrank.checkpoint import companion, config_file, loftq_file
from lowrank.checkpoint.atomic import write_folder
from lowrank.checkpoint.companion import Companion
from lowrank.checkpoint.config_file import AdapterConfig
from lowrank.checkpoint.describe import describe
from lowrank.checkpoint.keys import MAGNITUDE, TOKENS, Key, full_key, low_rank_key
from lowrank.checkpoint.layout import file_rank, magnitude_shape, pair_roles, to_file
from lowrank.checkpoint.loftq_file import Off, read_off
from lowrank.checkpoint.one_scale import common_scale, folded
from lowrank.checkpoint.read import SAFETENSORS, AdapterFiles
from lowrank.checkpoint.restack import file_paths, restacked
from lowrank.checkpoint.target import Target
from lowrank.core.finite import all_finite
from lowrank.errors import CheckpointError

# What says of an adapter where it belongs; the rest of its config follows from its tensors.
ORIGIN = (
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "lora_dropout", "revision",
    "task_type", "trainable_token_indices",
)  # fmt: skip
WHICH = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")

RUN_FILE = "run.json"  # beside a trained adapter: how rows became tokens (`data.recipe`), under "recipe"

AdapterPath = str | os.PathLike[str]
Names = Mapping[str, Any]  # the fields of WHICH that are not null


@dataclass(frozen=True, slots=True, eq=False)
class AdapterContent:
    """All that an adapter's folder holds.

    names: which modules it adapts, in the words of its config; origin: the fields of ORIGIN; full: tensors kept whole;
    rows: {path: rows of its table}, which `origin` names (trainable_token_indices); singles: {path of a single expert:
    path of the stack that it is written in}; off: what LoftQ took off the base (`checkpoint.loftq_file`).
    """

    targets: Mapping[str, Target]
    names: Names
    origin: Mapping[str, Any] = field(default_factory=dict)
    full: Mapping[Key, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    companion: Companion = field(default_factory=Companion)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    singles: Mapping[str, str] = field(default_factory=dict)
    off: Mapping[str, Off] = field(default_factory=dict)


class FileTargets(Mapping[str, Target]):
    """The modules of an adapter's files, each read when it is asked for and kept by nobody."""

    def __init__(self, files: AdapterFiles) -> None:
        self._files = files

    def __getitem__(self, path: str) -> Target:
        return target_of(self._files, path)

    def __contains__(self, path: object) -> bool:
        return path in self._files.low_rank

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.low_rank)

    def __len__(self) -> int:
        return len(self._files.low_rank)


def target_of(files: AdapterFiles, path: str) -> Target:
    """The module at `path` of an adapter's files, in float32 or wider. Raises CheckpointError as `factors` does."""
    kind = files.kind(path)
    kernel, groups = _kernel(files, path) if kind == "conv" else ((), 1)
    factors = files.factors(path, kernel)
    magnitude = None if factors.magnitude is None else factors.magnitude.detach()
    return Target(kind, factors.a.detach(), factors.b.detach(), factors.scale, kernel, groups, magnitude)


def _kernel(files: AdapterFiles, path: str) -> tuple[tuple[int, ...], int]:
    """(shape of the convolution's weight, groups): B is a 1×1 convolution with the base's groups, which tells them."""
    a, b = files.pair(path)
    groups, rest = divmod(a.shape[0], b.shape[1])
    if rest or groups == 0 or a.shape[1] % groups:
        raise CheckpointError(
            f"{files.folder}: {path} has A {list(a.shape)} and B {list(b.shape)}, which belong to no convolution"
        )
    return (b.shape[0], a.shape[1] // groups, *a.shape[2:]), groups


def content_of(files: AdapterFiles) -> AdapterContent:
    """The whole adapter, its factors read when they are asked for.

    Tables that PEFT saves beside an embedding's factors, though they are the base's, are left out.

    Raises CheckpointError for an adapter whose B has a bias (lora_bias), which is part of the base's, and for one whose
    training took its start off the base (PiSSA, OLoRA saved as they are): its factors mean something only together with
    that changed base.
    """
    if files.config.moved_base is not None:
        raise CheckpointError(
            f"{files.folder} was trained from {files.config.moved_base} on a base that this changed, so its factors "
            "alone do not say its ΔW: load it onto its base with load_adapter and save it with save_adapter first"
        )
    lora, raw = files.config.lora, files.config.raw
    if raw.get("lora_bias"):
        raise CheckpointError(
            f"{files.folder} has biases of B (lora_bias), which go into the base's: load it onto its base with "
            "load_adapter and save it with save_adapter first"
        )
    return AdapterContent(
        targets=FileTargets(files),
        names=names_of(files.config),
        origin={name: raw[name] for name in ORIGIN if name in raw},
        full={key: tensor for key, tensor in files.full.items() if not (key.of_base and key.name == "weight")},
        modules_to_save=tuple(lora.modules_to_save),
        bias=lora.bias,
        companion=Companion(base=files.companion.base, stored=files.companion.stored),
        rows=files.rows,
        singles=files.singles,
        off=read_off(files.folder),
    )


def names_of(config: AdapterConfig) -> Names:
    """The fields of the config that say which modules are adapted."""
    return {name: config.raw[name] for name in WHICH if config.raw.get(name) not in (None, [], "")}


def union_of_names(sources: Sequence[AdapterContent]) -> Names:
    """Fields that mean every module that one of `sources` adapts, and no other.

    A list of names in a config means every module that ends in one of them, so lists without exceptions unite to a
    list. What cannot be united that way becomes one regex of all paths.
    """
    first = sources[0]
    same = all(source.names == first.names and source.targets.keys() == first.targets.keys() for source in sources)
    if same and first.names.keys() & {"target_modules", "target_parameters"}:
        return first.names
    if any(source.singles for source in sources):
        raise CheckpointError("adapters of stacked experts go together only where they name and adapt the same modules")
    if all(source.names.keys() == {"target_modules"} and _is_list(source.names) for source in sources):
        return {"target_modules": sorted({name for source in sources for name in source.names["target_modules"]})}
    return exact_names(path for source in sources for path in source.targets)


def exact_names(paths: Iterable[str]) -> Names:
    """The field that means exactly these paths in any model: one regex, matched as a whole."""
    return {"target_modules": "|".join(re.escape(path) for path in sorted(set(paths)))}


def _is_list(names: Names) -> bool:
    return isinstance(names["target_modules"], list)


def write_adapter(folder: Path, content: AdapterContent, dtype: torch.dtype | None = None) -> None:
    """Write `content` to `folder` in PEFT's format, all files in one step; dtype: of the factors, as they are if None.

    All modules get one scale: where theirs differ, B takes the quotient (`checkpoint.one_scale`). Same content, same
    bytes. Raises CheckpointError for factors that are not finite in `dtype`, or files that cannot be
    written.
    """
    if content.singles:
        content = replace(content, targets=restacked(content.targets, content.singles))
    scale = common_scale(target.scale for target in content.targets.values())
    tensors = dict(_tensors(content, dtype, scale))
    strange = sorted(key for key, tensor in tensors.items() if not all_finite(tensor))
    if strange:
        raise CheckpointError(f"{folder}: {strange[0]} would hold values that are not finite, so nothing was written")
    write_folder(
        folder,
        {
            SAFETENSORS: _serialise(tensors),
            companion.NAME: content.companion.to_bytes(),
            config_file.NAME: _config(content, scale),
        }
        | ({loftq_file.NAME: loftq_file.as_bytes(content.off)} if content.off else {}),
    )


def _tensors(content: AdapterContent, dtype: torch.dtype | None, scale: float) -> Iterator[tuple[str, Tensor]]:
    names = file_paths(content.targets) if content.singles else {}
    wraps = Counter(path.rpartition(".")[0] for path in names if content.targets[path].kind == "experts")
    for path, target in content.targets.items():
        b = folded(target.b, target.scale, scale)
        pair = to_file(target.kind, target.a, b, target.kernel, target.groups)
        for role, tensor in zip(pair_roles(target.kind), pair, strict=True):
            yield low_rank_key(names.get(path, path), role), tensor.to(dtype or tensor.dtype)
        if target.magnitude is not None:
            magnitude = target.magnitude.to(dtype or target.magnitude.dtype)
            shape = magnitude.shape if target.kind != "conv" else magnitude_shape("conv", target.kernel)
            yield low_rank_key(names.get(path, path), MAGNITUDE), magnitude.view(shape)
    for path, tensor in content.rows.items():
        yield low_rank_key(path, TOKENS), tensor
    for key, tensor in content.full.items():
        yield full_key(key.path, key.name, adapted=wraps.get(key.path, key.of_base)), tensor


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return cast(bytes, save({key: tensors[key].contiguous() for key in sorted(tensors)}, metadata={"format": "pt"}))


def _config(content: AdapterContent, scale: float) -> bytes:
    ranks = describe({path: (file_rank(t.a.shape[-2], t.groups), scale) for path, t in content.targets.items()})
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_dropout": 0.0,
        "revision": None,
        "task_type": None,
        **content.origin,
        **content.names,
        **ranks._asdict(),
        "bias": content.bias,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted(content.modules_to_save) or None,
        "peft_type": "LORA",
        "use_dora": any(target.magnitude is not None for target in content.targets.values()),
        "use_rslora": False,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
