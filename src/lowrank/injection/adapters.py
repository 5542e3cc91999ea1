"""The adapters a model holds: which there are, which answer, which train."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lowrank.errors import LowrankError, some
from lowrank.injection.checkpointing import remove_hooks
from lowrank.injection.config import LoraConfig
from lowrank.injection.presence import is_adapted, set_trainable, settle
from lowrank.injection.repacking import let_repack
from lowrank.injection.rounds import remove_rounds
from lowrank.injection.saving import remove_saving
from lowrank.injection.state import ATTRIBUTE, check_unfolded, find_state, require_adapter, require_state
from lowrank.injection.traversal import base_modules
from lowrank.layers.base import PARAMETRISED, LoraLayer, let_go
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

    A forward of the model that runs in another thread is waited for, so that it sees the old adapters or the new ones.

    Raises LowrankError, before anything changes, for unknown names, names given twice, a trainable adapter that is not
    active, two active adapters that each bring a full copy of the same tensor, and inside of a `merged` block.
    """
    state = require_state(model)
    check_unfolded(model, "set_active")
    names, trainable = tuple(names), tuple(trainable)
    with state.turnstile.change(model):
        settle(model)
        _check_choice(model, names, trainable)
        switch(model, names, trainable)


def _check_choice(model: nn.Module, names: tuple[str, ...], trainable: tuple[str, ...]) -> None:
    for name in (*names, *trainable):
        require_adapter(model, name)
    if len(set(names)) != len(names):
        raise LowrankError(f"set_active: an adapter is named twice in {names}")
    if idle := set(trainable) - set(names):
        raise LowrankError(f"set_active: {', '.join(sorted(idle))} cannot be trained without being active")


def switch(model: nn.Module, names: tuple[str, ...], trainable: tuple[str, ...]) -> None:
    """In place: `set_active` of names that were checked, by one who holds the turnstile."""
    state = require_state(model)
    modules = {path: place.module for path, place in state.places.items()}
    owners = {path: _owner(path, module, names) for path, module in modules.items()}
    _check_rows(modules, names)
    changed = set(state.trained) | set(trainable)  # the others do not require gradients, however many there are
    for path, module in modules.items():
        select_override(module, owners[path])
        if isinstance(module, LoraLayer):
            module.activate_rows(name for name in names if name in module.row_names)
            module.activate(tuple(name for name in names if name in module.adapter_names))
        for name in changed:
            set_trainable(module, name, name in trainable)
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


def _check_rows(modules: Mapping[str, nn.Module], names: tuple[str, ...]) -> None:
    rowed = {path: m for path, m in modules.items() if isinstance(m, LoraLayer) and m.row_names}
    for path, module in rowed.items():
        owners: dict[int, str] = {}
        for name in (name for name in names if name in module.row_names):
            for row in module.rows(name).indices:
                if owners.setdefault(row, name) != name:
                    raise LowrankError(
                        f"set_active: {owners[row]} and {name} each bring row {row} of {path}, "
                        "and only one can be in use"
                    )


def row_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of every module of whose weight the adapter owns rows."""
    for path, layer in lora_layers(model):
        if adapter in layer.row_names:
            yield path, layer


def delete_adapter(model: nn.Module, name: str) -> None:
    """In place: forget one adapter. With the last one gone the model is the plain base again, bit for bit."""
    require_adapter(model, name)
    drop(model, [name], "delete_adapter")


def check_release(model: nn.Module, names: Collection[str]) -> None:
    """Raise LowrankError where a layer that holds no others than `names` cannot be plain again.

    A parametrisation made a class of its own of the adapted one, and the weight is known by that class alone.
    """
    emptied = [(path, layer) for path, layer in lora_layers(model) if set(layer.adapter_names) <= set(names)]
    if faults := [path or "the model" for path, layer in emptied if is_parametrized(layer)]:
        raise LowrankError(f"{some(faults)} cannot be plain again: {PARAMETRISED}")


def drop(model: nn.Module, names: Iterable[str], what: str) -> None:
    """In place: forget adapters, all in one walk; what: who asks. Raises as `check_release`, and inside of `merged`."""
    state = require_state(model)
    check_unfolded(model, what)
    gone = set(names)
    check_release(model, gone)
    with state.turnstile.change(model):
        everywhere = [*(place.module for place in state.places.values()), *(m for _, m in base_modules(model))]
        for module in {id(module): module for module in everywhere}.values():
            for name in gone:
                remove_override(module, name)
            if isinstance(module, LoraLayer):
                let_go(module, gone)
        state.configs = {name: config for name, config in state.configs.items() if name not in gone}
        state.active = tuple(name for name in state.active if name not in gone)
        state.trained = tuple(name for name in state.trained if name not in gone)
        if state.configs:
            state.places = {p: place for p, place in state.places.items() if is_adapted(place.module)}
        else:
            forget(model)


def forget(model: nn.Module) -> None:
    """In place: drop the state and hooks of a model that has no adapters left, and let its base train as before."""
    state = require_state(model)
    state.unwatch()
    let_repack(model)
    remove_hooks(model)
    remove_rounds(model)
    remove_saving(model)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in state.trained_before)
    del model.__dict__[ATTRIBUTE]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base's answers, bit for bit, inside the block; the adapters that were active answer again after it.

    Of those, the ones that the block deleted do not. Raises LowrankError inside of a `merged` block.
    """
    state = require_state(model)
    check_unfolded(model, "disabled")
    active, trained = state.active, state.trained
    set_active(model, ())
    try:
        yield model
    finally:
        if find_state(model) is state:
            set_active(model, *([name for name in names if name in state.configs] for names in (active, trained)))
