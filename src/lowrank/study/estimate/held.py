"""A base without numbers whose linear maps are in four or eight bits: read, for each product, by the real readers."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank.core.stored import FourBit, Int8Rows, Nested, Stored
from lowrank.core.stored.of_module import BnbFourBit, register_reader
from lowrank.core.stored.stack import HeldStack
from lowrank.errors import ConfigError
from lowrank.injection.quantise import quantisable_stacks, require_bitsandbytes
from lowrank.injection.targets import named_targets
from lowrank.kernels.frozen import frozen_linear
from lowrank.layers.base import dimensions
from lowrank.layers.experts import hold_stored
from lowrank.layers.kinds import is_linear, kind_of
from lowrank.layers.stack import ExpertStack, kind_of_stack, row_blocks
from lowrank.train.held import kept_plain
from lowrank.train.settings import HeldSettings

BLOCK, SCALES = 64, 256  # bitsandbytes' own: numbers that share a scale, scales that share one
TABLE = 256  # the numbers that eight bits of a scale mean


class HeldLinear(nn.Linear):
    """A linear map of which the packed weight, and its scales, are on the meta device."""

    stored: Stored

    def forward(self, input: Tensor) -> Tensor:
        """W0·x + bias."""
        return frozen_linear(input, self.stored, self.bias)


register_reader(f"{HeldLinear.__module__}.{HeldLinear.__qualname__}", lambda module, _: module.stored)


def hold(model: nn.Module, settings: HeldSettings, skip: tuple[str, ...], dtype: torch.dtype) -> None:
    """In place: what `lowrank train` would load in the bits that the settings say. skip: modules left as they are."""
    kept = kept_plain(model, skip)
    for path, module in named_targets(model).items():
        if is_linear(module) and path not in kept:
            model.set_submodule(path, _held(module, settings, dtype))
    for stack in quantisable_stacks(model, skip).values():
        _hold_experts(stack, settings, dtype)


def _hold_experts(stack: ExpertStack, settings: HeldSettings, dtype: torch.dtype) -> None:
    kind, experts, name = kind_of_stack(stack), stack.experts, stack.parameter
    d, k = dimensions(kind, stack)
    blocks = row_blocks(experts, name, stack.weight.shape[1])
    form = _form(d // len(blocks), k, settings, dtype)
    held = HeldStack.of([[form] * len(blocks)] * len(stack.weight), kind.transposed)
    hold_stored(experts, name, held)
    for at, scales in enumerate(_scales(form)):
        whole = (len(held.experts) * len(blocks), *scales.shape)
        experts.register_buffer(f"{name}_scales{at}", _empty(whole, scales.dtype))


def _held(module: Any, settings: HeldSettings, dtype: torch.dtype) -> HeldLinear:
    kind = kind_of(module)
    assert kind is not None
    d, k = dimensions(kind, module)
    form = _form(d, k, settings, dtype)
    layer = HeldLinear(k, d, module.bias is not None, "meta", dtype)
    layer.weight = nn.Parameter(form.held, requires_grad=False)
    layer.stored = form
    for at, scales in enumerate(_scales(form)):
        layer.register_buffer(f"scales{at}", scales)
    return layer


def _form(d: int, k: int, settings: HeldSettings, dtype: torch.dtype) -> FourBit | Int8Rows:
    return _int8(d, k, dtype) if settings.quantise == "int8" else _four_bit(d, k, dtype, settings)


def _int8(d: int, k: int, dtype: torch.dtype) -> Int8Rows:
    return Int8Rows(_empty((d, k), torch.int8), _empty((d,), torch.float32), dtype)


def _four_bit(d: int, k: int, dtype: torch.dtype, settings: HeldSettings) -> FourBit:
    packed, code = _empty((-(-d * k // 2),), torch.uint8), _empty((16,), torch.float32)
    blocks = -(-d * k // BLOCK)
    absmax: Tensor | Nested = _empty((blocks,), torch.float32)
    if settings.double:
        table, scales = _empty((TABLE,), torch.float32), _empty((-(-blocks // SCALES),), torch.float32)
        absmax = Nested(_empty((blocks,), torch.uint8), table, scales, _empty((), torch.float32), SCALES)
    return _reader()(packed, absmax, code, BLOCK, torch.Size((d, k)), dtype, str(settings.quantise))


def _reader() -> type[FourBit]:
    """By bitsandbytes' own kernel where it is installed."""
    try:
        require_bitsandbytes("quantise")
    except ConfigError:
        return FourBit
    return BnbFourBit


def _scales(form: FourBit | Int8Rows) -> list[Tensor]:
    """The tensors beside the packed numbers, but for tables that all layers share."""
    absmax = form.absmax
    return [absmax.absmax, absmax.scales] if isinstance(absmax, Nested) else [absmax]


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
