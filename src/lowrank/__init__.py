"""lowrank: adapt a pretrained model by a low-rank change of its weights, measure it, merge it, ship it.

h = W0·x + s·B·A·x, with W0 frozen. The public names below are loaded when they are first used, so that
`import lowrank` costs next to nothing beyond `import torch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank.errors import LowrankError, LowrankWarning

if TYPE_CHECKING:
    from lowrank import functional as functional
    from lowrank import integrations as integrations
    from lowrank import peft as peft
    from lowrank.adapters.combine import combine_adapters
    from lowrank.adapters.convert import convert_adapter
    from lowrank.adapters.extract import extract_adapter
    from lowrank.adapters.resize import resize_adapter
    from lowrank.checkpoint import load_adapter, read_adapter, save_adapter
    from lowrank.core.factors import LoraFactors
    from lowrank.core.stored.of_module import register_reader
    from lowrank.injection.adapters import active_adapters, adapter_configs, delete_adapter, disabled, set_active
    from lowrank.injection.apply import inject
    from lowrank.injection.config import LoraConfig
    from lowrank.injection.plan import InjectionPlan
    from lowrank.injection.planning import plan
    from lowrank.injection.quantise import quantise
    from lowrank.merge.disk import merge_checkpoint
    from lowrank.merge.memory import merge_and_unload, merged, unload

__version__ = "0.1.0"

_HOMES = {
    "LoraConfig": "lowrank.injection.config",
    "LoraFactors": "lowrank.core.factors",
    "InjectionPlan": "lowrank.injection.plan",
    "plan": "lowrank.injection.planning",
    "inject": "lowrank.injection.apply",
    "active_adapters": "lowrank.injection.adapters",
    "adapter_configs": "lowrank.injection.adapters",
    "delete_adapter": "lowrank.injection.adapters",
    "disabled": "lowrank.injection.adapters",
    "set_active": "lowrank.injection.adapters",
    "load_adapter": "lowrank.checkpoint",
    "read_adapter": "lowrank.checkpoint",
    "save_adapter": "lowrank.checkpoint",
    "combine_adapters": "lowrank.adapters.combine",
    "convert_adapter": "lowrank.adapters.convert",
    "extract_adapter": "lowrank.adapters.extract",
    "resize_adapter": "lowrank.adapters.resize",
    "merge_and_unload": "lowrank.merge.memory",
    "merge_checkpoint": "lowrank.merge.disk",
    "merged": "lowrank.merge.memory",
    "unload": "lowrank.merge.memory",
    "quantise": "lowrank.injection.quantise",
    "register_reader": "lowrank.core.stored.of_module",
}
_MODULES = ("functional", "integrations", "peft")

__all__ = ["LowrankError", "LowrankWarning", "__version__", *_HOMES, *_MODULES]  # noqa: PLE0604  names of _HOMES are strings


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(f"lowrank.{name}")
    else:
        raise AttributeError(f"module 'lowrank' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
