"""What a model remembers about its adapters, in one plain value on the model object."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowrank.errors import LowrankError, quoted, some
from lowrank.injection.config import LoraConfig
from lowrank.injection.turnstile import Turnstile

ATTRIBUTE = "_lowrank_state"
WRAPPERS = ("DistributedDataParallel", "DataParallel")


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapted module hangs: `parent` is None for the model itself; shape: its weight's, where it has one."""

    parent: nn.Module | None
    leaf: str
    module: nn.Module
    shape: torch.Size | None


@dataclass(slots=True)
class AdapterState:
    """configs by adapter name; the active and the trained names; which base parameters required gradients before.

    places: {path: place} of every module that an adapter was put into. folded: inside of a `merged` block, which a copy
    of the model is not. turnstile: keeps switches and forwards of several threads apart.
    unwatch: ends the waiting for the first backward pass of the newest adapter.
    """

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    trained_before: frozenset[str] = frozenset()
    places: dict[str, Place] = field(default_factory=dict)
    folded: bool = False
    turnstile: Turnstile = field(default_factory=Turnstile)
    unwatch: Callable[[], object] = _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without the block that the model is in."""
        return AdapterState, (self.configs, self.active, self.trained, self.trained_before, self.places)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DDP and DataParallel; any other model as it is."""
    while True:
        inside = model._modules.get("_orig_mod" if "_orig_mod" in model._modules else "module")
        if inside is None or not (inside is model._modules.get("_orig_mod") or type(model).__name__ in WRAPPERS):
            return model
        model = inside


def check_trainable_here(model: nn.Module) -> None:
    """Raise LowrankError for DDP's wrapper: it sums the gradients of the parameters it was made with, and no others."""
    if type(model).__name__ == "DistributedDataParallel":
        raise LowrankError(
            "DistributedDataParallel would never sum the gradients of parameters that are added now: "
            "give the adapter to the model first, then wrap it"
        )


def find_state(model: nn.Module) -> AdapterState | None:
    """The model's adapter state, None for a plain model."""
    state = model.__dict__.get(ATTRIBUTE)
    return state if isinstance(state, AdapterState) else None


def require_state(model: nn.Module) -> AdapterState:
    """The model's adapter state, or an error that says how a model gets one."""
    state = find_state(model)
    if state is None and find_state(unwrapped(model)) is not None:
        raise LowrankError(
            f"this {type(model).__name__} is wrapped around the model that has the adapters: give the model itself"
        )
    if state is None:
        raise LowrankError(
            f"this {type(model).__name__} has no adapter: call lowrank.inject or lowrank.load_adapter on it first"
        )
    return state


def require_adapter(model: nn.Module, name: str) -> LoraConfig:
    """The config of one adapter, or an error that lists those there are."""
    configs = require_state(model).configs
    if name not in configs:
        raise LowrankError(f"there is no adapter {quoted(name)} in this model: it has {some(map(quoted, configs), 12)}")
    return configs[name]


def check_unfolded(model: nn.Module, what: str) -> None:
    """Raise LowrankError for a call that would count ΔW twice, or lose it, inside of a `merged` block."""
    state = find_state(model)
    if state is not None and state.folded:
        raise LowrankError(f"{what}: the adapters are folded into the weights: leave the block of `merged` first")
