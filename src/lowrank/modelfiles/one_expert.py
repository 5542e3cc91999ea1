"""One expert of a stack in a base's files, as the model has it: read, and turned where the files have it otherwise."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lowrank.checkpoint.fusions import Turn
from lowrank.modelfiles.blocks import some_rows
from lowrank.modelfiles.tensors import Source


def turned_shape(shape: tuple[int, ...], turn: Turn) -> tuple[int, int]:
    """The shape of a matrix as the model has it, of one (n, m) in the files; and the other way round."""
    return (shape[1], shape[0]) if turn.startswith("transposed") else (shape[0], shape[1])


def turned(matrix: Tensor, turn: Turn, back: bool = False) -> Tensor:
    """A matrix of the files as the model has it, a new view or tensor; `back`: the other way round.

    interleaved: the files' rows are those of a gate and of an up projection in turn, the model's the one's, then the
    other's.
    """
    if turn.startswith("transposed"):
        return matrix.t()
    if turn == "interleaved":
        halves: Tensor = matrix.unflatten(0, (2, -1) if back else (-1, 2))
        return halves.transpose(0, 1).flatten(0, 1)
    return matrix


@dataclass(eq=False)
class OneExpert:
    """Expert `number` of the stack at `source`, (E, n, m) in the files. It is read once, and kept while this is."""

    source: Source
    number: int
    turn: Turn

    @cached_property
    def matrix(self) -> Tensor:
        """The expert as the model has it."""
        flat = some_rows(self.source, slice(self.number, self.number + 1))
        return self.of_model(flat.view(self.source.entry.shape[1:]))

    def of_model(self, matrix: Tensor) -> Tensor:
        """A matrix of the files as the model has it."""
        return turned(matrix, self.turn)


@dataclass(eq=False)
class RowsOfExpert:
    """Some rows of an expert, a form like those that a weight is stored in."""

    expert: OneExpert
    within: slice
    parts: dict[str, Source] = field(default_factory=dict)

    def rows(self, rows: slice) -> Tensor:
        """Rows of these, (n', m), new memory."""
        start = self.within.start
        return self.expert.matrix[start + rows.start : start + rows.stop].clone(memory_format=torch.contiguous_format)
