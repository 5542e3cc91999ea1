"""Which weights have to part in a merge: those that modules share which do not change alike."""

from torch import nn

from lowrank.injection.targets import named_targets
from lowrank.injection.tied import shared_weights
from lowrank.layers.base import LoraLayer


def shared_targets(model: nn.Module, names: tuple[str, ...]) -> set[int]:
    """The weights of adapted layers that other modules use too, by identity, where these do not change alike."""
    modules = named_targets(model)
    groups = [group for group in shared_weights(modules) if any(isinstance(modules[p], LoraLayer) for p in group)]
    unlike = [group for group in groups if len({_rows_alone(modules[path], names) for path in group}) > 1]
    return {id(modules[path]._parameters["weight"]) for group in unlike for path in group}


def _rows_alone(module: nn.Module, names: tuple[str, ...]) -> object:
    """What tells the change of a module that has rows and no factors; of any other, itself."""
    if not isinstance(module, LoraLayer) or any(name in module.adapter_names for name in names):
        return module
    return tuple(module.rows(name) for name in names if name in module.row_names)
