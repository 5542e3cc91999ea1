"""The adapters a model holds: which there are, which answer, which train."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lowrank.errors import LowrankError
from lowrank.injection.checkpointing import remove_hooks
from lowrank.injection.config import LoraConfig
from lowrank.injection.saving import remove_saving
from lowrank.injection.state import ATTRIBUTE, find_state, require_adapter, require_state
from lowrank.injection.traversal import base_modules
from lowrank.layers.base import LoraLayer, restore
from lowrank.layers.overrides import BASE, override_tensors, remove_override, select_override


def adapter_configs(model: nn.Module) -> dict[str, LoraConfig]:
    """{name: config} of every adapter of the model; empty for a plain model."""
    state = find_state(model)
    return dict(state.configs) if state else {}


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The adapters whose changes are in the model's answers now."""
    state = find_state(model)
    return state.active if state else ()


def trained_adapters(model: nn.Module) -> tuple[str, ...]:
    """The adapters whose tensors were last asked to require gradients."""
    state = find_state(model)
    return state.trained if state else ()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of every adapted module."""
    for path, module in base_modules(model):
        if isinstance(module, LoraLayer):
            yield path, module


def override_modules(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module of which the adapter owns tensors in full."""
    for path, module in base_modules(model):
        if override_tensors(module, adapter):
            yield path, module


def set_active(model: nn.Module, names: Iterable[str], trainable: Iterable[str] = ()) -> None:
    """In place: exactly `names` answer, their changes added; of those, `trainable` require gradients and no others.

    Raises LowrankError, before anything changes, for unknown names, names given twice, a trainable adapter that is not
    active, and two active adapters that each bring a full copy of the same tensor.
    """
    state = require_state(model)
    names, trainable = tuple(names), tuple(trainable)
    for name in (*names, *trainable):
        require_adapter(model, name)
    if len(set(names)) != len(names):
        raise LowrankError(f"set_active: an adapter is named twice in {names}")
    if idle := set(trainable) - set(names):
        raise LowrankError(f"set_active: {', '.join(sorted(idle))} cannot be trained without being active")
    modules = dict(base_modules(model))
    owners = {path: _owner(path, module, names) for path, module in modules.items()}
    changed = set(state.trained) | set(trainable)  # the others do not require gradients, however many there are
    for path, module in modules.items():
        select_override(module, owners[path])
        if isinstance(module, LoraLayer):
            module.activate(tuple(name for name in names if name in module.adapter_names))
        for name in changed:
            _set_trainable(module, name, name in trainable)
    state.active, state.trained = names, trainable


def _owner(path: str, module: nn.Module, names: tuple[str, ...]) -> str:
    """Whose full tensors the module should use: an adapter's, or the base's."""
    owners = [name for name in names if override_tensors(module, name)]
    if len(owners) > 1:
        raise LowrankError(
            f"set_active: {' and '.join(owners)} each bring a full copy of {path or 'the model'}, "
            "and only one can be in use"
        )
    return owners[0] if owners else BASE


def _set_trainable(module: nn.Module, name: str, trained: bool) -> None:
    """In place: the adapter's tensors in this module require gradients, or do not."""
    if isinstance(module, LoraLayer) and name in module.adapter_names:
        for parameter in module.factors(name).trainable():
            parameter.requires_grad_(trained)
    for tensor in override_tensors(module, name).values():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(trained)


def delete_adapter(model: nn.Module, name: str) -> None:
    """In place: forget one adapter. With the last one gone the model is the plain base again, bit for bit."""
    state = require_state(model)
    require_adapter(model, name)
    for _, module in list(base_modules(model)):
        remove_override(module, name)
        if isinstance(module, LoraLayer) and name in module.adapter_names:
            module.remove_factors(name)
            if not module.adapter_names:
                restore(module)
    del state.configs[name]
    state.active = tuple(active for active in state.active if active != name)
    state.trained = tuple(trained for trained in state.trained if trained != name)
    if not state.configs:
        forget(model)


def forget(model: nn.Module) -> None:
    """In place: drop the state and hooks of a model that has no adapters left, and let its base train as before."""
    state = require_state(model)
    remove_hooks(model)
    remove_saving(model)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in state.trained_before)
    del model.__dict__[ATTRIBUTE]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base's answers, bit for bit, inside the block; the adapters that were active answer again after it."""
    state = require_state(model)
    active, trained = state.active, state.trained
    set_active(model, ())
    try:
        yield model
    finally:
        set_active(model, active, trained)
