"""One operation as a value: what is asked for, of tensors of which shapes; and the same of smaller ones.

Equal operations of a step (those of all layers of a kind) are one value, and are looked at once.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Done = Counter["Operation"]  # how often each was done
Seconds = Callable[[Done], float]  # how long that takes

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
BACKWARD = 2.5  # products of attention's backward pass, of those of its forward one: five for two


def _attention(query: Tensor, key: Tensor) -> float:
    """Of both products, of which causal attention needs half."""
    rows, heads, length, d = query.shape
    return 2.0 * rows * heads * length * key.shape[-2] * d


ARITHMETIC: dict[Any, Callable[..., float]] = {  # of what torch's own table counts otherwise, or not at all
    ATTENTION: lambda query, key, *_, **__: _attention(query, key),
    ATTENTION_BACKWARD: lambda _, query, key, *__, **___: BACKWARD * _attention(query, key),
    torch.ops.mkldnn._linear_pointwise.default: lambda x, m, *_, **__: 2.0 * x.numel() * m.shape[0],
}


@dataclass(frozen=True, slots=True)
class Like:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def made(self, device: str) -> Tensor:
        """One with numbers: ones of a float, zeros of all else, which are places in any table."""
        filled = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        one_by_one = filled.as_strided((filled.untyped_storage().nbytes() // self.dtype.itemsize,), (1,))
        one_by_one.fill_(self.dtype.is_floating_point)
        return filled

    def replaced(self, extent: int, by: int) -> "Like":
        """With every side of `extent` made `by` long, laid out in the same order."""
        shape = tuple(by if side == extent else side for side in self.shape)
        strides, step = list(self.strides), 1
        for at in sorted(range(len(shape)), key=lambda at: (self.strides[at], self.shape[at], at)):
            if self.strides[at]:
                strides[at], step = step, step * shape[at]
        return Like(shape, tuple(strides), self.dtype)


@dataclass(frozen=True, slots=True)
class Operation:
    """func: what is called with `args` and `options`, in which tensors are `Like`s.

    arithmetic: multiplications and additions of a product, 0 of all else; moved: bytes read and written.
    """

    func: Any
    args: Any
    options: Any
    arithmetic: float
    moved: int

    def called_with(self, device: str) -> tuple[list[Any], dict[str, Any]]:
        """(arguments, options) with tensors on a device."""
        args, options = _thawed(self.args, device), _thawed(self.options, device)
        return args, dict(options)

    def halved(self) -> "Operation | None":
        """Of tensors whose longest side is half as long, wherever a side is as long; None where nothing is left.

        Torch's own operations alone: whoever else wrote one may not look whether shapes fit.
        """
        if self.func.namespace not in ("aten", "mkldnn"):
            return None
        likes = [leaf for leaf in tree_leaves((self.args, self.options)) if isinstance(leaf, Like)]
        longest = max((side for like in likes for side in like.shape), default=0)
        if longest < 2:
            return None
        args, options = (_replaced(held, longest, longest // 2) for held in (self.args, self.options))
        args, options = Operation(self.func, args, options, 0.0, 0).called_with("meta")
        return noted(self.func, args, options, self.func(*args, **options))


def noted(func: Any, args: Any, options: Any, out: Any) -> Operation:
    """What was called, with the tensors it was given and those it answered with."""
    count = ARITHMETIC.get(func) or flop_registry.get(func.overloadpacket)
    arithmetic = float(count(*args, **options, out_val=out)) if count else 0.0
    given, answers = ([t for t in tree_leaves(held) if isinstance(t, Tensor)] for held in ((args, options), out))
    moved = sum(tensor.nbytes for tensor in (*given, *answers)) if given else 0
    return Operation(func, _frozen(args), _frozen(list(options.items())), arithmetic, moved)


def _frozen(held: Any) -> Any:
    """Tuples for lists and `Like`s for tensors."""
    if isinstance(held, Tensor):
        return Like(tuple(held.shape), held.stride(), held.dtype)
    return tuple(map(_frozen, held)) if isinstance(held, list | tuple) else held


def _thawed(held: Any, device: str) -> Any:
    """The reverse, with tensors, and what is made anew, on a device."""
    if isinstance(held, Like):
        return held.made(device)
    if isinstance(held, torch.device):
        return torch.device(device)
    return [_thawed(one, device) for one in held] if isinstance(held, tuple) else held


def _replaced(held: Any, extent: int, by: int) -> Any:
    """With sides of `extent`, and numbers that are as large, made `by`."""
    if isinstance(held, Like):
        return held.replaced(extent, by)
    if isinstance(held, tuple):
        return tuple(_replaced(one, extent, by) for one in held)
    return by if type(held) is int and held == extent else held
