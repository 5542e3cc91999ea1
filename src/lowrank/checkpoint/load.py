"""Loading an adapter onto a model."""

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.checkpoint.expert_files import with_stacks
from lowrank.checkpoint.fingerprint import fingerprint
from lowrank.checkpoint.fit import fit_faults
from lowrank.checkpoint.idle import base_tensor, changes_nothing
from lowrank.checkpoint.keys import B_BIAS, Key
from lowrank.checkpoint.loaded_config import loaded_config
from lowrank.checkpoint.read import AdapterFiles, open_adapter
from lowrank.checkpoint.renaming import Renaming, find_renaming, lies_in
from lowrank.checkpoint.report import LoadReport
from lowrank.checkpoint.restore import unfold, with_moved_base
from lowrank.checkpoint.row_files import rows_of
from lowrank.checkpoint.single_experts import with_single_experts
from lowrank.checkpoint.sound import tensor_faults
from lowrank.checkpoint.unanswered import unanswered
from lowrank.core.factors import LoraFactors
from lowrank.core.shards import is_sharded, whole
from lowrank.core.stored import dense
from lowrank.core.stored.of_module import frozen_shape
from lowrank.core.token_rows import TokenRows
from lowrank.errors import CheckpointError, LowrankWarning
from lowrank.injection.apply import attach, check_new_name
from lowrank.injection.config import LoraConfig
from lowrank.injection.state import check_trainable_here, unwrapped
from lowrank.injection.targets import named_targets
from lowrank.injection.token_rows import said_indices
from lowrank.injection.undo import or_as_it_was
from lowrank.layers.kinds import kind_of
from lowrank.layers.linear import LoraLinear
from lowrank.layers.overrides import override_tensors
from lowrank.layers.stack import ExpertStack

Full = dict[str, dict[str, Tensor]]


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    trainable: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """In place: give `model` the adapter in `folder`, h = W0·x + s·B·A·x with the scale its config declares.

    folder: of PEFT's format, or the adapter's name on the Hub (`org/name`, `org/name@revision`).

    The tensors in the file decide which modules are adapted. Leading parts of module paths that differ (`model.`) are
    exchanged where that makes all of them fit, and the report says so. The adapter becomes the only active one; it
    requires gradients only if `trainable`. Factors are kept in float32 (or wider), whatever the file holds.

    Warns (LowrankWarning) where the base is not the one the adapter was made for, where the config speaks of biases or
    targets that the file does not hold, and where ΔW is zero everywhere.

    Raises CheckpointError for what `read_adapter` refuses and, all listed in one error, for tensors that are missing,
    unexpected or of another shape than the model wants, and for a base without values (on the meta device, offloaded).
    Whatever is raised, the model is as it was.
    """
    if trainable:
        check_trainable_here(model)
    model = unwrapped(model)
    check_new_name(model, adapter_name)
    return load_files(model, open_adapter(folder, allow_pickle), adapter_name, trainable)


def load_files(model: nn.Module, files: AdapterFiles, adapter_name: str, trainable: bool) -> LoadReport:
    """In place: `load_adapter` for files that are read already."""
    modules = {"": model} | named_targets(model)
    given = with_stacks(files, modules)
    files = with_single_experts(given, model, modules)
    rename = find_renaming(_paths(files), modules)
    _check(files, model, modules, rename)
    factors = {rename(path): _factors(files, path, modules[rename(path)]) for path in files.low_rank}
    full = _full(files, modules, rename)
    rows = rows_of(model, modules, files, rename)
    said = said_indices(model, modules, rows)
    config = replace(loaded_config(files, factors, full, modules, rename), trainable_token_indices=said)
    unsaid = tuple(unanswered(given, modules, rename))
    with or_as_it_was(model, adapter_name, config):
        _attach(model, adapter_name, config, factors, full, rows, trainable)
        report = _report(model, adapter_name, files, rename, full, unsaid)
    _warn(report, unsaid)
    return report


def _paths(files: AdapterFiles) -> list[str]:
    """The paths of all modules that the files speak of."""
    return list(dict.fromkeys([*files.low_rank, *(key.path for key in files.full), *files.rows]))


def _check(files: AdapterFiles, model: nn.Module, modules: Mapping[str, nn.Module], rename: Renaming) -> None:
    """Raise one CheckpointError with everything that stands against loading."""
    faults = tensor_faults(files) + fit_faults(files, modules, rename)
    faults += _without_values(files, modules, rename) + _sharded(files, modules, rename)
    if faults:
        differences = _differences(files, model)
        hint = f" ({'; '.join(differences)})" if differences else ""
        raise CheckpointError(
            f"{files.folder}: this adapter does not fit this {type(model).__name__}{hint}: {'; '.join(faults)}"
        )


def _without_values(files: AdapterFiles, modules: Mapping[str, nn.Module], rename: Renaming) -> list[str]:
    """The fault of a base whose tensors are not in memory."""
    paths = dict.fromkeys(map(rename, _paths(files)))
    empty = [path for path in paths if path in modules and any(t.is_meta for t in _own(modules[path]))]
    if not empty:
        return []
    return [
        f"the weights of {', '.join(empty[:3])}{', ...' if empty[3:] else ''} are on the meta device and have no "
        "values: load them first, and the adapter before accelerate offloads them"
    ]


def _own(module: nn.Module) -> Iterable[Tensor]:
    return [module.weight] if isinstance(module, ExpertStack) else module.parameters(recurse=False)


def _sharded(files: AdapterFiles, modules: Mapping[str, nn.Module], rename: Renaming) -> list[str]:
    """The fault of tensors in full for modules of which every process has a part."""
    paths = dict.fromkeys(rename(key.path) for key in files.full)
    parted = [path for path in paths if path in modules and any(map(is_sharded, modules[path].parameters(False)))]
    return [f"tensors in full go into {parted[0]}, which is sharded: load it before fully_shard"] if parted else []


def _factors(files: AdapterFiles, path: str, module: nn.Module) -> LoraFactors:
    kind = kind_of(module)
    assert kind is not None
    weight = kind.frozen(module)
    factors = files.factors(path, tuple(frozen_shape(module)))
    factors = factors.to(device=weight.device, dtype=torch.promote_types(factors.a.dtype, weight.dtype))
    if abs(factors.scale) > torch.finfo(factors.a.dtype).max:
        raise CheckpointError(
            f"{files.folder}: the scale of {path} is {factors.scale:g}, more than {factors.a.dtype} holds: its "
            "lora_alpha cannot be meant"
        )
    if files.config.moved_base is not None and issubclass(kind, LoraLinear):
        return with_moved_base(factors, files.config.moved_base, dense(weight, weight.dtype))
    return unfold(factors, path, files.companion)


def _full(files: AdapterFiles, modules: Mapping[str, nn.Module], rename: Renaming) -> Full:
    """{path: {name: tensor}} of the tensors kept in full, without plain copies of what the base has."""
    full: Full = {}
    for key, tensor in files.full.items():
        own = whole(base_tensor(modules[rename(key.path)], key.name))
        if not (_is_table(key, files.config.lora) and torch.equal(tensor.to(own), own)):
            full.setdefault(rename(key.path), {})[key.name] = tensor
    for path, tensors in files.low_rank.items():
        if B_BIAS in tensors:
            own = whole(base_tensor(modules[rename(path)], "bias"))
            full.setdefault(rename(path), {})["bias"] = files.bias(path, own)
    return full


def _is_table(key: Key, config: LoraConfig) -> bool:
    """True for the embedding tables that PEFT saves unasked: beside their factors, and where it thinks them resized."""
    return key.name == "weight" and not lies_in(key.path, config.modules_to_save)


@torch.no_grad()
def _attach(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    factors: dict[str, LoraFactors],
    full: Full,
    rows: dict[str, TokenRows],
    trainable: bool,
) -> None:
    """In place: attach and fill in."""
    overrides = {path: tuple(tensors) for path, tensors in full.items()}
    attach(model, name, config, factors, overrides, rows, trainable=trainable)
    for path, tensors in full.items():
        owned = override_tensors(model.get_submodule(path), name)
        for tensor_name, tensor in tensors.items():
            owned[tensor_name].copy_(tensor)


def _differences(files: AdapterFiles, model: nn.Module) -> tuple[str, ...]:
    if files.companion.base is None:
        return ()
    return tuple(files.companion.base.differences(fingerprint(model)))


def _report(
    model: nn.Module, name: str, files: AdapterFiles, rename: Renaming, full: Full, unsaid: tuple[str, ...]
) -> LoadReport:
    changed = {path for path in files.low_rank if rename(path) != path}
    notes = list(unsaid)
    stored = files.companion.stored
    elsewhere = () if stored is None else stored.renamed(rename).differences(model)
    if files.config.moved_base is not None:
        notes.append(
            f"trained from {files.config.moved_base} on a changed base; here the base stays and the start is subtracted"
        )
    return LoadReport(
        adapter_name=name,
        modules=tuple(rename(path) for path in files.low_rank),
        full=tuple(full),
        unknown_fields=files.unknown_fields,
        renamed=str(rename) if changed else None,
        base_differences=(*_differences(files, model), *elsewhere),
        changes_nothing=changes_nothing(model, name, full),
        notes=tuple(notes),
    )


def _warn(report: LoadReport, unsaid: tuple[str, ...]) -> None:
    for difference in (*report.base_differences, *unsaid):
        warnings.warn(f"adapter {report.adapter_name!r}: {difference}", LowrankWarning, stacklevel=4)
    if report.changes_nothing:
        warnings.warn(
            f"adapter {report.adapter_name!r} changes nothing: every ΔW is zero", LowrankWarning, stacklevel=4
        )
