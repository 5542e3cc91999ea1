"""What every stored form can do: say its shape, and give its matrix, whole or some rows of it, in a dtype."""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Memory(Protocol):
    """Memory that is used again, by the role it has: blocks of one size follow each other."""

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """(a tensor, its content undefined, and its bytes), valid until the role is taken again."""
        ...


def put(tensor: Tensor, dtype: torch.dtype, memory: Memory | None, role: str) -> Tensor:
    """The tensor in a dtype: in memory that is used again where there is some, for this role."""
    return tensor.to(dtype) if memory is None else memory.take(role, tuple(tensor.shape), dtype)[0].copy_(tensor)


class Stored(ABC):
    """W0 (d, k), held in a form of its own. It is frozen: nothing here writes to it, nothing derives it.

    scheme: its name; dtype: in which the format's own package gives the matrix, so that a reader who wants another one
    gets the matrix rounded to this dtype first. What `rows` and `matrix` give is new memory, the caller's own: they
    keep no copy.
    """

    scheme: ClassVar[str]
    requires_grad: ClassVar[bool] = False
    shape: torch.Size
    dtype: torch.dtype

    @property
    @abstractmethod
    def held(self) -> Tensor:
        """The tensor that holds the numbers, packed."""

    @abstractmethod
    def rows(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """W0[rows], (n', k), in `dtype` (its own where none is given); `rows` has a start, a stop and no step."""

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """W0, (d, k), in `dtype`: the same bits as all rows of `rows`."""
        return self.rows(slice(0, self.shape[0]), dtype)

    @property
    def form(self) -> str:
        """The form in words, with what varies in it."""
        return self.scheme

    @property
    def nbytes(self) -> int:
        """The memory it takes, its scales included."""
        return self.held.numel() * self.held.element_size()

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.held.device

    @property
    def _version(self) -> int:
        """How often the packed numbers were written to, as a tensor says it."""
        return self.held._version


Weight = Tensor | Stored


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as numbers: a tensor as it is, a stored one read in `dtype`, for one product and no longer."""
    return weight.matrix(dtype) if isinstance(weight, Stored) else weight
