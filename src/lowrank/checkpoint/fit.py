"""Whether an adapter's files fit a model: every fault found, with got and wanted shapes and the nearest names."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from lowrank.checkpoint.keys import B_BIAS, MAGNITUDE, Key, full_key, low_rank_key
from lowrank.checkpoint.layout import kind_in_file, magnitude_shape, pair_roles, wanted_shapes
from lowrank.checkpoint.read import AdapterFiles
from lowrank.checkpoint.renaming import Renaming, lies_in
from lowrank.checkpoint.row_files import row_fit_faults
from lowrank.core.stored.of_module import frozen_shape
from lowrank.errors import TargetError
from lowrank.injection.patterns import layer_index, matches, suggestion
from lowrank.injection.targets import check_adaptable
from lowrank.layers.kinds import kind_of
from lowrank.layers.overrides import own_tensors
from lowrank.layers.stack import ExpertStack


def fit_faults(files: AdapterFiles, modules: Mapping[str, nn.Module], rename: Renaming) -> list[str]:
    """Why `files` cannot be loaded onto a model whose base modules are `modules`; empty where they can."""
    faults: list[str] = []
    targets = {path: rename(path) for path in files.low_rank}
    for path, target in targets.items():
        module = modules.get(target)
        if module is None:
            keys = ", ".join(low_rank_key(path, role) for role in sorted(files.low_rank[path]))
            faults.append(f"unexpected {keys}: the model has no module {target}{suggestion(target, modules)}")
        elif kind_of(module) is not None:
            faults += _pair_faults(files, path, module)
    try:
        check_adaptable(modules, [target for target in targets.values() if target in modules])
    except TargetError as error:
        faults.append(str(error))
    present = {_full_name(key, rename) for key in files.full}
    for key in files.full:
        faults += _full_faults(files, key, modules, rename)
    faults += row_fit_faults(files, modules, rename)
    faults += _missing_modules(files, modules, set(targets.values()))
    return faults + _missing_full(files, modules, present)


def _pair_faults(files: AdapterFiles, path: str, module: nn.Module) -> list[str]:
    kind = kind_of(module)
    assert kind is not None
    weight = tuple(frozen_shape(module))
    name = kind_in_file(kind.kind, MAGNITUDE in files.low_rank[path])
    shapes = dict(zip(pair_roles(kind.kind), _wanted(files, path, name, module), strict=True))
    if (bias := module._parameters.get("bias")) is not None:
        shapes[B_BIAS] = tuple(bias.shape)
    elif B_BIAS in files.low_rank[path]:
        return [f"{low_rank_key(path, B_BIAS)} is part of a bias, and {path} has none to add it to"]
    if kind.supports_dora:
        shapes[MAGNITUDE] = magnitude_shape(kind.kind, weight)
    faults = []
    tensors = files.low_rank[path]
    if unfit := tensors.keys() - shapes.keys():
        keys = ", ".join(low_rank_key(path, role) for role in sorted(unfit))
        faults.append(f"unexpected {keys}: {path} is a {type(module).__name__} here, of shape {list(weight)}")
    for role, wanted in shapes.items():
        if role in tensors and tuple(tensors[role].shape) != wanted:
            key = low_rank_key(path, role)
            faults.append(f"{key} has shape {list(tensors[role].shape)}, wanted {list(wanted)}")
    return faults


def _wanted(files: AdapterFiles, path: str, kind: str, module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    groups = cast(int, getattr(module, "groups", 1)) if kind == "conv" else 1
    return wanted_shapes(kind, tuple(frozen_shape(module)), files.config.rank(path), groups)


def _full_name(key: Key, rename: Renaming) -> str:
    return f"{rename(key.path)}.{key.name}".removeprefix(".")


def _full_faults(files: AdapterFiles, key: Key, modules: Mapping[str, nn.Module], rename: Renaming) -> list[str]:
    written = full_key(key.path, key.name, adapted=key.of_base)
    module = modules.get(rename(key.path))
    if module is None or key.name not in own_tensors(module):
        names = [f"{path}.{name}".removeprefix(".") for path, m in modules.items() for name in own_tensors(m)]
        return [f"unexpected {written}{suggestion(_full_name(key, rename), names)}"]
    own = frozen_shape(module) if key.name == "weight" else cast(Tensor, getattr(module, key.name)).shape
    got, wanted = list(files.full[key].shape), list(own)
    return [] if got == wanted else [f"{written} has shape {got}, wanted {wanted}"]


def _missing_modules(files: AdapterFiles, modules: Mapping[str, nn.Module], targets: set[str]) -> list[str]:
    """Modules that `target_modules` names beside others that are in the file: the file is not whole, or the base is

    another one. Names that match nothing of what is in the file are an old file's, and say nothing.
    """
    config = files.config.lora
    if config.target_modules is None and config.target_parameters is None:
        return []
    named = {path for path, module in modules.items() if path and kind_of(module) and _is_target(files, path, module)}
    if not named & targets:
        return []
    missing = [path for path in modules if path in named - targets]
    return [
        f"missing {', '.join(low_rank_key(path, role) for role in pair_roles(_kind_name(modules[path])))} "
        f"({_field(modules[path])} in adapter_config.json names {path} too)"
        for path in missing
    ]


def _kind_name(module: nn.Module) -> str:
    kind = kind_of(module)
    return kind.kind if kind else "linear"


def _field(module: nn.Module) -> str:
    return "target_parameters" if isinstance(module, ExpertStack) else "target_modules"


def _is_target(files: AdapterFiles, path: str, module: nn.Module) -> bool:
    config = files.config.lora
    if config.exclude_modules is not None and matches(path, config.exclude_modules, "exclude_modules"):
        return False
    if lies_in(path, config.modules_to_save):
        return False
    names = config.target_parameters if isinstance(module, ExpertStack) else config.target_modules
    if names is None or not matches(path, names, _field(module)):
        return False
    layers = config.layers_to_transform
    if layers is None:
        return True
    index = layer_index(path, config.layers_pattern)
    return index in ([layers] if isinstance(layers, int) else layers)


def _missing_full(files: AdapterFiles, modules: Mapping[str, nn.Module], present: set[str]) -> list[str]:
    """Tensors of modules that `modules_to_save` names and the file does not have."""
    saved = files.config.lora.modules_to_save
    wanted = {
        f"{path}.{name}": (path, name)
        for path, module in modules.items()
        if lies_in(path, saved)
        for name in own_tensors(module)
    }
    return [
        f"missing {full_key(path, name, adapted=False)} (modules_to_save)"
        for full, (path, name) in wanted.items()
        if full not in present
    ]


__all__ = ["fit_faults"]
