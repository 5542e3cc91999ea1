"""An adapter that could not be added whole is not there at all."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lowrank.injection.adapters import active_adapters, delete_adapter, set_active, trained_adapters
from lowrank.injection.config import LoraConfig
from lowrank.injection.state import find_state


@contextmanager
def or_as_it_was(model: nn.Module, name: str, config: LoraConfig) -> Iterator[None]:
    """In the block the model gets the new adapter `name`; whatever the block raises, the model is what it was."""
    active, trained = active_adapters(model), trained_adapters(model)
    try:
        yield
    except BaseException:
        state = find_state(model)
        if state is not None:
            state.configs.setdefault(name, config)  # it may have got no further than some of its layers
            delete_adapter(model, name)
            if find_state(model) is not None:
                set_active(model, active, trained)
        raise
