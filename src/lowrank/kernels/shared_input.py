"""One input gradient for all projections that read the same tensor.

A transformer block calls q, k and v (and gate and up) with one and the same x. Left to autograd, each makes an input
gradient of its own and the engine adds them, and each adds its low-rank part. Here the projections find each other by
the tensor they are called with, whatever the architecture, and share one accumulator: every projection adds dY·W, and
the low-rank parts of all are stacked and added as one product, dX += [dS₁ dS₂ …]·[A₁; A₂; …].

The last bits of a sum hang on its order. It is that of the calls, the last one first, in which autograd comes to the
nodes of single projections; those that were computed together (`together`) come all at once, and others wait for them.
"""

import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lowrank.core.stored import Weight
from lowrank.kernels.dropout import Mask
from lowrank.kernels.input_gradient import InputGradient

_local = threading.local()


class Part(NamedTuple):
    """What one projection adds to dX, dY·W0 + mask∘(dS·A): dy (T, d), weight (d, k), ds (T, r), a (r, k)."""

    dy: Tensor
    weight: Weight
    ds: Tensor
    a: Tensor
    mask: Mask | None


class SharedInput:
    """The gradient of one tensor x, (T, k), gathered from the adapted projections it was given to.

    It lives as long as the graph nodes of these projections. `token` is what ties them to x in autograd's graph: the
    engine runs x's node only when every projection that took the token has added its part. The token holds x's graph
    and is held here, which the graph holds: a circle that the garbage collector does not see through. So it goes when x
    goes, after which nobody can ask for it, and at the latest with the backward pass.
    """

    def __init__(self, x: Tensor) -> None:
        me = weakref.ref(self)
        self._x = weakref.ref(x, lambda _: SharedInput._part(me))
        self._version = x._version
        self._task = -1
        self._gradient = InputGradient()
        self._waiting: dict[int, Part] = {}
        self._due: set[int] = set()
        self._in_groups: set[int] = set()
        self.members = 0
        self.needs_gradient = x.requires_grad
        self.token: Tensor | None = _Join.apply(x, self) if x.requires_grad else x.new_empty(0)  # type: ignore[no-untyped-call]

    @staticmethod
    def _part(me: "weakref.ref[SharedInput]") -> None:
        if (shared := me()) is not None:
            shared.token = None

    def is_for(self, x: Tensor) -> bool:
        """True for the very tensor this was made for, not written to since, and as much in need of a gradient."""
        same = self._x() is x and self._version == x._version and self.needs_gradient == x.requires_grad
        return same and self.token is not None

    def join(self, in_group: bool = False) -> int:
        """The place of one more call with x; `in_group` where its part will be added with those of others."""
        place = self.members
        self.members += 1
        if in_group:
            self._in_groups.add(place)
        return place

    def add(self, parts: dict[int, Part], done: Iterable[int]) -> None:
        """The parts in dX of the calls at these places; `done`: all places whose node has run, whatever it gave."""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # a backward pass that stopped short of x leaves its sum behind: it is not ours
            self._start_over(task)
        self._waiting |= parts
        self._due.difference_update(done)
        self._add_down_to(max(self._due, default=-1))

    def take(self) -> Tensor | None:
        """dX, (T, k), handed over: the next backward pass starts from nothing."""
        self._add_down_to(-1)
        dx = self._gradient.total()
        self._start_over(-1)
        return dx

    def _start_over(self, task: int) -> None:
        self._gradient, self._waiting, self._due, self._task = InputGradient(), {}, set(self._in_groups), task

    def _add_down_to(self, place: int) -> None:
        """Add what waits, the last call first, as far as no call after it is still due."""
        for one in sorted(self._waiting, reverse=True):
            if one > place:
                self._gradient.add(*self._waiting.pop(one))


class _Join(Function):
    """x → an empty token whose gradient is ignored; x's own gradient is what the projections have gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedInput) -> Tensor:
        ctx.shared, ctx.shape = shared, x.shape
        ctx.set_materialize_grads(False)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.shared.token = None  # calls from here on belong to another pass, and the circle ends here at the latest
        with torch.no_grad():
            dx = ctx.shared.take()
        if dx is None:
            return None, None
        dx = dx.view(ctx.shape)
        return _refuse_second_derivative(dx) if torch.is_grad_enabled() else dx, None


def _refuse_second_derivative(gradient: Tensor) -> Tensor:
    """The same values, from which a further derivative is an error: autograd does not see how they were gathered."""
    refusal = torch._C._functions.DelayedError("trying to differentiate twice through lowrank's fused linear map", 1)
    result: Tensor = refusal(gradient.detach().requires_grad_())
    return result


def shared_input(x: Tensor) -> SharedInput:
    """The gatherer of x's gradient: the last call's where that was called with the same tensor, else a new one."""
    last: weakref.ref[SharedInput] | None = getattr(_local, "last", None)
    shared = last() if last is not None else None
    if shared is None or not shared.is_for(x):
        shared = SharedInput(x)
        _local.last = weakref.ref(shared)
    return shared


def is_current(shared: SharedInput, x: Tensor) -> bool:
    """Whether a call with x now would be given this gatherer."""
    last: weakref.ref[SharedInput] | None = getattr(_local, "last", None)
    return last is not None and last() is shared and shared.is_for(x)
