"""Injection: a plan becomes factors, and factors become part of the model."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lowrank.core.factors import LoraFactors
from lowrank.core.init import find_init
from lowrank.core.stored.of_module import is_stored
from lowrank.core.token_rows import TokenRows
from lowrank.errors import ConfigError, LowrankWarning, quoted
from lowrank.injection.adapters import switch
from lowrank.injection.checkpointing import add_hooks
from lowrank.injection.config import LoraConfig
from lowrank.injection.creation import create_factors
from lowrank.injection.dead import FirstBackward
from lowrank.injection.paths import plain_reason
from lowrank.injection.plan import InjectionPlan
from lowrank.injection.planning import bias_names, plan
from lowrank.injection.presence import record, settle
from lowrank.injection.repacking import keep_stored
from lowrank.injection.rounds import add_rounds
from lowrank.injection.saving import add_saving
from lowrank.injection.state import ATTRIBUTE, AdapterState, check_trainable_here, check_unfolded, find_state
from lowrank.injection.targets import named_targets
from lowrank.injection.token_rows import make_rows
from lowrank.injection.traversal import base_modules
from lowrank.injection.undo import or_as_it_was
from lowrank.layers.base import LoraLayer, extend
from lowrank.layers.kinds import kind_of
from lowrank.layers.overrides import add_override, own_tensors
from lowrank.layers.quantised import LoraQuantised

ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def inject(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> InjectionPlan:
    """In place: give `model` a new adapter, h = W0·x + s·B·A·x on every target, and train nothing but it.

    The new adapter becomes the only active one; `set_active` makes several active. Module objects, parameter names and
    the model's class stay as they are. With every initialisation but "random" the model's answers are unchanged.

    Returns the plan that was carried out (print it for a table). Raises ConfigError or TargetError before anything is
    changed; warns (LowrankWarning) of what works but is probably not meant.
    """
    check_trainable_here(model)
    check_new_name(model, adapter_name)
    todo = plan(model, config)
    init = find_init(config.init_lora_weights)
    modules = named_targets(model)
    factors = {entry.path: create_factors(entry, modules[entry.path], config, init) for entry in todo.entries}
    with or_as_it_was(model, adapter_name, config):
        rows = make_rows(modules, todo.rows)
        attach(model, adapter_name, config, factors, _full_tensors(modules, todo), rows, trainable=True)
    for text in todo.warnings:
        warnings.warn(text, LowrankWarning, stacklevel=2)
    return replace(todo, plain_paths=tuple(_plain_paths(named_targets(model), todo)))


def _plain_paths(modules: dict[str, nn.Module], done: InjectionPlan) -> list[str]:
    """One "reason: layers" for every reason why layers are not computed by the fused function."""
    by_reason: dict[str, list[str]] = {}
    for entry in done.entries:
        layer = modules[entry.path]
        reason = plain_reason(layer) if isinstance(layer, LoraLayer) else None
        if reason is not None:
            by_reason.setdefault(reason, []).append(entry.path)
    return [f"{reason}: {', '.join(paths)}" for reason, paths in by_reason.items()]


def check_new_name(model: nn.Module, adapter_name: str) -> None:
    """Raise ConfigError for an adapter name that is taken or could not be a file name.

    Before that, LowrankError inside of a `merged` block.
    """
    check_unfolded(model, f"a new adapter {quoted(adapter_name)}")
    if not ADAPTER_NAME.fullmatch(adapter_name):
        raise ConfigError(
            f"adapter_name={quoted(adapter_name)}: use 1 to 64 letters, digits, dots, underscores and dashes"
        )
    state = find_state(model)
    if state is not None and adapter_name in state.configs:
        raise ConfigError(
            f"this model already has an adapter {quoted(adapter_name)}: choose another adapter_name, "
            "or delete_adapter first"
        )


def attach(
    model: nn.Module,
    adapter_name: str,
    config: LoraConfig,
    factors: Mapping[str, LoraFactors],
    overrides: Mapping[str, tuple[str, ...]],
    rows: Mapping[str, TokenRows],
    *,
    trainable: bool,
) -> None:
    """In place: make ready factors part of the model, under a new name, and the only active ones.

    factors: {path: factors}; overrides: {path: names of the module's own tensors that the adapter owns in full}, which
    start as copies of the base's; rows: {path: rows of the module's weight}, shared by modules that are tied. Nothing
    is checked here that `plan` or a loader has checked; LowrankError for adapted modules that were replaced.
    """
    settle(model)
    modules = dict(base_modules(model))
    state = find_state(model) or _begin(model)
    with state.turnstile.change(model):
        for path, values in factors.items():
            layer = extend(modules[path], _kind(modules[path]))
            layer.add_factors(adapter_name, values.train(layer.training))
        for path, owned in rows.items():
            extend(modules[path], _kind(modules[path])).add_rows(adapter_name, owned)
        for path, names in overrides.items():
            if "weight" in names and is_stored(modules[path]):
                extend(modules[path], LoraQuantised)  # which computes with numbers too
            add_override(modules[path], adapter_name, names)
        state.configs[adapter_name] = config
        record(state, modules)
        switch(model, (adapter_name,), (adapter_name,) if trainable else ())
        state.unwatch()
        if trainable:
            state.unwatch = FirstBackward(model, adapter_name).stop


def _begin(model: nn.Module) -> AdapterState:
    """In place: freeze a plain model and hook it."""
    every_name = model.named_parameters(remove_duplicate=False)  # a merge may part tied weights
    state = AdapterState(trained_before=frozenset(name for name, p in every_name if p.requires_grad))
    model.__dict__[ATTRIBUTE] = state
    model.requires_grad_(False)
    keep_stored(model)
    add_hooks(model)
    add_rounds(model)
    add_saving(model)
    return state


def _kind(module: nn.Module) -> type[LoraLayer]:
    kind = kind_of(module)
    assert kind is not None, f"{type(module).__name__} was not checked before attach"
    return kind


def _full_tensors(modules: dict[str, nn.Module], todo: InjectionPlan) -> dict[str, tuple[str, ...]]:
    """{path: tensor names} of everything the plan trains in full."""
    full = {path: tuple(bias_names(modules[path])) for path in todo.biases}
    for saved in todo.saved_modules:
        for path, module in modules.items():
            if path == saved or path.startswith(saved + "."):
                full[path] = tuple(own_tensors(module))
    return {path: names for path, names in full.items() if names}
