"""Stacks of experts whatever their module keeps them as: those that were quantised here, and classes that are read.

transformers' FP8Experts holds `gate_up_proj` (E, 2I, H) in FP8 and `gate_up_proj_scale_inv` beside it. A module whose
stacks were quantised here (`HeldStack`) has them under HELD, and their packed numbers as parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank.core.stored.base import Stored
from lowrank.core.stored.scaled import Scaled
from lowrank.core.stored.stack import HeldStack, StoredStack

HELD = "held_stacks"  # a module's {parameter: HeldStack}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

StackReader = Callable[[Any, str], StoredStack | None]  # of the module of experts and the parameter's name


@dataclass(frozen=True, eq=False)
class ScaledExperts(StoredStack):
    """numbers (E, d, k) of FP8; scales (E, ⌈d/rows⌉, ⌈k/columns⌉), one for each block of (rows, columns)."""

    scheme: ClassVar[str] = "scaled"
    numbers: Tensor
    scales: Tensor
    block: tuple[int, int]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """(E, d, k)."""
        return self.numbers.shape

    @property
    def held(self) -> Tensor:
        """The small numbers."""
        return self.numbers

    def of_expert(self, expert: int) -> Stored:
        """W_e, (d, k)."""
        return Scaled(self.numbers[expert], self.scales[expert].float(), self.block, self.dtype)


def _fine_grained(experts: Any, name: str) -> StoredStack | None:
    weight, scales = experts._parameters[name].detach(), experts._parameters.get(f"{name}_scale_inv")
    if weight.dtype not in FP8 or scales is None:
        return None
    block = tuple(experts.block_size) if experts.block_size is not None else tuple(weight.shape[1:])
    return ScaledExperts(weight, scales.detach(), block, torch.get_default_dtype())


STACK_READERS: dict[str, StackReader] = {"transformers.integrations.finegrained_fp8.FP8Experts": _fine_grained}


def held_stacks(experts: nn.Module) -> dict[str, HeldStack]:
    """{parameter: what holds it} of the stacks that were quantised here and are not numbers for the moment (folded)."""
    held: dict[str, HeldStack] = experts.__dict__.get(HELD, {})
    return {name: stack for name, stack in held.items() if not experts._parameters[name].is_floating_point()}  # type: ignore[union-attr]


def stored_stack(experts: nn.Module, name: str) -> StoredStack | None:
    """What reads the stack `name` of a module of experts; None where it is numbers, or in a form that nobody reads."""
    if (own := held_stacks(experts).get(name)) is not None:
        return own
    reader = reader_of_stacks(type(experts))
    return None if reader is None else reader(experts, name)


def reader_of_stacks(cls: type[nn.Module]) -> StackReader | None:
    """What reads the stacks of a class of experts that holds them in a form of its own."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((STACK_READERS[name] for name in names if name in STACK_READERS), None)
