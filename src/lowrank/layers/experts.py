"""Modules that hold a mixture's experts as stacked parameters, and their class once some are adapted or quantised.

transformers keeps the experts of a layer in one module: `gate_up_proj` (E, 2I, H), `down_proj` (E, H, I). Such a module
cannot be a layer of a weight; each of its stacks is one (`layers.stack`), and this class, which takes the module's own
class's place, gives them to whoever reads them while a model runs. So it does with stacks that are held in a stored
form, adapted or not.
"""

from inspect import unwrap
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank.core.stored.of_stack import HELD, held_stacks, reader_of_stacks, stored_stack
from lowrank.core.stored.stack import HeldStack
from lowrank.kernels.fused import is_transformed
from lowrank.layers.extended import extended_class, rebind_forward, rebuild
from lowrank.layers.reading import is_read_by_a_forward, own_weight, own_weights
from lowrank.layers.stack_as_read import StackAsRead

if TYPE_CHECKING:
    from lowrank.layers.stack import LoraStack

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what use_experts_implementation leaves
TRANSPOSED = {"Llama4TextExperts": True}  # classes of transformers without these flags: is W (E, k, d)?
STACKS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def stores_transposed(module: nn.Module) -> bool | None:
    """Whether the module's stacks are (E, k, d) rather than (E, d, k); None for what is no module of experts."""
    if all(name in module.__dict__ for name in FLAGS):
        return bool(module.__dict__["is_transposed"])
    for cls in type(module).__mro__:
        if cls.__module__.startswith("transformers.") and cls.__name__ in TRANSPOSED:
            return TRANSPOSED[cls.__name__]
    return None


def stack_names(module: nn.Module) -> list[str]:
    """The names of the module's stacks of linear maps, in the order of its attributes; none for other modules."""
    if not module._parameters or stores_transposed(module) is None:
        return []
    return [name for name, p in module._parameters.items() if name in STACKS and p is not None and p.dim() == 3]


def gate_and_up_in_turn(module: nn.Module, name: str) -> bool | None:
    """Whether output rows of a gate and of an up projection take turns in the stack, or the gate's are the first half.

    None for a stack that does not hold both.
    """
    if name != "gate_up_proj" or stores_transposed(module) is None:
        return None
    return not module.__dict__.get("is_concatenated", True)


def has_gate_and_up(module: nn.Module, name: str) -> bool:
    """Whether the stack's stored rows are a gate's, then an up projection's: checkpoints keep these apart."""
    return stores_transposed(module) is False and gate_and_up_in_turn(module, name) is False


class LoraExperts(nn.Module):
    """The class of a module of experts of which some stacks are adapted, or held in a form that only we read.

    Its forward is the plain class's own; that of a class with a stored form of its own (FP8Experts), which has kernels
    for that, is the one that goes from expert to expert.
    """

    plain: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[nn.Module]]
    adapted: dict[str, "LoraStack"]  # by the name of the parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain class's answer, computed with the stacks as they are adapted, and read, where they are."""
        read = self.stacks_as_read()
        if not read:
            return super().forward(*args, **kwargs)
        with own_weight(self, read):
            if reader_of_stacks(type(self).plain) is None:
                return super().forward(*args, **kwargs)
            return unwrap(type(self).plain.forward)(self, *args, **kwargs)

    def stacks_as_read(self) -> dict[str, Tensor]:
        """What the plain forward reads in the place of stacks with active adapters, and of those in a stored form."""
        active = {name: stack for name, stack in self.adapted.items() if stack.active_factors}
        stored = {name: one for name in stack_names(self) if (one := stored_stack(self, name)) is not None}
        if is_transformed() is not None or any(stack.base_weight.requires_grad for stack in active.values()):
            plain = {name: one.matrix() for name, one in stored.items() if name not in active}
            return plain | {name: stack.adapted_weight() for name, stack in active.items()}
        frozen: dict[str, Tensor] = {name: StackAsRead.frozen(s) for name, s in stored.items() if name not in active}
        return frozen | {name: StackAsRead.whole(stack) for name, stack in active.items()}

    def __getattr__(self, name: str) -> Any:
        """The module's own parameter; for a forward that reads it, with the active adapters' change."""
        found = super().__getattr__(name)
        if (own := own_weights(self)) is not None:
            return own.get(name, found)
        stack = self.__dict__.get("adapted", {}).get(name)
        if (stack is None or not stack.active_factors) and name not in self.__dict__.get(HELD, {}):
            return found
        if torch.compiler.is_compiling() or is_read_by_a_forward(self):
            return self.stacks_as_read().get(name, found)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """In place: moved, or cast, with the scales of what is held in a stored form, which only move."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._over_parameters()
        return self

    def __setstate__(self, state: Any) -> None:
        """Unpickled or copied: what reads a stack and its parameter have one memory again."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._over_parameters()

    def _over_parameters(self) -> None:
        for name, stack in held_stacks(self).items():
            self.__dict__[HELD][name] = stack.over(cast(Tensor, self._parameters[name]).detach())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by the plain class, since the extended one is made at run time; unfolded."""
        state = dict(self.__getstate__())  # type: ignore[no-untyped-call]
        waiting = {name: aside for name, stack in self.adapted.items() if (aside := stack.set_aside()) is not None}
        state["_parameters"] = state["_parameters"] | waiting
        return rebuild, (type(self).plain, type(self).mixin), state


def hold(module: nn.Module, stack: "LoraStack") -> None:
    """In place: the module reads `stack` as adapted; its class is extended with the first."""
    _extend(module)
    module.__dict__["adapted"][stack.parameter] = stack
    module._modules[stack.child] = stack


def release(module: nn.Module, stack: "LoraStack") -> None:
    """In place: `stack` is plain again; with the last one the module has its own class back."""
    module._modules.pop(stack.child, None)
    module.__dict__["adapted"].pop(stack.parameter, None)
    _settle(module)


def hold_stored(module: nn.Module, name: str, stack: HeldStack) -> None:
    """In place: the module's stack `name` is held in a stored form, until `hold_numbers`."""
    _extend(module)
    module.__dict__.setdefault(HELD, {})[name] = stack
    module._parameters[name] = nn.Parameter(stack.packed, requires_grad=False)


def hold_numbers(module: nn.Module, name: str, weight: Tensor) -> None:
    """In place: the module's stack `name`, which `hold_stored` put into a stored form, is `weight`, (E, n, m)."""
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    module.__dict__[HELD].pop(name)
    _settle(module)


def _extend(module: nn.Module) -> None:
    if not isinstance(module, LoraExperts):
        module.__class__ = extended_class(type(module), LoraExperts)
        module.__dict__["adapted"] = {}
        rebind_forward(module)


def _settle(module: nn.Module) -> None:
    """In place: a module of which nothing is adapted or held has its own class again."""
    if module.__dict__["adapted"] or module.__dict__.get(HELD):
        return
    del module.__dict__["adapted"]
    module.__dict__.pop(HELD, None)
    module.__class__ = cast(type[LoraExperts], type(module)).plain
    rebind_forward(module)
