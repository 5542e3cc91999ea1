"""Whether numbers can be computed with: finite, and small enough that their squares are."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowrank.errors import MergeError

LARGEST = 1e150  # its square is a float64, and so is a sum of such squares


def all_finite(tensor: Tensor) -> bool:
    """True where no value is NaN or infinite.

    A sum is not finite if any of its terms is not, and takes a twentieth of the time of `isfinite` over all of them;
    only where finite terms have too large a sum is every one looked at.
    """
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch has no arithmetic in float8
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise FloatingPointError where `tensor` has values that are not finite, or whose squares are not in float64.

    what: the name of the tensor in the sentence; `named` says where it belongs.
    """
    if tensor.is_meta:
        return  # it has no values
    if not all_finite(tensor):
        raise FloatingPointError(f"{what} holds values that are not finite, or too large to compute with")
    if tensor.dtype == torch.float64 and tensor.numel() and float(tensor.abs().max()) > LARGEST:
        raise FloatingPointError(f"{what} holds values above {LARGEST:g}, too large to compute with")


@contextmanager
def named(where: str) -> Iterator[None]:
    """As a block: arithmetic that numbers were not fit for is a MergeError that names `where`."""
    try:
        yield
    except FloatingPointError as error:
        raise MergeError(f"{where}: {error}") from None
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise MergeError(f"{where}: it holds values that are not finite, or too large to be decomposed") from None
