"""Memory that is used again: blocks of one size follow each other, and new memory costs more than their arithmetic."""

from math import prod

import torch
from torch import Tensor

CACHE_LINE = 64  # bytes; arithmetic is slower where a tensor does not begin with one


class Workspace:
    """Memory that one thread uses again for every block, by the role it has."""

    def __init__(self) -> None:
        self._memory: dict[str, bytearray] = {}
        self._last: dict[str, tuple[tuple[object, ...], Tensor, memoryview]] = {}

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """A tensor of this shape, its content undefined, and its bytes; valid until the role is taken again."""
        last = self._last.get(role)
        if last is None or last[0] != (*shape, dtype):
            last = self._last[role] = ((*shape, dtype), *self._view(role, shape, dtype))
        return last[1:]

    def _view(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        count = prod(shape) * dtype.itemsize
        if len(self._memory.get(role, b"")) < count + CACHE_LINE:
            self._memory[role] = bytearray(count + CACHE_LINE)
        whole = torch.frombuffer(self._memory[role], dtype=torch.uint8)
        first = -whole.data_ptr() % CACHE_LINE
        memory = memoryview(self._memory[role])[first : first + count]
        return whole[first : first + count].view(dtype).view(*shape), memory
