"""From `target_modules` to the modules it means, with every pattern accounted for."""

from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn

from lowrank.errors import TargetError
from lowrank.injection.architectures import query_value
from lowrank.injection.config import LoraConfig
from lowrank.injection.patterns import FUSED, layer_index, matches, matches_name, split_parts, suggestion
from lowrank.injection.traversal import base_modules
from lowrank.layers.kinds import is_linear, refusal

ALL_LINEAR = "all-linear"

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


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The query and value projections of the architecture, as in the paper; an error with candidates where unknown."""
    modules = named_targets(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if names := query_value(str(model_type), {_leaf(path) for path in modules}):
        return names
    leaves = sorted({_leaf(path) for path, module in modules.items() if is_linear(module)})
    what = f"models of type {model_type!r}" if model_type else f"a {type(model).__name__}"
    raise TargetError(
        f"target_modules: the query and value projections of {what} are not known; name them, "
        f'or use "all-linear" (linear modules here: {", ".join(leaves) or "none"})'
    )


def means_all(config: LoraConfig) -> bool:
    """Whether the targets are "all-linear"."""
    return config.target_modules in (ALL_LINEAR, (ALL_LINEAR,))


def _all_linear(model: nn.Module, modules: Modules) -> dict[str, tuple[str, ...]]:
    excluded = output_heads(model, modules)
    return {path: () for path, module in modules.items() if is_linear(module) and id(module) not in excluded}


def _by_regex(regex: str, modules: Modules) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {p: () for p in modules if matches(p, regex, "target_modules")}
    if not found:
        raise TargetError(
            f"target_modules={regex!r}, a string, is one regular expression for the whole path of a module and "
            f"matches none{suggestion(regex, modules)}; for a name that ends the path, give a list: [{regex!r}]"
        )
    return found


def _by_names(config: LoraConfig, names: Iterable[str], modules: Modules) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for pattern in names:
        name, parts = split_parts(pattern)
        hits = [path for path in modules if matches_name(path, name)]
        if not hits:
            raise TargetError(f"target_modules: {name!r} matches no module{suggestion(name, modules)}")
        for path in hits:
            if found.get(path, parts) != parts:
                raise TargetError(f"target_modules: {path} is meant twice, as a whole and by parts, or by other parts")
            found[path] = parts
    if config.layers_to_transform is None:
        return found
    return _in_layers(config, found)


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
            raise TargetError(f"modules_to_save: {name!r} matches no module{suggestion(name, modules)}")
        found |= hits
    return found


def find_targets(
    model: nn.Module, modules: Modules, config: LoraConfig, saved: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """{path: parts} of every one of `modules` to adapt, in model order; parts are () where the whole weight is meant.

    Raises TargetError for the first pattern that matches nothing, naming the nearest module names.
    """
    patterns = default_targets(model) if config.target_modules is None else config.target_modules
    if means_all(config):
        found = _all_linear(model, modules)
    elif isinstance(patterns, str) and FUSED.fullmatch(patterns):
        found = _by_names(config, [patterns], modules)
    elif isinstance(patterns, str):
        found = _by_regex(patterns, modules)
    else:
        found = _by_names(config, patterns, modules)
    found = _without(config, found, modules, set(saved))
    if not found:
        raise TargetError("target_modules: nothing is left to adapt after the exclusions and filters")
    return {path: found[path] for path in modules if path in found}


def _without(
    config: LoraConfig, found: dict[str, tuple[str, ...]], modules: Modules, saved: set[str]
) -> dict[str, tuple[str, ...]]:
    excluded = config.exclude_modules
    if excluded is not None:
        for name in [excluded] if isinstance(excluded, str) else excluded:
            pattern = name if isinstance(excluded, str) else (name,)
            if not any(matches(path, pattern, "exclude_modules") for path in modules):
                raise TargetError(f"exclude_modules: {name!r} matches no module{suggestion(name, modules)}")
        found = {p: parts for p, parts in found.items() if not matches(p, excluded, "exclude_modules")}
    return {
        path: parts for path, parts in found.items() if not any(path == s or path.startswith(s + ".") for s in saved)
    }


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
