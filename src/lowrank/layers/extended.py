"""The class that a module is given in place of its own: a subclass of it, made at run time."""

from types import MethodType
from typing import Any, cast

from torch import nn

REPLACED = "its forward is replaced on the instance, which would bypass the adapter; inject before you patch the module"

_EXTENDED: dict[tuple[type[nn.Module], type[nn.Module]], type[Any]] = {}


def extended_class(plain: type[nn.Module], mixin: type[nn.Module]) -> type[Any]:
    """The class that adds `mixin` to `plain`, made once, so that equal layers stay of one class."""
    if (plain, mixin) not in _EXTENDED:
        names = {"__module__": plain.__module__, "plain": plain, "mixin": mixin}
        _EXTENDED[plain, mixin] = type(f"Lora{plain.__name__}", (mixin, plain), names)
    return _EXTENDED[plain, mixin]


def rebuild(plain: type[nn.Module], mixin: type[nn.Module]) -> nn.Module:
    """An empty module of the extended class, to be filled by who copies or unpickles one."""
    cls = extended_class(plain, mixin)
    return cast(nn.Module, object.__new__(cls))


def rebind_forward(module: nn.Module) -> None:
    """Point accelerate's device-map hook, which keeps the forward it replaced, at the class's present forward."""
    if "forward" in module.__dict__ and isinstance(module.__dict__.get("_old_forward"), MethodType):
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def forward_is_replaced(module: nn.Module) -> bool:
    """True where an instance carries a `forward` of its own that would bypass its class (and so any adapter)."""
    return "forward" in module.__dict__ and not isinstance(module.__dict__.get("_old_forward"), MethodType)
