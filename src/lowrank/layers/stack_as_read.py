"""The expert stack that a forward reads: W0 + Σ ΔW without a ΔW being formed, where the forward multiplies by it.

transformers' experts are one module with stacked parameters, and it is multiplied by in many ways: one expert after the
other (`F.linear(x, W[e])`, `x @ W[e]`), grouped (`grouped_mm(x, Wᵀ, offs)`), an expert for each row (`bmm(W[ids], x)`),
all at once (`bmm(x, W)`, Llama 4). `StackAsRead` stands for the adapted stack in all of them, so that every family and
every implementation in transformers' table runs its own forward: the product with the base's stack is the very one it
would make, and the low-rank products go along with it. Any other operation gets W0 + Σ ΔW formed, as every weight that
is read (`layers.reading`): slower, and right.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.core.dora import rescaled, rescaled_change
from lowrank.core.stored import Stored
from lowrank.core.stored.stack import StoredStack
from lowrank.kernels.grouped import grouped_linear, grouped_low_rank
from lowrank.layers.expert_pairs import Pair, active_pairs, first_goes_with_base
from lowrank.layers.in_turn import Product, all_experts, chosen_rows, one_expert, sorted_rows
from lowrank.layers.reading import WeightAsRead

if TYPE_CHECKING:
    from lowrank.layers.stack import LoraStack


class StackAsRead(WeightAsRead):
    """W0 + Σ ΔW of a stack, one of its experts, or one for each of some rows.

    base: what the plain forward would hold in its place; of a stored form what reads it, the whole stack but for one
    expert, whose matrix is (d, k) then. expert: None, one, or (S,). maps: True where its matrices are (d, k), for
    x·Wᵀ; False where they are (k, d), for x·W. layer: None for a stack without active adapters.
    """

    layer: "LoraStack"
    base: Tensor | Stored
    pairs: list[Pair]
    expert: int | Tensor | None
    maps: bool

    @staticmethod
    def whole(layer: "LoraStack") -> "StackAsRead":
        """The stack of `layer`, for one forward."""
        weight = layer.stored_stack or layer.base_weight
        return _read(layer, weight, active_pairs(layer), None, not layer.transposed, weight.shape)

    @staticmethod
    def frozen(stack: StoredStack) -> "StackAsRead":
        """A stack in a stored form that no active adapter changes."""
        return _read(None, stack, [], None, not stack.transposed, stack.shape)

    def form(self) -> Tensor:
        """W0 + Σ ΔW of what is read, a plain tensor: the same one however often it is asked for."""
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if mode not in self.formed:
            stored = self.base if not self.pairs else None
            if isinstance(stored, StoredStack):  # which nothing changes
                formed = stored.matrix() if self.expert is None else stored.matrix()[self.expert]
                as_stored = self.maps is not stored.transposed
            elif stored is not None:
                formed, as_stored = cast(Stored, stored).matrix(), self.maps
            else:
                formed, as_stored = self._adapted(), self.maps is not self.layer.transposed
            self.formed[mode] = formed if as_stored else formed.transpose(-2, -1)
        return self.formed[mode]

    def _adapted(self) -> Tensor:
        if isinstance(self.expert, int):
            return self.layer.adapted_expert(self.expert)
        stack = self.layer.adapted_weight()
        return stack if self.expert is None else stack[self.expert]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`func` with the low-rank products beside it where it is a product, else of the formed weight."""
        way = WAYS.get(func)
        if way is not None:
            with torch._C.DisableTorchFunctionSubclass():
                answer = way(func, *args, **(kwargs or {}))
            if answer is not NotImplemented:
                return answer
        return super().__torch_function__(func, types, args, kwargs)


def _read(
    layer: "LoraStack | None",
    base: Tensor | Stored,
    pairs: list[Pair],
    expert: int | Tensor | None,
    maps: bool,
    shape: Sequence[int],
) -> StackAsRead:
    trained = torch.is_grad_enabled() and any(pair.a.requires_grad or pair.b.requires_grad for pair in pairs)
    read: StackAsRead = Tensor._make_wrapper_subclass(
        StackAsRead, tuple(shape), dtype=base.dtype, device=base.device, requires_grad=trained
    )
    read.layer, read.base, read.pairs = cast("LoraStack", layer), base, pairs
    read.expert, read.maps, read.formed = expert, maps, {}
    if trained:
        read.listen()
    return read


def _getitem(_: Any, stack: Any, index: Any) -> Any:
    """W[e] and W[ids]."""
    if not isinstance(stack, StackAsRead) or stack.expert is not None:
        return NotImplemented
    if isinstance(index, Tensor) and not index.is_floating_point() and index.dtype is not torch.bool:
        if index.dim() == 1:
            base = stack.base[index] if isinstance(stack.base, Tensor) else stack.base
            return _read(stack.layer, base, stack.pairs, index, stack.maps, (len(index), *stack.shape[1:]))
        index = int(index) if index.dim() == 0 else index
    if isinstance(index, int) and not isinstance(index, bool):
        number = index % stack.shape[0]
        one = stack.base[index] if isinstance(stack.base, Tensor) else cast(StoredStack, stack.base).of_expert(number)
        return _read(stack.layer, one, stack.pairs, number, stack.maps, stack.shape[1:])
    return NotImplemented


def _transpose(_: Any, stack: Any, *dims: int, **named: int) -> Any:
    """Wᵀ, of every matrix."""
    places = {dim % stack.dim() for dim in (*dims, *named.values())}
    if places and places != {stack.dim() - 2, stack.dim() - 1}:
        return NotImplemented
    base = stack.base.transpose(-2, -1) if isinstance(stack.base, Tensor) else stack.base
    shape = (*stack.shape[:-2], stack.shape[-1], stack.shape[-2])
    return _read(stack.layer, base, stack.pairs, stack.expert, not stack.maps, shape)


def _matrix_transpose(func: Any, stack: Any) -> Any:
    """W.mT; W.T and W.t() of one expert."""
    if stack.dim() != 2 and func is not Tensor.mT.__get__:  # type: ignore[attr-defined]
        return NotImplemented
    return _transpose(func, stack, -2, -1)


def _linear(_: Any, input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    """F.linear(x, W[e], bias): x (..., k) → (..., d)."""
    if isinstance(input, StackAsRead) or not isinstance(weight.expert, int) or not weight.maps:
        return NotImplemented
    return one_expert(input, weight.base, bias, weight.pairs, weight.expert)


def _matmul(_: Any, input: Any, other: Any) -> Any:
    """x @ W[e], with the stack as (k, d): x (..., k) → (..., d)."""
    if isinstance(input, StackAsRead) or not isinstance(other.expert, int) or other.maps:
        return NotImplemented
    weight = other.base.t() if isinstance(other.base, Tensor) else other.base
    return one_expert(input, weight, None, other.pairs, other.expert)


def _in_turn(read: StackAsRead) -> Product:
    """The product with one expert of a stored stack."""
    return lambda rows, weight, expert: one_expert(rows, weight, None, read.pairs, expert)


def _grouped_mm(func: Any, mat_a: Any, mat_b: Any, *, offs: Tensor | None = None, **others: Any) -> Any:
    """grouped_mm(x, W, offs=offs), with the stack as (E, k, d): x (T, k), sorted by expert, → (T, d)."""
    if isinstance(mat_a, StackAsRead) or mat_b.expert is not None or mat_b.maps or offs is None or mat_a.dim() != 2:
        return NotImplemented
    if any(value is not None for value in others.values()):
        return NotImplemented
    if isinstance(mat_b.base, StoredStack):
        return sorted_rows(mat_a, offs, mat_b.base, _in_turn(mat_b))

    def product(rows: Tensor, stack: Tensor) -> Tensor:
        return cast(Tensor, func(rows, stack, offs=offs))

    first, *rest = mat_b.pairs
    weight = mat_b.base.detach()
    if first_goes_with_base(mat_b.pairs):
        y = base = grouped_linear(mat_a, first.dropped(mat_a), weight, product, first.a, first.b, first.scale, offs)
        if first.gains is not None:
            return rescaled(y, first.gains.of_groups(len(y), offs))
    else:
        base = y = product(mat_a, weight)
        rest = mat_b.pairs
    for pair in rest:
        change = grouped_low_rank(pair.dropped(mat_a), pair.a, pair.b, pair.scale, product)
        y = y + (change if pair.gains is None else rescaled_change(base, change, pair.gains.of_groups(len(y), offs)))
    return y


def _bmm(func: Any, input: Any, mat2: Any) -> Any:
    """bmm(W, x), x (S, k, n), with the matrices as (d, k); bmm(x, W), x (S, n, k), with them as (k, d)."""
    read, x, left = (input, mat2, True) if isinstance(input, StackAsRead) else (mat2, input, False)
    if isinstance(x, StackAsRead) or isinstance(read.expert, int) or read.maps is not left:
        return NotImplemented
    if isinstance(read.base, StoredStack):
        rows = x.mT if left else x
        ids, product = read.expert, _in_turn(read)
        h = all_experts(rows, read.base, product) if ids is None else chosen_rows(rows, ids, read.base, product)
        return h.mT if left else h
    h = base = func(read.base, x) if left else func(x, read.base)
    for pair in read.pairs:
        a, b = (pair.a, pair.b) if read.expert is None else (pair.a[read.expert], pair.b[read.expert])
        a, b, seen = a.to(x.dtype), b.to(x.dtype), pair.dropped(x)
        if left:
            change = torch.bmm(b, torch.bmm(a, seen))
        else:
            change = torch.bmm(torch.bmm(seen, a.transpose(1, 2)), b.transpose(1, 2))
        change = change * pair.scale
        if pair.gains is not None:
            gain = pair.gains.of_all() if read.expert is None else pair.gains.of_each(cast(Tensor, read.expert))
            change = rescaled_change(base, change, gain.unsqueeze(-1 if left else -2))
        h = h + change
    return h


def _data_ptr(_: Any, stack: Any) -> Any:
    """Whether the base's numbers are aligned is asked before a grouped product of them; what is read anew is."""
    return stack.base.data_ptr() if isinstance(stack.base, Tensor) else 0


WAYS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _getitem,
    Tensor.data_ptr: _data_ptr,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.mT.__get__: _matrix_transpose,  # type: ignore[attr-defined]
    Tensor.T.__get__: _matrix_transpose,  # type: ignore[attr-defined]
    Tensor.t: _matrix_transpose,
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
}
for _name, _owner in (("grouped_mm", F), ("_grouped_mm", torch)):
    if hasattr(_owner, _name):
        WAYS[getattr(_owner, _name)] = _grouped_mm
