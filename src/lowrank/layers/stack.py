"""One stacked parameter of a mixture's experts, as a layer: E linear maps that take turns."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from lowrank.core.merging import Change, adapted_weight, prepare
from lowrank.core.stored import Stored, Weight
from lowrank.core.stored.of_module import frozen
from lowrank.core.stored.of_stack import stored_stack
from lowrank.core.stored.stack import StoredStack
from lowrank.layers.base import ASIDE, PREFIX, LoraLayer
from lowrank.layers.experts import LoraExperts, has_gate_and_up, hold, release, stack_names, stores_transposed


class ExpertStack(nn.Module):
    """The parameter `parameter` of `experts`, W0 (E, d, k), or (E, k, d) where `stores_transposed`, seen as a module.

    The walk over a model's modules makes one for each stack, under the parameter's own path. It holds nothing; an
    adapter's factors hang in it, and it in the module of experts (as `lora_<parameter>`), once it is adapted.
    """

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        super().__init__()
        self.__dict__["experts"] = experts  # no child: it is the other way round
        self.parameter = parameter
        self.training = experts.training

    @property
    def weight(self) -> nn.Parameter:
        """W0, the parameter of the module of experts."""
        return cast(nn.Parameter, self.experts._parameters[self.parameter])

    @property
    def stored_stack(self) -> StoredStack | None:
        """What reads W0, where the module of experts holds it otherwise than as numbers."""
        return stored_stack(self.experts, self.parameter)

    @property
    def experts(self) -> nn.Module:
        """The module of experts."""
        return cast(nn.Module, self.__dict__["experts"])

    @property
    def child(self) -> str:
        """Under which name it hangs in the module of experts once it is adapted."""
        return PREFIX + self.parameter


def stacks_of(module: nn.Module) -> dict[str, ExpertStack]:
    """{parameter: stack} of a module of experts, those that are adapted as they are; empty for other modules."""
    adapted = module.__dict__.get("adapted", {}) if isinstance(module, LoraExperts) else {}
    return {name: adapted.get(name) or ExpertStack(module, name) for name in stack_names(module)}


def row_blocks(experts: nn.Module, parameter: str, rows: int) -> list[slice]:
    """The rows of an expert's matrix that are one weight in a checkpoint: a gate's apart from an up projection's."""
    if has_gate_and_up(experts, parameter) and rows % 2 == 0:
        return [slice(0, rows // 2), slice(rows // 2, rows)]
    return [slice(0, rows)]


class LoraStack(LoraLayer):
    """y = W_e·x + Σ s·B_e·A_e·dropout(x) for a token x that is sent to expert e: a (E, r, k), b (E, d, r).

    With DoRA every expert's (W_e + ΔW_e)·x is rescaled by rows, m_e / ‖W_e + ΔW_e‖.
    It is never called: the module of experts' own forward multiplies by the stack, and what it reads there adds the
    low-rank products (`layers.stack_as_read`). ΔW is formed for no expert; one without tokens gets zero gradients.
    """

    kind = "experts"
    supports_dora = True
    weight = ExpertStack.weight
    experts: nn.Module
    parameter: str
    child: str

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """A stack of one number a matrix, or none, has no low rank."""
        return None if min(cast(Tensor, module.weight).shape) > 0 else "its shape has a zero: gather the shards first"

    @property
    def stored_stack(self) -> StoredStack | None:
        """What reads W0 where it is held in a stored form."""
        return stored_stack(self.experts, self.parameter)

    @property
    def base_weight(self) -> nn.Parameter:
        """W0, (E, d, k) as stored."""
        return cast(nn.Parameter, self.experts._parameters[self.parameter])

    @property
    def holds_weight(self) -> bool:
        """Whether W0 is a parameter of the module of experts."""
        return self.parameter in self.experts._parameters

    @classmethod
    def frozen(cls, module: nn.Module) -> Weight:
        """W0, (E, n, m) as stored, or what reads it."""
        return frozen(module)

    @classmethod
    def dense(cls, module: nn.Module) -> Tensor:
        """W0 as numbers, (E, n, m) as stored: its own, or a copy of a stored form."""
        weight = cls.frozen(module)
        return weight.matrix() if isinstance(weight, Stored) else weight

    @classmethod
    def sizes(cls, shape: torch.Size) -> tuple[int, int]:
        """(d, k) of every expert."""
        return (shape[2], shape[1]) if cls.transposed else (shape[1], shape[2])

    def entered(self) -> None:
        """In place: the module of experts knows of it."""
        hold(self.experts, self)

    def left(self) -> None:
        """In place: the module of experts has forgotten it."""
        release(self.experts, self)

    def _put(self, weight: nn.Parameter) -> None:
        self.experts._parameters[self.parameter] = weight

    def set_aside(self) -> nn.Parameter | None:
        """W0, where something else has its place (`fold`)."""
        return self.__dict__[ASIDE][0] if ASIDE in self.__dict__ else None

    def units(self, weight: Tensor, adapters: tuple[str, ...]) -> Iterator[tuple[Tensor, list[Change]]]:
        """Every expert's matrix, a gate apart from its up projection as checkpoints keep them, and its changes."""
        for expert, matrix in enumerate(weight.unbind()):
            for part in row_blocks(self.experts, self.parameter, matrix.shape[0]):
                yield (
                    matrix[part],
                    [
                        prepare(
                            self.factors(name).of_expert(expert, slice(None) if self.transposed else part),
                            matrix[part],
                            transposed=self.transposed,
                        )
                        for name in adapters
                    ],
                )

    def adapted_weight(self) -> Tensor:
        """W0 + Σ ΔW over the active adapters, (E, n, m) as stored, differentiable in the factors."""
        stored = self.stored_stack
        weight = self.base_weight if stored is None else stored.matrix()
        return adapted_weight(weight, self.active_factors, transposed=self.transposed)

    def one_expert(self, expert: int) -> Tensor:
        """W0 of one expert, (n, m) as stored: its own numbers, or a copy of a stored form."""
        stored = self.stored_stack
        return self.base_weight[expert] if stored is None else stored.rows(slice(expert, expert + 1))[0]

    def adapted_expert(self, expert: int) -> Tensor:
        """W0 + Σ ΔW of one expert, (n, m) as stored, differentiable in the factors."""
        return adapted_weight(self.one_expert(expert), self.active_factors, transposed=self.transposed, expert=expert)


class LoraTransposedStack(LoraStack):
    """A stack whose matrices are W0ᵀ, (E, k, d): gpt-oss, Aria."""

    kind = "transposed-experts"
    transposed = True


class LoraSwappedStack(LoraTransposedStack):
    """The same where the module does not say so (Llama 4): PEFT's A is then what meets the output, and B the input."""

    kind = "swapped-experts"


def kind_of_stack(stack: ExpertStack) -> type[LoraStack]:
    """The layer kind of a stack."""
    if not stores_transposed(stack.experts):
        return LoraStack
    return LoraTransposedStack if getattr(stack.experts, "is_transposed", False) else LoraSwappedStack
