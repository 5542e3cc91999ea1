"""What a step without numbers would hold and do: bytes alive and at their height, and every operation.

Every operation that torch is asked for goes by. A storage is alive from the operation that first answers with it until
Python and autograd let go of it, as memory would be; on the meta device it has a size and no memory.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.study.estimate.grouped import BATCHED, GROUPED, even_batches, grouped_answer
from lowrank.study.estimate.operation import Done, noted

READ = torch.ops.aten._local_scalar_dense.default


class Counting(TorchDispatchMode):
    """Use it as a context manager; tensors in `standing` are there anyway and not counted.

    live, height: bytes; in_phase: {phase: its height}, where `phase` says what is going on; done: how often each
    operation was.
    """

    def __init__(self, standing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.done: Done = Counter()
        self.phase = ""
        self.in_phase: dict[str, int] = {}
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in standing}

    @property
    def height(self) -> int:
        """Bytes at the most."""
        return max(self.in_phase.values(), default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is READ:  # "is nothing padded?", "is this the first row?": yes
            return True
        out = grouped_answer(*args, **kwargs) if func is GROUPED else func(*args, **kwargs)
        answers = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        for tensor in answers:
            self._note(tensor)
        if not func.is_view and answers:
            if func is GROUPED:
                func, args, kwargs = BATCHED, even_batches(*args, **kwargs), {}
            self.done[noted(func, args, kwargs, out)] += 1
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._gone, key)
        self.in_phase[self.phase] = max(self.in_phase.get(self.phase, 0), self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
