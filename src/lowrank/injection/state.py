"""What a model remembers about its adapters, in one plain value on the model object."""

from dataclasses import dataclass, field

from torch import nn

from lowrank.errors import LowrankError
from lowrank.injection.config import LoraConfig

ATTRIBUTE = "_lowrank_state"


@dataclass(slots=True)
class AdapterState:
    """configs by adapter name; the active and the trained names; which base parameters required gradients before."""

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    trained_before: frozenset[str] = frozenset()


def find_state(model: nn.Module) -> AdapterState | None:
    """The model's adapter state, None for a plain model."""
    state = model.__dict__.get(ATTRIBUTE)
    return state if isinstance(state, AdapterState) else None


def require_state(model: nn.Module) -> AdapterState:
    """The model's adapter state, or an error that says how a model gets one."""
    state = find_state(model)
    if state is None:
        raise LowrankError(
            f"this {type(model).__name__} has no adapter: call lowrank.inject or lowrank.load_adapter on it first"
        )
    return state


def require_adapter(model: nn.Module, name: str) -> LoraConfig:
    """The config of one adapter, or an error that lists those there are."""
    configs = require_state(model).configs
    if name not in configs:
        raise LowrankError(f"there is no adapter {name!r} in this model: it has {', '.join(map(repr, configs))}")
    return configs[name]
