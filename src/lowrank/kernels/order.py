"""In which order the products of h = W0·x + B·A·x are contracted: chosen per shape, dtype and device, and explained.

Two choices cost differently by shape. What the change costs beyond W0·x in the forward pass:

accumulate   S·Bᵀ into the output in place: 2·T·r·d operations, T·d read and written
fold         W0 + B·A first, then one product: 2·d·k·r operations, d·k read, written and read again

Fold wins for many tokens over a small weight. It rounds the folded weight, which is harmless in float32 and wider but
swallows small changes in half precision, where it is never chosen. (RunLoRA, arXiv 2312.03415, counts the operations;
here the bytes are counted too, since at r = 16 they weigh more.)

Where the two estimates are closer than the model can be trusted, the change is accumulated: a close call is worth less
than 0.3 % of a step. No clock is asked, here or for any other product: a run is to have the same bits each time.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lowrank.kernels.processor import half_products_are_slow, has_matrix_tiles
from lowrank.kernels.rehearsal import device_type

OPERATIONS_PER_BYTE = {"cpu": 5.0, "cuda": 200.0}  # done while one byte comes from memory, on one core or one GPU
UNSURE = 0.25  # estimates closer than this share do not tell which is cheaper
FEW_TOKENS = 96  # in inference
FEW_ROWS = 128  # in training
DECODING = 64  # below so many tokens there is nothing to gain: the products are as thin as the factors


@dataclass(frozen=True, slots=True)
class Order:
    """The order for one shape, and why: `fold` in forward, `accumulate_dx` in backward."""

    fold: bool
    accumulate_dx: bool
    why: str


def accumulates(dtype: torch.dtype, device: str) -> bool:
    """Whether dX is accumulated inside the product dX += dY·W, or added after it.

    On CPUs without matrix tiles (AMX) the half-precision products accumulate into their output more slowly than a
    separate addition takes (measured on an EPYC: 4 % against 2 % of a product); everywhere else accumulation is free.
    """
    return device != "cpu" or dtype.itemsize >= 4 or has_matrix_tiles()


def thin_products_are_slow(x: Tensor) -> bool:
    """Whether x (..., k) has so few rows that its products with the factors are slower in its dtype than in float32.

    So it is on CPU for half precision: one token at k = 768 takes 13 µs in bfloat16 and 2 µs in float32 (measured;
    benchmarks/decoding.py compares whole models).
    """
    return device_type(x) == "cpu" and x.dtype.itemsize == 2 and x.numel() < FEW_TOKENS * x.shape[-1]


def few_rows(x: Tensor) -> bool:
    """Whether x (..., k) has so few rows that plain operations train faster than a node of our own.

    So it is on CPU: at 64 rows a step of 6×768 takes 1.40 of the floor in bfloat16 instead of 1.57, in float32 1.17
    instead of 1.22; at 192 rows the node is ahead in one and even in the other (measured on a Xeon with AMX).
    """
    few = device_type(x) == "cpu" and x.numel() < FEW_ROWS * x.shape[-1]
    return few and not half_products_are_slow(x.dtype)  # which the nodes avoid, but for W0·x


@cache
def choose_order(tokens: int, k: int, d: int, rank: int, dtype: torch.dtype, device: str) -> Order:
    """The order for x (tokens, k) and W0 (d, k) at rank `rank`."""
    inside = accumulates(dtype, device)
    if dtype.itemsize < 4:
        return Order(False, inside, f"accumulate: folding would round small changes away in {str(dtype)[6:]}")
    if tokens < DECODING:
        return Order(False, inside, f"accumulate: {tokens} tokens are too few for folding {d}×{k} to pay")
    accumulate, fold = _estimates(tokens, k, d, rank, dtype.itemsize, OPERATIONS_PER_BYTE.get(device, 20.0))
    if abs(accumulate - fold) > UNSURE * max(accumulate, fold):
        name = "fold" if fold < accumulate else "accumulate"
        return Order(fold < accumulate, inside, f"{name}: estimated {fold / accumulate:.2f} of accumulating")
    return Order(False, inside, f"accumulate: folding ({fold / accumulate:.2f} of it) is too close to call")


def _estimates(tokens: int, k: int, d: int, rank: int, itemsize: int, balance: float) -> tuple[float, float]:
    """The cost of accumulating and of folding, in bytes' worth of time."""
    accumulate = tokens * d * (2 * rank / balance + 2 * itemsize)
    fold = d * k * (2 * rank / balance + 3 * itemsize)
    return accumulate, fold
