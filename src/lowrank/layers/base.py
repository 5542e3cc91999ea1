"""A module that carries adapters: the user's own module, its class extended in place.

Injection changes a module's class from `C` to a subclass `LoraC` that adds the low-rank change in `forward`. The module
object, its parameters, its hooks and its `state_dict` keys stay what they were, `isinstance(module, C)` stays true, and
giving the plain layer back is setting the class back. Nothing is wrapped, so code that reaches for `layer.weight` keeps
working, and any subclass of Linear is adapted as it is, by the forward it already has.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank.core.dora import row_gain
from lowrank.core.factors import LoraFactors
from lowrank.core.merging import Change, adapted_weight, merge_weight, prepare
from lowrank.core.stored import Weight
from lowrank.core.stored.of_module import frozen_shape
from lowrank.errors import TargetError
from lowrank.layers.extended import REPLACED, extended_class, forward_is_replaced, rebind_forward, rebuild
from lowrank.layers.reading import AdaptedWeight, own_weight, say_dropout
from lowrank.layers.rowed import RowedLayer, with_rows

PREFIX = "lora_"
ASIDE = "_lowrank_aside"  # where a folded layer keeps its W0 and the names of its active adapters
PARAMETRISED = "its weight is computed by a parametrisation that was put on after injection: remove that first"
OWN = (  # what a layer keeps of adapters beside their modules
    "adapter_names", "active_adapters", "active_factors", "row_names", "active_rows", "plain_reason", "said_dropout",
)  # fmt: skip


def _attribute(adapter: str) -> str:
    """The submodule name of an adapter's factors; a submodule's name cannot hold a dot, an adapter's can."""
    return PREFIX + adapter.replace(".", "%2E")


class LoraLayer(RowedLayer):
    """What every adapted module can do. One subclass per layer kind gives `forward` and the shape of the weight.

    adapter_names: the adapters this layer holds; active_adapters: those whose change is in the output, in any number.
    """

    kind: ClassVar[str]
    plain: ClassVar[type[nn.Module]]  # the class before injection, and the layer kind that extends it; set with the
    mixin: ClassVar[type["LoraLayer"]]  # extended class, of which others (FSDP) may make a class of theirs
    weight_name: ClassVar[str] = "weight"  # what the module calls W0
    transposed: ClassVar[bool] = False  # True where the weight is stored as W0ᵀ, (k, d)
    supports_dora: ClassVar[bool] = False
    weight = AdaptedWeight()
    adapter_names: tuple[str, ...]
    active_adapters: tuple[str, ...]
    active_factors: tuple[LoraFactors, ...]  # in the order of active_adapters; what forward reads

    @staticmethod
    def refusal(module: nn.Module) -> str | None:  # noqa: ARG004  kinds look at it
        """Why `module` cannot be adapted, or None."""
        return None

    @property
    def holds_weight(self) -> bool:
        """Whether W0 is a parameter, and not computed by a parametrisation."""
        return self.weight_name in self._parameters

    @property
    def base_weight(self) -> nn.Parameter:
        """W0, whoever asks: the parameter that the module holds (what a parametrisation put there, if one did)."""
        weight = self._parameters.get(self.weight_name)
        return self.weight if weight is None else weight

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The answer of the plain class's forward, which reads W0 as its weight, with the rows that adapters own."""
        mend = bool(self.active_rows) and self.answers_by_rows()
        with own_weight(self, self.base_weight if mend else with_rows(self.base_weight, self.active_rows)):
            answer: Tensor = super().forward(*args, **kwargs)
        return self.mended(answer, *args, **kwargs) if mend else answer

    def adapted_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The answer of the plain class's forward on W0 + Σ ΔW: right whatever it does with its weight."""
        say_dropout(self)
        with own_weight(self, self.adapted_weight()):
            answer: Tensor = super().forward(*args, **kwargs)
        return answer

    @classmethod
    def stored(cls, weight: Tensor) -> Tensor:
        """The weight as a matrix, a view of it as stored: (d, k), or (k, d) where `transposed`."""
        return weight

    @classmethod
    def matrix(cls, weight: Tensor) -> Tensor:
        """The weight as W0 of h = W0·x, a view: (d, k)."""
        return cls.stored(weight).t() if cls.transposed else cls.stored(weight)

    @classmethod
    def frozen(cls, module: nn.Module) -> Weight:
        """W0 of a module of this kind, (d, k), a view of it; where that is stored otherwise, what reads it."""
        return cls.matrix(cast(Tensor, getattr(module, cls.weight_name)).detach())

    @classmethod
    def dense(cls, module: nn.Module) -> Tensor:
        """W0 of a module of this kind as numbers, a matrix as stored: its own weight where it has one, else a copy."""
        weight = module._parameters.get(cls.weight_name)
        return cls.stored(cast(Tensor, module.weight if weight is None else weight)).detach()

    @classmethod
    def sizes(cls, shape: torch.Size) -> tuple[int, int]:
        """(d, k) of a W0 that is stored in `shape`."""
        rows, columns = shape[0], math.prod(shape[1:])
        return (columns, rows) if cls.transposed else (rows, columns)

    def factors(self, adapter: str) -> LoraFactors:
        """The factors of one adapter."""
        return cast(LoraFactors, self._modules[_attribute(adapter)])

    def activate(self, adapters: tuple[str, ...]) -> None:
        """In place: exactly `adapters` are in the output.

        forward reads the factors as values, not by name, so that a compiled model can switch between adapters of equal
        rank and scale without being compiled again.
        """
        self.active_adapters = adapters
        self.active_factors = tuple(self.factors(name) for name in adapters)

    def add_factors(self, adapter: str, factors: LoraFactors) -> None:
        """In place: hold `factors` under the name `adapter`, not yet active."""
        self.add_module(_attribute(adapter), factors)
        self.adapter_names = (*self.adapter_names, adapter)

    def remove_factors(self, adapters: Collection[str]) -> None:
        """In place: forget the factors of `adapters`, those of them that there are."""
        for name in adapters:
            self._modules.pop(_attribute(name), None)
        self.adapter_names = tuple(name for name in self.adapter_names if name not in adapters)
        self.activate(tuple(name for name in self.active_adapters if name not in adapters))

    def holds(self, adapter: str) -> bool:
        """Whether the adapter has factors or rows here."""
        return adapter in self.adapter_names or adapter in self.row_names

    def is_needed(self) -> bool:
        """Whether the plain class could not compute with what is in the module, though no adapter has factors here."""
        return False

    def change(self, adapter: str, weighting: float = 1.0, weight: Tensor | None = None) -> Change:
        """ΔW of one adapter, ready to be merged; weight: W0 as `dense` gives it, read anew where not given."""
        weight = self.dense(self) if weight is None else weight
        return prepare(self.factors(adapter), weight, transposed=self.transposed, weighting=weighting)

    def gain(self, factors: LoraFactors) -> Tensor:
        """DoRA's g = m / ‖W0 + ΔW‖ of every output, (d,), of every expert where there are several (E, d)."""
        a, b = factors.effective()
        assert factors.magnitude is not None
        weight = self.dense(self)
        matrix = weight.mT if self.transposed else weight
        return row_gain(matrix, a.detach(), b.detach(), factors.scale, factors.magnitude)

    def units(self, weight: Tensor, adapters: tuple[str, ...]) -> Iterator[tuple[Tensor, list[Change]]]:
        """The matrices that `weight`, W0 as `dense` gives it, is merged by, views of it, and the adapters' ΔW of each.

        One, with the rows in it that the adapters own; a stack of experts has one for each of them.
        """
        rows = [self.rows(name) for name in adapters if name in self.row_names]
        changes = [self.change(name, weight=weight) for name in adapters if name in self.adapter_names]
        yield with_rows(weight, rows), changes

    @torch.no_grad()
    def merged_weight(
        self, adapters: tuple[str, ...], dtype: torch.dtype | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """W0 + Σ ΔW over `adapters`, a new tensor of W0's own shape, in `dtype` (W0's if not given), rounded once.

        weight: another W0, of which `dense` might be what a quantiser left.
        """
        weight = self.dense(self) if weight is None else weight
        merged = torch.empty_like(weight, dtype=dtype)
        places = (place for place, _ in self.units(merged, ()))
        for place, (matrix, changes) in zip(places, self.units(weight, adapters), strict=True):
            merge_weight(matrix, changes, place)
        return merged.view(frozen_shape(self))

    def fold(self) -> None:
        """In place: W0 + Σ ΔW over the active adapters takes W0's place, which is set aside as it is."""
        rowed = tuple(name for name in self.row_names if any(self.rows(name) is rows for rows in self.active_rows))
        weight = nn.Parameter(self.merged_weight((*self.active_adapters, *rowed)), requires_grad=False)
        self.__dict__[ASIDE] = (self.base_weight, self.active_adapters, self.active_rows)
        self.activate_rows(())
        self.activate(())
        self._put(weight)

    def _put(self, weight: nn.Parameter) -> None:
        self._parameters[self.weight_name] = weight

    def unfold(self) -> None:
        """In place: what `fold` set aside is back; nothing where it set nothing aside."""
        if ASIDE in self.__dict__:
            weight, active, rows = self.__dict__.pop(ASIDE)
            if rows:
                self.active_rows = rows
            self._put(weight)
            self.activate(active)

    def entered(self) -> None:
        """In place: what an extended layer has to do outside of itself."""

    def left(self) -> None:
        """In place: undo `entered`."""

    def adapted_weight(self) -> Tensor:
        """W0 + Σ ΔW over the active adapters, differentiable in the factors, of the weight's own shape and dtype."""
        weight = self.base_weight
        rowed = with_rows(self.stored(weight), self.active_rows)
        changed = adapted_weight(rowed, self.active_factors, transposed=self.transposed)
        return changed.view_as(weight)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by the plain class, since the extended one is made at run time; unfolded."""
        state = dict(self.__getstate__())  # type: ignore[no-untyped-call]
        if ASIDE in state:
            weight, active, state["active_rows"] = state.pop(ASIDE)
            if self.weight_name in state["_parameters"]:
                state["_parameters"] = {**state["_parameters"], self.weight_name: weight}
            state |= {"active_adapters": active, "active_factors": tuple(self.factors(name) for name in active)}
        return rebuild, (plain_class(self), lora_mixin(self)), state


def plain_class(layer: LoraLayer) -> type[nn.Module]:
    """The class the module had before injection."""
    return type(layer).plain


def lora_mixin(layer: LoraLayer) -> type[LoraLayer]:
    """The layer kind that extends the module."""
    return type(layer).mixin


def extend(module: nn.Module, mixin: type[LoraLayer]) -> LoraLayer:
    """In place: make `module` able to carry adapters. A second call changes nothing."""
    if isinstance(module, LoraLayer):
        return module
    if forward_is_replaced(module):
        raise TargetError(f"a {type(module).__name__} cannot be adapted: {REPLACED}")
    module.__class__ = extended_class(type(module), mixin)
    layer = cast(LoraLayer, module)
    layer.adapter_names = ()
    layer.activate(())
    rebind_forward(layer)
    layer.entered()
    return layer


def restore(layer: LoraLayer) -> nn.Module:
    """In place: give the plain module back. Its factors and rows are dropped; its weight is not touched."""
    for adapter in layer.adapter_names:
        del layer._modules[_attribute(adapter)]
    layer.remove_rows(layer.row_names)
    for name in OWN:
        layer.__dict__.pop(name, None)
    layer.left()
    module = cast(nn.Module, layer)
    module.__class__ = plain_class(layer)
    rebind_forward(module)
    return module


def let_go(layer: LoraLayer, adapters: Collection[str]) -> None:
    """In place: forget the factors and rows of `adapters`; a layer that has no others is the plain module again."""
    layer.remove_rows(adapters)
    layer.remove_factors(adapters)
    if not layer.adapter_names and not layer.row_names and not layer.is_needed():
        restore(layer)


def dimensions(mixin: type[LoraLayer], module: nn.Module) -> tuple[int, int]:
    """(d, k) of the module's W0."""
    return mixin.sizes(frozen_shape(module))
