"""From `target_modules` to the modules it means, with every pattern accounted for."""

from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn

from lowrank.errors import TargetError, quoted
from lowrank.injection.architectures import query_value
from lowrank.injection.config import LoraConfig
from lowrank.injection.patterns import FUSED, layer_index, matches, matches_name, split_parts, suggestion
from lowrank.injection.routers import routers
from lowrank.injection.traversal import base_modules
from lowrank.layers.kinds import is_linear, refusal
from lowrank.layers.stack import ExpertStack

ALL_LINEAR = "all-linear"
HALVES = {"gate_proj": "gate", "up_proj": "up"}  # parts of gate_up_proj, as they are called where they are modules

Modules = dict[str, nn.Module]  # a model's own modules by path, in order


def named_targets(model: nn.Module) -> Modules:
    """Every module of the base by its path, in order: what injection itself added is left out."""
    return {path: module for path, module in base_modules(model) if path}


def output_heads(model: nn.Module, modules: Modules) -> set[int]:
    """The output head: the modules that turn features into answers, by identity.

    For a transformers model: the output embeddings and, in a classifier, what stands outside the base model.
    """
    heads: set[int] = set()
    output = getattr(model, "get_output_embeddings", None)
    if callable(output) and (head := output()) is not None:
        heads.add(id(head))
    base = getattr(model, "base_model", None)
    if base is not None and base is not model and "Classification" in type(model).__name__:
        inside = {id(module) for module in base.modules()}
        heads |= {id(module) for module in modules.values() if id(module) not in inside}
    return heads


def _stands_for_others(modules: Mapping[str, nn.Module]) -> set[int]:
    """Modules that only hold a weight for others: T5's and BART's `shared`, whose copies in the stacks are called."""
    called = {id(m.weight) for path, m in modules.items() if isinstance(m, nn.Embedding) and _leaf(path) != "shared"}
    return {
        id(m)
        for path, m in modules.items()
        if isinstance(m, nn.Embedding) and _leaf(path) == "shared" and id(m.weight) in called
    }


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _has_defaults(model: nn.Module) -> bool:
    try:
        default_targets(model)
    except TargetError:
        return False
    return True


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The query and value projections of the architecture, as in the paper; an error with candidates where unknown."""
    modules = named_targets(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if names := query_value(str(model_type), {_leaf(path) for path in modules}):
        return names
    leaves = sorted({_leaf(path) for path, module in modules.items() if is_linear(module)})
    what = f"models of type {quoted(model_type)}" if model_type else f"a {type(model).__name__}"
    raise TargetError(
        f"target_modules: the query and value projections of {what} are not known; name them, "
        f'or use "all-linear" (linear modules here: {", ".join(leaves) or "none"})'
    )


def means_all(config: LoraConfig) -> bool:
    """Whether the targets are "all-linear"."""
    return config.target_modules in (ALL_LINEAR, (ALL_LINEAR,))


def _all_linear(model: nn.Module, modules: Modules, config: LoraConfig) -> dict[str, tuple[str, ...]]:
    """Linear modules but the head and routers; stacks too, unless they are named."""
    excluded = output_heads(model, modules)
    sending = routers(modules)
    stacks = config.target_parameters is None
    return {
        path: ()
        for path, module in modules.items()
        if (is_linear(module) and id(module) not in excluded and path not in sending)
        or (stacks and isinstance(module, ExpertStack) and refusal(module) is None)
    }


def _parameters(config: LoraConfig, modules: Modules) -> dict[str, tuple[str, ...]]:
    """The stacks, and the layers of parameters called `weight`, that target_parameters names."""
    names = config.target_parameters or ()
    found: dict[str, tuple[str, ...]] = {}
    parameters = {path: path for path, module in modules.items() if isinstance(module, ExpertStack)}
    parameters |= {f"{path}.weight": path for path, module in modules.items() if "weight" in module._parameters}
    regex = isinstance(names, str) and not FUSED.fullmatch(names)
    for written in [names] if isinstance(names, str) else names:
        name, parts = (written, ()) if regex else split_parts(written)
        pattern = name if regex else (name,)
        hits = [path for said, path in parameters.items() if matches(said, pattern, "target_parameters")]
        if not hits:
            why = _no_match(name, parameters) if regex else _no_parameter(name, parameters, modules)
            raise TargetError(f"target_parameters: {why}")
        for path in hits:
            _mean(found, path, parts, "target_parameters")
    return found


def _mean(found: dict[str, tuple[str, ...]], path: str, parts: tuple[str, ...], field: str) -> None:
    """In place: the target at `path` is meant, by these parts. Raises TargetError where it is already, by others."""
    if found.setdefault(path, parts) != parts:
        raise TargetError(f"{field}: {path} is meant twice, as a whole and by parts, or by other parts")


def _no_parameter(name: str, parameters: Mapping[str, str], modules: Modules) -> str:
    """Why the name means no parameter that can be adapted."""
    for path, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and matches_name(f"{path}.{leaf}", name):
                shape = list(parameter.shape)
                return (
                    f"{quoted(name)} names {path}.{leaf}, {shape}, which is neither the weight of a layer nor a stack "
                    f"of experts that is known here: a {type(module).__name__} holds it"
                )
        computed = module._modules.get("parametrizations")  # what torch's parametrize leaves of parameters
        for leaf in computed._modules if computed is not None else ():
            if matches_name(f"{path}.{leaf}", name):
                return (
                    f"{quoted(name)} names {path}.{leaf}, which a parametrisation computes (bitsandbytes' "
                    "replace_parameter_4bit is one): load the model as numbers, and quantise it by lowrank.quantise"
                )
    leaf = name.rpartition(".")[2]
    apart = leaf in HALVES and any(matches_name(path, "gate_up_proj") for path in parameters)
    hint = f'; it is a part of a stack here: "gate_up_proj[{HALVES[leaf]}]"' if apart else ""
    return f"{quoted(name)} matches no parameter{suggestion(name, parameters)}{hint}"


def _by_regex(regex: str, modules: Modules) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {p: () for p in modules if matches(p, regex, "target_modules")}
    if not found:
        raise TargetError(f"target_modules: {_no_match(regex, modules)}")
    return found


def _no_match(regex: str, paths: Iterable[str]) -> str:
    return (
        f"{quoted(regex)}, a string, is one regular expression for a whole path and matches none"
        f"{suggestion(regex, paths)}; for a name that ends the path, give a list: [{quoted(regex)}]"
    )


def _by_names(names: Iterable[str], modules: Modules, everything: Modules) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for pattern in names:
        name, parts = split_parts(pattern)
        hits = [path for path in modules if matches_name(path, name)]
        if not hits and any(matches_name(path, name) for path in everything):
            raise TargetError(
                f"target_modules: {quoted(name)} is no module here but a stacked parameter of experts: name it in "
                "target_parameters"
            )
        if not hits:
            raise TargetError(f"target_modules: {quoted(name)} matches no module{suggestion(name, modules)}")
        for path in hits:
            _mean(found, path, parts, "target_modules")
    return found


def _in_layers(config: LoraConfig, found: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    asked = config.layers_to_transform
    wanted = {asked} if isinstance(asked, int) else set(cast(tuple[int, ...], asked))
    where = {path: layer_index(path, config.layers_pattern) for path in found}
    if missing := wanted - set(where.values()):
        present = sorted({index for index in where.values() if index is not None})
        raise TargetError(
            f"layers_to_transform: no target lies in layer {', '.join(map(str, sorted(missing)))}; targets lie in "
            f"layers {present if present else 'without a number: set layers_pattern to the name of the list of layers'}"
        )
    return {path: parts for path, parts in found.items() if where[path] in wanted}


def saved_modules(modules: Modules, config: LoraConfig) -> Modules:
    """Those of `modules` that `modules_to_save` names, every name accounted for."""
    found: Modules = {}
    for name in config.modules_to_save:
        hits = {path: module for path, module in modules.items() if matches_name(path, name)}
        if not hits:
            raise TargetError(f"modules_to_save: {quoted(name)} matches no module{suggestion(name, modules)}")
        found |= hits
    return found


def find_targets(
    model: nn.Module, modules: Modules, config: LoraConfig, saved: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """{path: parts} of every one of `modules` to adapt, in model order; parts are () where the whole weight is meant.

    Raises TargetError for the first pattern that matches nothing, naming the nearest module names.
    """
    found = _all_linear(model, modules, config) if means_all(config) else _by_modules(model, modules, config)
    found |= {path: parts for path, parts in _parameters(config, modules).items() if path not in found}
    if config.layers_to_transform is not None and found:
        found = _in_layers(config, found)
    found = _without(config, found, modules, set(saved))
    if not found:
        raise TargetError("target_modules: nothing is left to adapt after the exclusions and filters")
    return {path: found[path] for path in modules if path in found}


def _by_modules(model: nn.Module, modules: Modules, config: LoraConfig) -> dict[str, tuple[str, ...]]:
    """The modules that target_modules means; stacks of experts are parameters, and it does not mean those."""
    patterns = config.target_modules
    if patterns is None and config.target_parameters is not None and not _has_defaults(model):
        return {}
    patterns = default_targets(model) if patterns is None else patterns
    layers = {path: module for path, module in modules.items() if not isinstance(module, ExpertStack)}
    if isinstance(patterns, str) and FUSED.fullmatch(patterns):
        return _by_names([patterns], layers, modules)
    if isinstance(patterns, str):
        return _by_regex(patterns, layers) if patterns else {}
    return _by_names(patterns, layers, modules)


def _without(
    config: LoraConfig, found: dict[str, tuple[str, ...]], modules: Modules, saved: set[str]
) -> dict[str, tuple[str, ...]]:
    excluded = config.exclude_modules
    if excluded is not None:
        for name in [excluded] if isinstance(excluded, str) else excluded:
            pattern = name if isinstance(excluded, str) else (name,)
            if not any(matches(path, pattern, "exclude_modules") for path in modules):
                raise TargetError(f"exclude_modules: {quoted(name)} matches no module{suggestion(name, modules)}")
        found = {p: parts for p, parts in found.items() if not _is_excluded(p, modules[p], excluded)}
    return {
        path: parts for path, parts in found.items() if not any(path == s or path.startswith(s + ".") for s in saved)
    }


def _is_excluded(path: str, module: nn.Module, excluded: str | tuple[str, ...] | list[str]) -> bool:
    """Whether it is named, or is a stack of a module that is."""
    paths = [path, path.rpartition(".")[0]] if isinstance(module, ExpertStack) else [path]
    return any(matches(one, excluded, "exclude_modules") for one in paths)


def check_adaptable(modules: Mapping[str, nn.Module], targets: Iterable[str]) -> None:
    """Raise one TargetError that lists every target which cannot be adapted, and why."""
    stands_in = _stands_for_others(modules)
    faults = []
    for path in targets:
        module = modules[path]
        why = refusal(module)
        if id(module) in stands_in:
            why = "it is never called, so the adapter would have no effect; name the embeddings that share its weight"
        if why is not None:
            faults.append(f"{path}: {why}")
    if faults:
        raise TargetError("these targets cannot be adapted: " + "; ".join(faults))
