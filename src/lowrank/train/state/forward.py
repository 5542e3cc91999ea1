"""What forward passes change of a model by themselves: running statistics, the tables of dynamic rotary embeddings.

Most models change nothing. Going on with a fresh model would compute other bits where one does, so what has changed
belongs to a run: buffers that hold other values than at the start, and plain numbers of modules. torch does not count
all writing to a tensor (batch normalisation's is not), so a copy is compared; of a buffer that is too large for one,
which is a weight in another form, the tensor's own count has to do.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError
from lowrank.train.state.value import Number

LARGE = 2**24  # bytes


class _First:
    """A buffer as it was."""

    def __init__(self, buffer: Tensor) -> None:
        small = buffer.numel() * buffer.element_size() <= LARGE
        self.buffer, self.version = buffer, buffer._version
        self.copy = buffer.detach().clone() if small else None

    def is_not(self, buffer: Tensor) -> bool:
        """Whether this is another one, or has other values."""
        if self.copy is None or buffer.shape != self.copy.shape or buffer.dtype != self.copy.dtype:
            return buffer is not self.buffer or buffer._version != self.version
        return not torch.equal(buffer, self.copy)


class ForwardState:
    """Watches a model from the moment on that this is made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._buffers = {name: _First(buffer) for name, buffer in model.named_buffers()}
        self._numbers = dict(_numbers(model))

    def buffers(self) -> dict[str, Tensor]:
        """Those that have changed since, by their names."""
        found = self.model.named_buffers()
        return {
            name: buffer for name, buffer in found if name not in self._buffers or self._buffers[name].is_not(buffer)
        }

    def numbers(self) -> dict[str, Number]:
        """{module:attribute: value} of those that are others than they were."""
        return {name: value for name, value in _numbers(self.model) if self._numbers.get(name) != value}

    @torch.no_grad()
    def restore(self, buffers: Mapping[str, Tensor], numbers: Mapping[str, Number]) -> None:
        """In place: what had changed is so again. Raises CheckpointError for what this model does not have."""
        own, known = dict(self.model.named_buffers()), dict(_numbers(self.model))
        for name, buffer in buffers.items():
            if name not in own:
                raise CheckpointError(f"the model has no buffer {name!r}, which the checkpoint has")
            path, _, last = name.rpartition(".")
            self.model.get_submodule(path)._buffers[last] = buffer.to(own[name].device)
        for name, value in numbers.items():
            if type(known.get(name)) is not type(value):
                raise CheckpointError(f"the model has no number {name!r}, which the checkpoint has")
            path, _, last = name.rpartition(":")
            setattr(self.model.get_submodule(path), last, value)


def _numbers(model: nn.Module) -> Iterator[tuple[str, Number]]:
    """(module:attribute, value) of every plain number that a module holds; whether it is training is the loop's."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) in (int, float, bool) and name != "training":
                yield f"{path}:{name}", value
