"""From a model and a LoraConfig to an InjectionPlan. The model is read, never changed."""

from torch import nn

from lowrank.core.scaling import lora_scale
from lowrank.core.stored.of_module import frozen_shape, is_stored
from lowrank.errors import ConfigError, TargetError, some
from lowrank.injection.config import LoraConfig
from lowrank.injection.fused import Layout, equal_thirds_of, gate_and_up_of, part_rows
from lowrank.injection.left_out import emptied, left_out
from lowrank.injection.patterns import check_patterns, pattern_value
from lowrank.injection.plan import InjectionPlan, PlanEntry
from lowrank.injection.targets import (
    check_adaptable,
    find_targets,
    means_all,
    named_targets,
    output_heads,
    saved_modules,
)
from lowrank.injection.tied import sharing_warnings
from lowrank.injection.token_rows import plan_rows, row_warnings
from lowrank.injection.traversal import parameter_count
from lowrank.layers.attention import LoraAttention
from lowrank.layers.base import LoraLayer, dimensions
from lowrank.layers.experts import gate_and_up_in_turn
from lowrank.layers.kinds import kind_of
from lowrank.layers.overrides import own_tensors
from lowrank.layers.stack import ExpertStack, LoraStack


def plan(model: nn.Module, config: LoraConfig) -> InjectionPlan:
    """What `inject(model, config)` would do.

    Raises TargetError or ConfigError for patterns that match nothing, modules that cannot be adapted, parts whose rows
    are unknown, and ranks no target can hold.
    """
    modules = named_targets(model)
    saved = saved_modules(modules, config)
    targets = find_targets(model, modules, config, saved)
    check_adaptable(modules, targets)
    entries = tuple(_entry(model, path, modules[path], parts, config) for path, parts in targets.items())
    check_patterns("rank_pattern", config.rank_pattern, targets)
    check_patterns("alpha_pattern", config.alpha_pattern, targets)
    _check_dora(config, entries, modules)
    biases = _biases(modules, config, set(targets), set(saved))
    rows = plan_rows(model, modules, config, targets, saved)
    packed = _packed(saved)
    full = [packed.get(id(p), ("", p.numel()))[1] for module in saved.values() for p in module.parameters()]
    full += [len(entry.indices) * entry.d for entry in rows]
    full += [p.numel() for names in biases.values() for p in names]
    line, missed = left_out(model, modules, targets, output_heads(model, modules)) if means_all(config) else ("", None)
    return InjectionPlan(
        entries=entries,
        saved_modules=tuple(saved),
        biases=tuple(biases),
        warnings=(
            *_rank_warnings(entries),
            *sharing_warnings(modules, set(targets)),
            *row_warnings(modules, rows, config),
            *emptied(config, modules, targets),
            *_held_as_numbers(packed),
            *([missed] if missed else []),
        ),
        left_out=line,
        base_parameters=parameter_count([model, *modules.values()]),
        full_parameters=sum(full),
        dora=config.use_dora,
        rows=rows,
    )


def _packed(saved: dict[str, nn.Module]) -> dict[int, tuple[str, int]]:
    """{id of a weight in a stored form: (its module's path, how many numbers it is)} in modules to save in full."""
    found = {}
    for root, module in saved.items():
        for path, inner in module.named_modules(prefix=root):
            if is_stored(inner):
                try:
                    found[id(inner._parameters["weight"])] = path, frozen_shape(inner).numel()
                except TargetError as error:
                    raise TargetError(f"modules_to_save: {path}: {error}") from error
    return found


def _held_as_numbers(packed: dict[int, tuple[str, int]]) -> list[str]:
    if not packed:
        return []
    paths, numbers = zip(*packed.values(), strict=True)
    copies = f"{'is' if len(paths) == 1 else 'are'} quantised; what the adapter trains of it in full is numbers"
    return [f"modules_to_save: {some(paths)} {copies}, {sum(numbers):,} of them"]


def _entry(
    model: nn.Module, path: str, module: nn.Module, part_names: tuple[str, ...], config: LoraConfig
) -> PlanEntry:
    kind = kind_of(module)
    assert kind is not None
    d, k = dimensions(kind, module)
    experts = frozen_shape(module)[0] if issubclass(kind, LoraStack) else 0
    usual = config.expert_rank if experts and config.expert_rank is not None else config.r
    rank = pattern_value(path, config.rank_pattern, usual, "rank_pattern")
    alpha = pattern_value(path, config.alpha_pattern, config.lora_alpha, "alpha_pattern")
    layout = _own_layout(kind, module, d)
    parts = part_rows(path, d, part_names, getattr(model, "config", None), layout) if part_names else ()
    scale = lora_scale(alpha, rank, config.use_rslora)
    return PlanEntry(path, kind, d, k, rank, alpha, scale, parts, part_names, experts)


def _own_layout(kind: type[LoraLayer], module: nn.Module, d: int) -> Layout | None:
    """The row blocks of a module that tells them itself, whatever the model."""
    if issubclass(kind, LoraAttention):
        return equal_thirds_of(d)
    in_turn = gate_and_up_in_turn(module.experts, module.parameter) if isinstance(module, ExpertStack) else None
    return None if in_turn is None else gate_and_up_of(d, in_turn)


def _check_dora(config: LoraConfig, entries: tuple[PlanEntry, ...], modules: dict[str, nn.Module]) -> None:
    if not config.use_dora:
        return
    grouped = {path for path, module in modules.items() if getattr(module, "groups", 1) != 1}
    unfit = [e.label for e in entries if not e.kind.supports_dora or e.parts or e.path in grouped]
    if unfit:
        raise TargetError(
            "use_dora works for whole weights of Linear, Conv1D, Embedding, convolutions without groups and stacked "
            f"experts, not for {', '.join(unfit)}: exclude them, or leave it off"
        )


def _rank_warnings(entries: tuple[PlanEntry, ...]) -> list[str]:
    above = [entry for entry in entries if entry.rank > min(*entry.rows, entry.k)]
    if not above:
        return []
    named = some(f"{entry.label} (r={entry.rank}, {entry.shape})" for entry in above)
    if len(above) == len(entries):
        raise ConfigError(f"r is above min(d, k) of every target, where a full matrix is smaller: {named}")
    return [f"r is above min(d, k), more than the layer can use, in {named}"]


def _biases(
    modules: dict[str, nn.Module], config: LoraConfig, targets: set[str], saved: set[str]
) -> dict[str, list[nn.Parameter]]:
    """{path: its bias parameters} of the modules whose bias is trained."""
    if config.bias == "none":
        return {}
    paths = [
        path
        for path in modules
        if (config.bias == "all" or path in targets)
        and not any(path == name or path.startswith(name + ".") for name in saved)
    ]
    found = {path: [modules[path]._parameters[name] for name in bias_names(modules[path])] for path in paths}
    return {path: [p for p in biases if p is not None] for path, biases in found.items() if biases}


def bias_names(module: nn.Module) -> list[str]:
    """The names of a module's own bias parameters (`bias`; `in_proj_bias` of nn.MultiheadAttention)."""
    return [name for name in own_tensors(module) if "bias" in name and name in module._parameters]
