"""What a transformers model's own saving and loading mean while it has adapters: the adapters, not the base.

Its class's `save_pretrained` would write the whole base under private keys, which loads as the base alone. So the model
object gets a `save_pretrained` of its own, as long as it has adapters; Trainer calls it too.
"""

from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lowrank.core.factors import LoraFactors
from lowrank.core.token_rows import TokenRows
from lowrank.errors import LowrankError
from lowrank.injection.traversal import base_modules
from lowrank.layers.base import PREFIX
from lowrank.layers.overrides import BASE, CHILD, override_tensors, overrides_of
from lowrank.layers.rowed import ROWS

NAME = "save_pretrained"


class SaveAdapters:
    """`model.save_pretrained` while the model has adapters; a value that is copied and pickled with its model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_of_whole_models: Any,  # max_shard_size, variant, ...: nothing here is so large
    ) -> None:
        """Write the model's adapters to `save_directory` (`checkpoint.pretrained`)."""
        writing = import_module("lowrank.checkpoint.pretrained")  # a layer above this one, which knows files
        writing.save_pretrained(self.model, save_directory, is_main_process, state_dict, push_to_hub)


class BaseIsThere:
    """A hook after `load_state_dict`: where only tensors of adapters were loaded, nothing of the base is missing.

    So Trainer resumes from its checkpoints of an adapted model, which hold that, without a word of warning.
    """

    def __call__(self, model: nn.Module, incompatible: Any) -> None:
        """In place: forget the missing keys that are the base's. Raises LowrankError for tensors of another adapter."""
        keys, missing = model.state_dict().keys(), set(incompatible.missing_keys)
        base = keys - adapter_state(model)
        if not base <= missing:
            return
        strange = [key for key in incompatible.unexpected_keys if is_of_adapters(key)]
        if strange:
            raise LowrankError(
                f"this state is of another adapter than the model's ({strange[0]}{', ...' if strange[1:] else ''}): "
                "inject the one it was saved of, under the same name"
            )
        if keys - missing:
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in base]


def is_of_adapters(key: str) -> bool:
    """Whether a key of a state_dict names what an adapter holds, or a tensor of the base that waits for its end."""
    return any(mark in f".{key}" for mark in (f".{PREFIX}", f".{ROWS}", f".{CHILD}."))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of `model.state_dict()` that its adapters own, in place or waiting."""
    owned: set[int] = set()
    for _, module in base_modules(model):
        for child in module._modules.values():
            if isinstance(child, LoraFactors | TokenRows):
                owned |= {id(parameter) for parameter in child.parameters()}
        overrides = overrides_of(module)
        for adapter in overrides.owners if overrides is not None else ():
            if adapter != BASE:
                owned |= {id(tensor) for tensor in override_tensors(module, adapter).values()}
    return {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in owned}


def add_saving(model: nn.Module) -> None:
    """In place: a transformers model saves its adapters from now on."""
    if callable(getattr(model, NAME, None)):
        model.__dict__[NAME] = SaveAdapters(model)
        model.register_load_state_dict_post_hook(BaseIsThere())


def remove_saving(model: nn.Module) -> None:
    """In place: the model saves what its class does again."""
    if isinstance(model.__dict__.get(NAME), SaveAdapters):
        del model.__dict__[NAME]
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, BaseIsThere)]:
        del hooks[key]
