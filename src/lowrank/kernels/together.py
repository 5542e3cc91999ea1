"""Projections of one input, computed together at the call of the first.

A transformer block calls q, k and v (and gate and up) one after the other with one and the same x. What a call costs
beside its products is mostly the way to them: after a product of a layer's size, nothing of Python and of torch is in
the processor's caches any more. So once projections were seen to be called with the same tensor, the first of them
computes the answers of all, thin products first, and the others find theirs ready; backward is one node for all.
Measured on a Xeon, 6×768, all linear layers: 4 % of a step in bfloat16 and 3 % in float32.

Who belongs together is learned from the calls, never from names, and forgotten where it did not come true. Nothing of
it is in a number: an answer computed ahead is given only for the very tensors it was computed from, by the products
that would compute it alone, one by one; only x's masks, its casts and the node are shared. dX is summed by one gatherer
in the order of the calls, alone or together (`shared_input`). One product for all, x by [A₁; A₂; …], would be faster,
but a library sums a wider product in an order of its own: a run would differ from one that has to learn again. Under
saved-tensor hooks (gradient checkpointing) every projection is computed alone, so that a recomputed block keeps what
the first pass kept.
"""

import threading
import weakref
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lowrank.core.stored import Weight
from lowrank.kernels import dropout
from lowrank.kernels.dropout import Mask
from lowrank.kernels.fused import fused_linear, in_dtype_of, is_tracked, reason_against
from lowrank.kernels.group import FusedGroup, Group
from lowrank.kernels.hooks import are_saved_tensors_watched
from lowrank.kernels.order import few_rows
from lowrank.kernels.shared_input import is_current

MOST = 8  # projections in a group


class Operands(NamedTuple):
    """What one projection is computed from: weight (d, k), bias (d,), a (r, k), b (d, r), the scale s, the dropout.

    Weight and bias are as the layer has them, also where autocast casts them for the product.
    """

    weight: Weight
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0

    def versions(self) -> tuple[int, ...]:
        """How often the tensors were written to."""
        weight, bias, a, b, *_ = self
        versions = (weight._version, a._version, b._version)
        return versions if bias is None else (*versions, bias._version)

    def are(self, others: "Operands") -> bool:
        """Whether these are the very same tensors, and equal numbers."""
        same = self.weight is others.weight and self.bias is others.bias and self.a is others.a and self.b is others.b
        return same and self[4:] == others[4:]


class Site(Protocol):
    """A layer: what it would be computed from now, or None where it must not be computed ahead."""

    def operands(self) -> Operands | None: ...


class _Ready(NamedTuple):
    """An answer that waits for the call of its layer."""

    operands: Operands  # held: the id of a tensor that is gone may be another's
    versions: tuple[int, ...]
    h: Tensor
    group: Group
    at: int  # in the group


class _Calls:
    """The calls with one tensor x: by which layers, and which answers wait for theirs.

    They end with x, or where a layer is called with another tensor.
    """

    def __init__(self, x: Tensor, first: Any) -> None:
        me = weakref.ref(self)
        self._x = weakref.ref(x, lambda _: _Calls._x_died(me))
        self._version = x._version
        self.needs_gradient = x.requires_grad
        self.layers: list[weakref.ref[Any]] = [weakref.ref(first)]
        self.ready: dict[int, _Ready] = {}

    @staticmethod
    def _x_died(me: "weakref.ref[_Calls]") -> None:
        if (calls := me()) is not None:
            calls.end()

    def end(self) -> None:
        """Learn who was alone with x, and whose answers were computed in vain: they are let go, and left alone."""
        first = self.layers[0]()
        if first is not None and self.ready:
            _followers.pop(first, None)
            _settled.add(first)
        elif first is not None and first not in _settled:
            _followers.setdefault(first, ())
        self.ready.clear()

    def is_for(self, x: Tensor) -> bool:
        """True for the very tensor this was made for, not written to since, and as much in need of a gradient."""
        return self._x() is x and self._version == x._version and self.needs_gradient == x.requires_grad

    def note(self, layer: Any) -> None:
        """Learn that `layer` is called with the tensor that the first layer was called with."""
        first = self.layers[0]()
        known = [ref() for ref in self.layers]
        if first is None or len(known) >= MOST or any(layer is one for one in known):
            return
        self.layers.append(weakref.ref(layer))
        if first not in _settled:
            _followers[first] = tuple(self.layers[1:])


class _Local(threading.local):
    calls: _Calls | None = None


_local = _Local()
# by the first layer called with an input, those that are called with it after; none for a layer that is alone
_followers: "weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Any], ...]]" = weakref.WeakKeyDictionary()
_settled: "weakref.WeakSet[Any]" = weakref.WeakSet()  # layers whose followers did not come once: not learned again


def projection(layer: Site, x: Tensor, own: Operands, share_mask: bool = True) -> Tensor:
    """W0·x + bias + s·B·A·dropout(x) of `layer`, alone or with those that are called with the same x: (..., d).

    With `share_mask` all that are called with x read it through one dropout mask, whether computed together or not.
    """
    if not is_tracked(x, own.bias, own.a, own.b) or few_rows(x) or are_saved_tensors_watched():
        return _alone(layer, x, own, share_mask)
    calls = _local.calls
    if calls is None or not calls.is_for(x):
        if calls is not None:
            calls.end()
        calls = _local.calls = _Calls(x, layer)
        followers = _followers.get(layer)
        if followers is not None and (share_mask or not own.dropout):
            return _compute(calls, x, _group(layer, x, own, followers), _mask(layer, x, own, share_mask))
    elif (ready := calls.ready.pop(id(layer), None)) is not None:
        current = is_current(ready.group.shared, x)  # else it would add to another sum, were it computed alone
        if current and ready.operands.are(own) and ready.versions == own.versions():
            ready.group.hand_out(ready.at)
            _mask(layer, x, own, share_mask)  # it has read x: were it to come again, it would get another mask
            return ready.h
    else:
        calls.note(layer)
    return _alone(layer, x, own, share_mask)


def _alone(layer: Site, x: Tensor, own: Operands, share_mask: bool) -> Tensor:
    weight, bias, a, b, scale, _ = own
    return fused_linear(x, weight, bias, a, b, scale, _mask(layer, x, own, share_mask))


def _mask(layer: Site, x: Tensor, own: Operands, share: bool) -> Mask | None:
    if not own.dropout:
        return None
    return dropout.shared(own.dropout, x, layer) if share else dropout.draw(own.dropout, x)


def _group(
    layer: Site, x: Tensor, own: Operands, followers: tuple[weakref.ref[Any], ...]
) -> list[tuple[Site, Operands]]:
    """The layer and those that follow it, as far as they can be computed from x now."""
    found = [(layer, own)]
    for ref in followers:
        follower = ref()
        if follower is not None and (theirs := follower.operands()) is not None and _fits(x, own, theirs):
            found.append((follower, theirs))
    return found


def _fits(x: Tensor, own: Operands, theirs: Operands) -> bool:
    """Whether a layer can be computed from x where it would only be called with it later, and in the same way."""
    weight, bias, a, b, *_ = theirs
    here = weight.device == x.device == a.device == b.device and weight.shape[1] == x.shape[-1]
    alike = is_tracked(x, bias, a, b) and own.dropout == theirs.dropout
    return here and alike and reason_against(x, weight, bias) is None


def _compute(calls: _Calls, x: Tensor, group: list[tuple[Site, Operands]], mask: Mask | None) -> Tensor:
    """The first layer's answer; the others' wait in `calls`."""
    _, _, a, b, scales, _ = zip(*(one for _, one in group), strict=True)
    weights, biases = zip(*(in_dtype_of(x, one.weight, one.bias) for _, one in group), strict=True)
    if mask is not None:
        scales = tuple(scale / mask.kept for scale in scales)
    together = Group(x)
    answers: tuple[Tensor, ...] = FusedGroup.apply(  # type: ignore[no-untyped-call]
        together.shared.token, x.detach(), together, scales, mask, *weights, *biases, *a, *b
    )
    together.hand_out(0)
    for index, ((layer, one), h) in enumerate(zip(group[1:], answers[1:], strict=True), 1):
        calls.layers.append(weakref.ref(layer))
        calls.ready[id(layer)] = _Ready(one, one.versions(), h, together, index)
    return answers[0]
