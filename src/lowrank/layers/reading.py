"""A weight that others read: W0 + ΔW while a model runs, the very parameter everywhere else.

Not every weight is used by calling its module. torch's encoder layer and attention, Mamba's `dt_proj` and `conv1d`,
speech models' attention and heads tied to a table read `layer.weight` and compute with it themselves, past the layer's
forward. `AdaptedWeight` is the `weight` of every adapted module's class. It gives

- the layer's own forward what the layer says: W0, to which it adds the change itself, mostly;
- another module's forward W0 + Σ ΔW, differentiable in the factors;
- everybody else (tying, resizing, saving, moving) the parameter that the module holds.

Which of these a reader is, is read off the call stack: torch has no other word for "a model runs" that is true for
submodules called alone, for checkpointed blocks and in every thread, and nobody pays for it who calls layers only.
W0 + ΔW is formed at the first operation (`WeightAsRead`), so that looking at a dtype or a shape costs nothing.
"""

import sys
import threading
import warnings
import weakref
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._pytree import tree_map_only

from lowrank.errors import LowrankError, LowrankWarning

if TYPE_CHECKING:
    from lowrank.layers.base import LoraLayer

RUNS = frozenset({"forward", "_call_impl"})  # the functions of a module that runs
MOVERS = ("accelerate", "deepspeed", "torch.distributed")  # they put weights from place to place while a model runs


class _Local(threading.local):
    def __init__(self) -> None:  # in each thread: a compiler's guards are on what is there from the beginning
        self.own: tuple[nn.Module | None, Any] = (None, None)


_local = _Local()


class own_weight:  # noqa: N801  read as a statement: with own_weight(layer, W0)
    """Inside the block, in this thread, the plain forward of `layer` runs, and reads `weight` as its weight.

    A module of experts has several: {name: weight}.
    """

    __slots__ = ("before", "own")

    def __init__(self, layer: nn.Module, weight: Tensor | dict[str, Tensor]) -> None:
        self.own = (layer, weight)

    def __enter__(self) -> None:
        self.before, _local.own = _local.own, self.own

    def __exit__(self, *_: object) -> None:
        _local.own = self.before


def own_weights(experts: nn.Module) -> dict[str, Tensor] | None:
    """What the plain forward of a module of experts reads, where that runs in this thread."""
    runs, own = _local.own
    return own if runs is experts else None


class AdaptedWeight:
    """The `weight` of an adapted module's class. It has no `__set__`: assignments and deletions are nn.Module's."""

    def __set_name__(self, owner: type, name: str) -> None:
        """Called with the name that the class gives it."""
        self.name = name

    @overload
    def __get__(self, layer: None, owner: type) -> Self: ...
    @overload
    def __get__(self, layer: "LoraLayer", owner: type) -> nn.Parameter: ...
    def __get__(self, layer: "LoraLayer | None", owner: type) -> Any:
        """W0, or W0 + Σ ΔW: see the top of the file."""
        if layer is None:
            return self
        weight = layer._parameters.get(self.name)
        if weight is None:
            raise AttributeError(f"'{owner.__name__}' object has no attribute '{self.name}'")
        runs, own = _local.own
        if runs is layer:
            return own
        if not layer.active_factors and not layer.active_rows:
            return weight
        if torch.compiler.is_compiling():
            return layer.adapted_weight()
        return WeightAsRead.of(layer) if is_read_by_a_forward(layer) else weight


def is_read_by_a_forward(layer: nn.Module) -> bool:
    """Whether the innermost module that runs in this thread is another one than `layer`, with its hooks."""
    frame: FrameType | None = sys._getframe(2)
    if frame is not None and frame.f_globals.get("__name__", "").startswith(MOVERS):
        return False
    while frame is not None:
        code = frame.f_code
        if code.co_name in RUNS and isinstance(module := frame.f_locals.get("self"), nn.Module):
            return module is not layer or code.co_name == "forward"  # its plain forward, called past ours
        if code.co_filename == checkpoint.__file__:  # computed again in a backward pass
            return True
        frame = frame.f_back
    return False


def _description(names: str) -> frozenset[Any]:
    found = [getattr(Tensor, name) for name in names.split()]
    return frozenset(one if callable(one) else one.__get__ for one in found)


class WeightAsRead(Tensor):
    """W0 + Σ ΔW of a layer, not formed yet: what a forward that reads `layer.weight` holds.

    It has W0's description (shape, dtype, device) and no memory. The first operation on it forms the weight, once for
    each grad mode. Functions that take tensors past torch's overrides (an autograd.Function, an operator of an
    extension) see a leaf: operators find the weight below, and a gradient that arrives is handed on to the factors.
    """

    layer: "LoraLayer"
    formed: dict[tuple[bool, bool], Tensor]

    DESCRIPTION: ClassVar[frozenset[Any]] = _description(
        "shape dtype device layout ndim requires_grad is_cuda is_cpu is_meta is_quantized is_sparse is_complex "
        "size dim numel nelement element_size is_floating_point get_device __len__ __hash__"
    )

    @staticmethod
    def of(layer: "LoraLayer") -> "WeightAsRead":
        """The weight of `layer` as a forward reads it."""
        weight = layer.base_weight
        owned = [p for f in layer.active_factors for p in f.trainable()] + [r.values for r in layer.active_rows]
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in owned)
        read: WeightAsRead = Tensor._make_wrapper_subclass(
            WeightAsRead, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=trained
        )
        read.layer, read.formed = layer, {}
        if trained:
            read.listen()
        return read

    def listen(self) -> None:
        """In place: a gradient that arrives here as at a leaf is handed on; no circle keeps it, and W0 + ΔW, alive."""
        weak = weakref.ref(self)

        def hand_on(gradient: Tensor) -> None:
            if (read := weak()) is not None:
                read._hand_on(gradient)

        self.register_hook(hand_on)  # type: ignore[no-untyped-call]

    def form(self) -> Tensor:
        """W0 + Σ ΔW, a plain tensor: the same one however often it is asked for."""
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if mode not in self.formed:
            say_dropout(self.layer)
            self.formed[mode] = self.layer.adapted_weight()
        return self.formed[mode]

    def _hand_on(self, gradient: Tensor) -> None:
        with torch.enable_grad():
            weight = self.form()
        torch.autograd.backward(weight, gradient)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`func` of the formed weight; of the description alone where `func` asks for no more."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in cls.DESCRIPTION or func is Tensor.register_hook:
                return func(*args, **kwargs)
            if args and isinstance(args[0], WeightAsRead) and _writes(func.__name__):
                raise LowrankError(
                    f"{func.__name__}: the forward of a model writes to the weight of an adapted "
                    f"{type(args[0].layer).__name__}, which it reads as W0 + ΔW: the write would be lost"
                )
        args, kwargs = tree_map_only(WeightAsRead, WeightAsRead.form, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """An operator that was reached past `__torch_function__`, below autograd."""
        args, kwargs = tree_map_only(WeightAsRead, WeightAsRead.form, (args, kwargs or {}))
        return func(*args, **kwargs)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def say_dropout(layer: "LoraLayer") -> None:
    """Warn, once a layer, that there is no x to drop entries of where the weight alone is read."""
    if layer.training and any(f.dropout for f in layer.active_factors) and "said_dropout" not in layer.__dict__:
        layer.__dict__["said_dropout"] = True
        warnings.warn(
            f"lora_dropout is not applied to a {type(layer).__name__} (shape {list(layer.base_weight.shape)}): "
            "the model computes with its weight W0 + ΔW",
            LowrankWarning,
            stacklevel=2,
        )
