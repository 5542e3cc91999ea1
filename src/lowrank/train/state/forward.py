"""What forward passes change of a model by themselves: running statistics, the tables of dynamic rotary embeddings.

Most models change nothing. A buffer has changed where another tensor stands in its place, or the same one was written
to; a number where it is another one. Going on with a fresh model would compute other bits, so both belong to a run.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowrank.errors import CheckpointError
from lowrank.train.state.value import Number


class ForwardState:
    """Watches a model from the moment on that this is made."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._buffers = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
        self._numbers = dict(_numbers(model))

    def buffers(self) -> dict[str, Tensor]:
        """Those that have changed since, by their names."""
        return {name: buffer for name, buffer in self.model.named_buffers() if self._is_new(name, buffer)}

    def _is_new(self, name: str, buffer: Tensor) -> bool:
        first, version = self._buffers.get(name, (None, 0))
        return buffer is not first or buffer._version != version

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
