"""W0 of a module, whatever the module keeps it as: an open table from a class to a reader of its stored form.

READERS knows classes by their full name, so that no package is imported for it: that of a module (bitsandbytes'
layers) or that of its weight (torchao's tensors). A reader gives a `core.stored.Stored`, which keeps no dense copy.
"""

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank.core.stored import FourBit, Int8Rows, Nested, Scaled, Stored, Weight
from lowrank.errors import TargetError

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})  # what a change can be added to

Reader = Callable[[Any, Any], Stored]  # of the module and its weight


class BnbFourBit(FourBit):
    """The same matrix by bitsandbytes' own kernel, which the tests hold to the same bits.

    Not on CPUs where rows do not fill their last block: with AVX-512 that kernel (0.50.2) takes scales of other blocks.
    """

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """W0, (d, k)."""
        if self.packed.device.type == "cpu" and self.shape[1] % self.block:
            return super().matrix(dtype)
        absmax = self.scales(0, self.shape.numel())
        whole: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.packed, absmax, self.block, self.kind, self.shape, self.dtype
        )
        return whole if dtype is None else whole.to(dtype)


class AsTensor(Stored):
    """A tensor of a foreign class that can give its own dense copy (torchao's)."""

    scheme = "torchao"

    def __init__(self, weight: Any) -> None:
        self.weight, self.shape, self.dtype = weight, weight.shape, weight.dtype

    @property
    def held(self) -> Tensor:
        """The tensor itself."""
        return cast(Tensor, self.weight)

    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """W0[rows]: such tensors give all of theirs or none."""
        return self.matrix(dtype)[rows]

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """W0, (d, k)."""
        own = self.weight.get_original_weight if hasattr(self.weight, "get_original_weight") else self.weight.dequantize
        return cast(Tensor, own()).detach().to(dtype or self.dtype)


def _four_bit(module: Any, weight: Any) -> Stored:
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise TargetError("it is not quantised yet: move the model to its device first (model.to)")
    if getattr(state, "packing_format_for_cpu", False):
        raise TargetError(
            "bitsandbytes has repacked it for inference, which rounds its scales: load the model again, and adapt it "
            "before it answers"
        )
    return of_quant_state(weight.data.as_subclass(Tensor), state)  # .data: no view, which would hold the module


def of_quant_state(packed: Tensor, state: Any) -> BnbFourBit:
    """The matrix of packed numbers and bitsandbytes' QuantState of them."""
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        absmax = Nested(absmax, inner.code, inner.absmax, state.offset, inner.blocksize)
    numbers = packed.view(torch.uint8).flatten()
    return BnbFourBit(numbers, absmax, state.code, state.blocksize, state.shape, state.dtype, state.quant_type)


def _int8(module: Any, weight: Any) -> Stored:
    if weight.dtype is not torch.int8:
        raise TargetError(
            "it is not quantised yet: move the model to its device first (model.to), with has_fp16_weights=False"
        )
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
    if scales is None:
        raise TargetError("its scales (SCB) are missing: load the model again")
    return Int8Rows(weight.data.as_subclass(Tensor), scales)


def _fine_grained(module: Any, weight: Any) -> Stored:
    if weight.element_size() > 1:
        raise TargetError("its weight is not stored in FP8 any more: transformers has dequantised the model")
    scales = module.weight_scale_inv.detach().float()
    block = tuple(module.block_size) if module.block_size is not None else tuple(weight.shape)
    dtype = torch.get_default_dtype() if module.bias is None else module.bias.dtype
    return Scaled(weight.detach(), scales.view(1, 1) if scales.dim() == 0 else scales, block, dtype)


READERS: dict[str, Reader] = {
    "bitsandbytes.nn.modules.Linear4bit": _four_bit,
    "bitsandbytes.nn.modules.Linear8bitLt": _int8,
    "transformers.integrations.finegrained_fp8.FP8Linear": _fine_grained,
    "torchao.utils.TorchAOBaseTensor": lambda _, weight: AsTensor(weight),
    "torchao.dtypes.nf4tensor.NF4Tensor": lambda _, weight: AsTensor(weight),
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor": lambda _, weight: AsTensor(weight),
}

# by module: its weight, what describes that, where its numbers lie, and what reads them
_read: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any, Any, Stored]]" = weakref.WeakKeyDictionary()


def register_reader(class_name: str, reader: Reader) -> None:
    """In place: layers of this class, or whose weight is of it (its full name), are read by `reader`."""
    READERS[class_name] = reader
    _known.clear()


_known: dict[tuple[type[Any], type[Any]], Reader | None] = {}  # by the classes of a module and its weight


def _reader_of(module: type[Any], weight: type[Any]) -> Reader | None:
    if (module, weight) not in _known:
        names = [f"{cls.__module__}.{cls.__qualname__}" for cls in (*module.__mro__, *weight.__mro__)]
        _known[module, weight] = next((READERS[name] for name in names if name in READERS), None)
    return _known[module, weight]


def is_stored(module: nn.Module) -> bool:
    """Whether the module's weight is one that the table reads; a stack of experts says so itself (`stored_stack`)."""
    if hasattr(type(module), "stored_stack"):
        return cast(Any, module).stored_stack is not None
    weight = module._parameters.get("weight")
    if weight is None or (type(weight) is nn.Parameter and weight.dtype in FLOATING):
        return False
    return _reader_of(type(module), type(weight)) is not None


def is_readable(module: nn.Module) -> bool:
    """Whether the module's weight is stored in another form than numbers, and can be read now."""
    try:
        return is_stored(module) and stored_weight(module) is not None
    except TargetError:
        return False


def stored_weight(module: nn.Module) -> Stored:
    """The stored form of the module's weight: the same object while the module holds the same tensors.

    Raises TargetError, in words that end a sentence, where it cannot be read as it is.
    """
    if hasattr(type(module), "stored_stack"):
        return cast(Stored, cast(Any, module).stored_stack)
    weight = module._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    known, where = _read.get(module), _place_of(weight)
    if known is None or known[0]() is not weight or known[1] is not state or known[2] != where:
        reader = _reader_of(type(module), type(weight))
        assert reader is not None
        known = _read[module] = (weakref.ref(weight), state, where, reader(module, weight))
    return known[3]


def _place_of(weight: Any) -> tuple[Any, int]:
    """Where its numbers lie now: moving a model puts others into the same parameter."""
    try:
        return weight.device, weight.data_ptr()
    except RuntimeError:  # a tensor that has others inside of it
        return weight.device, 0


def forget_read(module: nn.Module) -> None:
    """In place: the module's stored form was written to, so that it is read anew."""
    _read.pop(module, None)


def frozen(module: nn.Module) -> Weight:
    """W0 as the module holds it: its parameter, or what reads its stored form. Both have a shape, dtype and device."""
    return stored_weight(module) if is_stored(module) else _own(module).detach()


def frozen_shape(module: nn.Module) -> torch.Size:
    """The shape of W0, of a stored form too."""
    return stored_weight(module).shape if is_stored(module) else _own(module).shape


def weight_name(module: nn.Module) -> str:
    """What the module calls its W0: `weight`, but for nn.MultiheadAttention, whose q, k and v are one matrix."""
    return "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"


def _own(module: nn.Module) -> Tensor:
    return cast(Tensor, getattr(module, weight_name(module)))
