"""An adapter from two checkpoints: the low-rank part of what one has beyond the other."""

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank.adapters.differences import Difference, Pairing, pair
from lowrank.adapters.each_module import Progress, for_each, module_seed, one_core_each, silent
from lowrank.adapters.energy import ModuleEnergy, headline, overall
from lowrank.adapters.kept_whole import Whole, keep_whole
from lowrank.checkpoint.adapter_folder import AdapterContent, AdapterPath, write_adapter
from lowrank.checkpoint.companion import Companion
from lowrank.checkpoint.config_file import NAME
from lowrank.checkpoint.describe import target_names
from lowrank.checkpoint.fingerprint import Fingerprint
from lowrank.checkpoint.outputs import claimed
from lowrank.checkpoint.target import Target
from lowrank.checkpoint.write_config import HEADS, TASKS
from lowrank.core.exact import decompose
from lowrank.core.randomised import Dense, compress
from lowrank.core.truncation import Cut, LowRank, check_energy, check_rank
from lowrank.errors import CheckpointError, ConfigError, MergeError, short
from lowrank.hub import HubId, origin
from lowrank.injection.patterns import matches
from lowrank.modelfiles.base import BaseFiles, read_base
from lowrank.modelfiles.lookup import is_table
from lowrank.modelfiles.orientation import CONV1D_LAYERS, CONV1D_MODELS
from lowrank.modelfiles.tied import architectures

PREFIX = re.compile(r"([A-Za-z0-9_-]+\.)*")
DENSE_ELEMENTS = 2**26  # 256 MiB in float32: larger differences are formed anew, block by block, at every pass


@dataclass(frozen=True, slots=True)
class Unexpressed:
    """A change that the adapter does not hold: the tensor's name, ‖ΔT‖_F (None where there is none), and why."""

    name: str
    norm: float | None
    why: str


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What was extracted. kept: the share of Σ‖ΔW‖²_F over all adapted modules that the factors hold.

    whole: tensors that are kept in full; unexpressed: changes that the adapter does not have.
    """

    modules: tuple[ModuleEnergy, ...]
    kept: float
    whole: tuple[str, ...]
    unexpressed: tuple[Unexpressed, ...]

    def __str__(self) -> str:
        """The ranks and the energy, the module that lost most, and what could not be expressed."""
        lines = headline(self.modules)
        if self.whole:
            lines.append(f"{len(self.whole)} tensors kept in full")
        reasons: dict[str, list[Unexpressed]] = {}
        for lost in self.unexpressed:
            reasons.setdefault(lost.why, []).append(lost)
        for why, these in reasons.items():
            norms = [lost.norm for lost in these if lost.norm is not None]
            size = f" with ‖Δ‖ = {math.hypot(*norms):.4g}" if norms else ""
            lines.append(f"not expressed: {len(these)} tensors{size}, {these[0].name} first: {why}")
        return "\n".join(lines)


@one_core_each()
def extract_adapter(
    base: AdapterPath,
    tuned: AdapterPath,
    out: AdapterPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] | None = None,
    embeddings: bool = False,
    save_rest: bool = False,
    exact: bool = False,
    prefix: str = "",
    seed: int = 0,
    progress: Progress = silent,
) -> ExtractReport:
    """Write to `out` the adapter whose ΔW approximates W_tuned − W_base for every matrix that differs.

    base, tuned: folders of safetensors checkpoints, read a block at a time; no model is built. rank: of every module;
    energy: the smallest rank that keeps this share of ‖ΔW‖²_F, module by module; with both, the smaller of the two.
    targets: names or a regex as in LoraConfig, all matrices if None; embeddings: lookup tables too; save_rest: keep
    what else changed (norms, biases, tables) in full, as modules_to_save and trained biases; exact: a full SVD instead
    of block Krylov iteration, whose shortfall per module is in the report; prefix: put in front of the files' names
    where the model's modules have one (`transformer.`).

    Raises ConfigError for arguments that cannot be meant; MergeError where nothing differs, or values are not finite;
    CheckpointError for files that cannot be read or written.
    """
    check_rank(rank)
    check_energy(energy)
    if not PREFIX.fullmatch(prefix):
        raise ConfigError(f"prefix must be names with a dot after each, like 'transformer.', not {short(repr(prefix))}")
    if rank is None and energy is None:
        raise ConfigError("extract: give a rank, or the share of the energy to keep")
    before, after = _model(base), _model(tuned)
    with claimed(out, {"base model": before.folder, "tuned model": after.folder}) as folder:
        pairing, cut = pair(before, after), Cut(rank, energy)
        changed = [one for one in pairing.shared if not one.identical]
        chosen = [one for one in changed if _why_not(one, targets, embeddings) is None]
        if not chosen:
            raise MergeError(
                f"no matrix to adapt differs between {before.folder} and {after.folder}: {_advice(targets)}"
            )
        results = for_each(chosen, lambda one: _factors(one, before, cut, exact, seed), progress)
        found = {_path(one): result for one, result in zip(chosen, results, strict=True)}
        whole, lost = _rest(pairing, changed, found, targets, embeddings, save_rest)
        content = _content(before, origin(before.folder) or HubId(os.fspath(base)), found, whole, prefix)
        write_adapter(folder, content)
    modules = tuple(_energy(path, result) for path, (_, result) in found.items())
    return ExtractReport(modules, overall(modules), tuple(f"{k.path}.{k.name}" for k in whole.tensors), tuple(lost))


def _model(path: AdapterPath) -> BaseFiles:
    files = read_base(path)
    if (files.folder / NAME).exists():
        raise CheckpointError(f"{os.fspath(path)} is an adapter, not a model: merge it into its base first")
    return files


def _path(difference: Difference) -> str:
    return difference.name.removesuffix(".weight")


def _why_not(one: Difference, targets: str | Sequence[str] | None, embeddings: bool) -> str | None:
    """Why a tensor gets no factors, or None where it does."""
    dimensions = len(one.base.entry.shape)
    if one.base.entry.shape != one.tuned.entry.shape:
        return f"its shape changed from {list(one.base.entry.shape)} to {list(one.tuned.entry.shape)}"
    if not one.comparable:
        return f"it is stored as {one.base.entry.dtype} and {one.tuned.entry.dtype}, which are no numbers to subtract"
    if dimensions != 2 or not one.name.endswith(".weight"):
        return "it is no matrix"
    if targets is not None and not matches(_path(one), targets, "targets"):
        return "it is none of the targets"
    if is_table(_path(one)) and not embeddings:
        return "it is a lookup table, and embeddings were not asked for"
    return None


def _advice(targets: object) -> str:
    return "are they two copies of one model?" if targets is None else "do the targets name the right modules?"


def _factors(one: Difference, base: BaseFiles, cut: Cut, exact: bool, seed: int) -> tuple[Target, LowRank]:
    n, m = one.shape
    if exact:
        result = decompose(one.dense(), cut)
    else:
        source = Dense(one.dense()) if n * m <= DENSE_ELEMENTS else one
        result = compress(source, cut, seed=module_seed(seed, one.name))
    kind = "embedding" if is_table(_path(one)) else "linear"
    a, b = (result.b.t(), result.a.t()) if kind == "embedding" or _is_conv1d(one, base) else (result.a, result.b)
    return Target(kind, a.contiguous(), b.contiguous(), 1.0), result


def _is_conv1d(one: Difference, base: BaseFiles) -> bool:
    """True where the file stores W0ᵀ, as transformers' Conv1D does."""
    model_type = (base.config or {}).get("model_type")
    return model_type in CONV1D_MODELS and _path(one).rpartition(".")[2] in CONV1D_LAYERS


def _energy(path: str, result: LowRank) -> ModuleEnergy:
    return ModuleEnergy(path, (), result.rank, result.kept, math.sqrt(result.total), result.shortfall)


def _rest(
    pairing: Pairing,
    changed: Sequence[Difference],
    found: Collection[str],
    targets: str | Sequence[str] | None,
    embeddings: bool,
    save: bool,
) -> tuple[Whole, list[Unexpressed]]:
    """What else changed: kept in full where that is wanted and possible, told otherwise."""
    left = [one for one in changed if _path(one) not in found]
    whole = keep_whole(left, pairing.shared, found) if save else Whole()
    kept = {f"{key.path}.{key.name}" for key in whole.tensors}
    lost = [Unexpressed(name, None, f"only the {whose} model has it") for name, whose in pairing.alone]
    for one in left:
        if one.name not in kept:
            why = _why_not(one, targets, embeddings)
            lost.append(Unexpressed(one.name, one.norm() if one.comparable else None, str(why)))
    return whole, lost


def _content(
    base: BaseFiles, name: HubId, found: Mapping[str, tuple[Target, LowRank]], whole: Whole, prefix: str
) -> AdapterContent:
    targets: dict[str, Target] = {prefix + path: target for path, (target, _) in found.items()}
    config = base.config or {}
    every = [prefix + name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    names = target_names(targets, sorted({*every, *targets}))
    architecture = next(iter(architectures(config)), None)
    came_from = {
        "base_model_name_or_path": name.repo,
        "revision": name.revision,
        "fan_in_fan_out": config.get("model_type") in CONV1D_MODELS,
        "task_type": _task(architecture),
    }
    fingerprint = architecture and Fingerprint(architecture, None, _shapes(base, found, prefix))
    return AdapterContent(
        targets,
        {"target_modules": names},
        came_from,
        {replace(key, path=prefix + key.path): tensor for key, tensor in whole.tensors.items()},
        tuple(prefix + path for path in whole.modules),
        whole.bias,
        companion=Companion(base=fingerprint or None),
    )


def _task(architecture: str | None) -> str | None:
    """PEFT's word for the model's task, where it does not make PEFT expect a trained head."""
    tasks = [task for pattern, task in TASKS if architecture and pattern.search(architecture)]
    return tasks[0] if tasks and tasks[0] not in HEADS else None


def _shapes(base: BaseFiles, found: Mapping[str, Any], prefix: str) -> dict[str, list[int]]:
    known = {path: base.tensors.get(f"{path}.weight") for path in found}
    return {prefix + path: list(place[1].shape) for path, place in sorted(known.items()) if place is not None}
