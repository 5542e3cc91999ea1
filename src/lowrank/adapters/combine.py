"""Several adapters made into one, from their files alone."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowrank.adapters.each_module import Progress, for_each, module_seed, one_core_each, silent
from lowrank.adapters.energy import ModuleEnergy, headline, overall
from lowrank.adapters.weighted import WeightedAdapter, weighted_pairs
from lowrank.checkpoint.adapter_folder import AdapterContent, AdapterPath, content_of, union_of_names, write_adapter
from lowrank.checkpoint.companion import Companion
from lowrank.checkpoint.each_expert import read_each_expert
from lowrank.checkpoint.keys import Key
from lowrank.checkpoint.outputs import claimed
from lowrank.checkpoint.stored_base import together
from lowrank.checkpoint.target import Target
from lowrank.core.combination import WITH_DENSITY, WITHOUT_RANK, Method, Options, Term, find_method
from lowrank.core.truncation import check_rank
from lowrank.errors import ConfigError, MergeError, some


@dataclass(frozen=True, slots=True)
class CombineReport:
    """What was combined. kept: the share of Σ‖ΔW‖²_F over all modules that the result holds."""

    method: str
    modules: tuple[ModuleEnergy, ...]
    kept: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The ranks and the energy, the module that lost most, and what else there is to say."""
        first, *rest = headline(self.modules)
        return "\n".join([f"{self.method}: {first}", *rest, *self.notes])


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    folder: Path
    content: AdapterContent
    weight: float


@one_core_each()
def combine_adapters(
    adapters: WeightedAdapter | Sequence[WeightedAdapter],
    out: AdapterPath,
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> CombineReport:
    """Write to `out` one adapter whose ΔW is made of those of `adapters`: folders, or (folder, weight) pairs.

    method: one of `core.combination.METHODS`; each says there what it computes. `linear` is exactly Σ w·ΔW. Ranks,
    scales, rsLoRA and targets may differ: a module that only some adapters have is made of theirs. rank: of the result
    in every module, or None for the method's own; density: for the methods that drop entries; seed: for those that drop
    them at random. The result has a scale of 1 (lora_alpha = r) and no rsLoRA.

    Tensors kept in full (modules_to_save, biases) are averaged, Σ w·T, which means the same as summing their changes
    only where every adapter has them and the weights sum to 1.

    Raises ConfigError for arguments that cannot be meant; MergeError for adapters that cannot be combined: of unlike
    shapes, DoRA (whose change is not linear in its factors), unlike biases, or tensors in full that have no average;
    CheckpointError for files that cannot be read or written.
    """
    chosen, options = find_method(method), _options(method, rank, density, seed)
    parts = _read(adapters, allow_pickle)
    with claimed(out, {f"adapter {part.folder}": part.folder for part in parts}) as folder:
        full = _combine_full(parts)
        paths = list(dict.fromkeys(path for part in parts for path in part.content.targets))
        results = for_each(paths, lambda path: _combine_module(path, parts, chosen, options), progress)
        targets = dict(zip(paths, (target for target, _ in results), strict=True))
        modules = tuple(module for _, module in results)
        content, notes = _content(parts, targets, full)
        write_adapter(folder, content)
    return CombineReport(method, modules, overall(modules), notes)


def _options(method: str, rank: int | None, density: float | None, seed: int) -> Options:
    check_rank(rank)
    if rank is not None and method in WITHOUT_RANK:
        raise ConfigError(
            f"method {method!r} keeps every rank: leave rank out, or use 'linear', the same sum compressed"
        )
    if density is None:
        if method in WITH_DENSITY:
            raise ConfigError(f"method {method!r} needs a density, the share of entries to keep (0.2 in TIES' paper)")
        return Options(rank, 1.0, seed)
    if method not in WITH_DENSITY:
        raise ConfigError(f"method {method!r} drops nothing, so it takes no density: only {', '.join(WITH_DENSITY)} do")
    if not 0 < density <= 1:
        raise ConfigError(f"density must be a share above 0 and up to 1, not {density!r}")
    return Options(rank, density, seed)


def _read(adapters: WeightedAdapter | Sequence[WeightedAdapter], allow_pickle: bool) -> list[_Part]:
    parts = []
    for folder, weight in weighted_pairs(adapters, "combine"):
        files = read_each_expert(folder, allow_pickle)
        if files.config.lora.use_dora:
            raise MergeError(
                f"{os.fspath(folder)} is a DoRA adapter, whose change depends on the base and is not linear in its "
                "factors: merge it into the base and extract the difference"
            )
        if files.rows:
            raise MergeError(
                f"{files.folder} has rows of {next(iter(files.rows))} of its own (trainable_token_indices), which have "
                "no sum with another adapter's: merge it into its base"
            )
        parts.append(_Part(files.folder, content_of(files), float(weight)))
    return parts


def _combine_module(path: str, parts: Sequence[_Part], method: Method, options: Options) -> tuple[Target, ModuleEnergy]:
    owners = [part for part in parts if path in part.content.targets]
    own = [part.content.targets[path] for part in owners]
    _check_alike(path, owners, own)
    dtype = own[0].a.dtype
    for target in own[1:]:
        dtype = torch.promote_types(dtype, target.a.dtype)
    terms = [
        Term(target.a.to(dtype), target.b.to(dtype), target.scale * part.weight)
        for part, target in zip(owners, own, strict=True)
    ]
    result = method(terms, replace(options, seed=module_seed(options.seed, path)))
    target = Target(own[0].kind, result.a, result.b, 1.0, own[0].kernel, own[0].groups)
    ranks = tuple(one.a.shape[0] for one in own)
    return target, ModuleEnergy(path, ranks, result.rank, result.kept, math.sqrt(result.total), result.shortfall)


def _check_alike(path: str, owners: Sequence[_Part], own: Sequence[Target]) -> None:
    described = [(target.kind, target.kernel or target.shape, target.groups) for target in own]
    if len(set(described)) > 1:
        each = "; ".join(
            f"{part.folder} has {kind} {list(shape)}" + (f" in {groups} groups" if groups > 1 else "")
            for part, (kind, shape, groups) in zip(owners, described, strict=True)
        )
        raise MergeError(f"cannot combine {path}, whose ΔW has another shape in each adapter: {each}")


def _combine_full(parts: Sequence[_Part]) -> dict[Key, Tensor]:
    """Σ w·T of every tensor kept in full."""
    keys = list(dict.fromkeys(key for part in parts for key in part.content.full))
    if len({part.content.bias for part in parts}) > 1:
        raise MergeError("cannot combine adapters that train biases with others that do not: their bias fields differ")
    if not keys:
        return {}
    for key in keys:
        lacking = [str(part.folder) for part in parts if key not in part.content.full]
        if lacking:
            raise MergeError(f"cannot average {key.path}.{key.name}, kept in full: {lacking[0]} does not have it")
    if abs(sum(part.weight for part in parts) - 1) > 1e-6:
        raise MergeError(
            f"the adapters hold tensors in full ({keys[0].path}.{keys[0].name}, ...), which can only be averaged: "
            "give weights that sum to 1"
        )
    return {key: _average(key, parts) for key in keys}


def _average(key: Key, parts: Sequence[_Part]) -> Tensor:
    tensors = [part.content.full[key] for part in parts]
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise MergeError(f"cannot average {key.path}.{key.name}, of shapes {shapes}")
    summed = torch.stack([tensor.double() * part.weight for part, tensor in zip(parts, tensors, strict=True)]).sum(0)
    return summed.to(tensors[0].dtype)


def _content(
    parts: Sequence[_Part], targets: Mapping[str, Target], full: Mapping[Key, Tensor]
) -> tuple[AdapterContent, tuple[str, ...]]:
    contents = [part.content for part in parts]
    notes = []
    origin = dict(contents[0].origin)
    bases = {str(content.origin.get("base_model_name_or_path")) for content in contents}  # a file may say anything
    if len(bases) > 1:
        origin["base_model_name_or_path"] = None
        notes.append(f"the adapters name different bases ({some(sorted(bases))}): none is kept")
    origin["lora_dropout"] = 0.0
    fingerprints = [content.companion.base for content in contents]
    agreed = fingerprints[0] if all(f == fingerprints[0] for f in fingerprints) else None
    held = [content.companion.stored for content in contents]
    if (stored := together(held, targets)) is None and any(held):
        forms = sorted({"numbers" if base is None else base.form for base in held})
        notes.append(f"the adapters were trained over different bases, held in {' and in '.join(forms)}: none is kept")
    saved = sorted({name for content in contents for name in content.modules_to_save})
    names = union_of_names(contents)
    content = AdapterContent(
        targets,
        names,
        origin,
        full,
        tuple(saved),
        contents[0].bias,
        companion=Companion(base=agreed, stored=stored),
        singles=contents[0].singles,
    )
    return content, tuple(notes)
