"""A stack of experts as the model has it, read whole from files that keep it whole or expert by expert."""

import torch
from torch import Tensor

from lowrank.modelfiles.base import BaseFiles, Source
from lowrank.modelfiles.blocks import whole
from lowrank.modelfiles.experts import InFiles, StackInFiles
from lowrank.modelfiles.one_expert import turned, turned_shape


def stack_shape(base: BaseFiles, stack: InFiles) -> tuple[int, ...]:
    """(E, n, m) of the stack in the model."""
    if isinstance(stack, StackInFiles):
        shapes = [base.tensors[names[0]][1].shape for names in stack.parts]
        return len(stack.parts[0]), sum(shape[0] for shape in shapes), shapes[0][1]
    shapes = [turned_shape(base.tensors[name][1].shape[1:], stack.turn) for name in stack.tensors]
    return base.tensors[stack.tensors[0]][1].shape[0], sum(rows for rows, _ in shapes), shapes[0][1]


def read_stack(base: BaseFiles, stack: InFiles) -> Tensor:
    """The stack, (E, n, m), in the dtype of the files: new memory."""
    if isinstance(stack, StackInFiles):
        experts = zip(*stack.parts, strict=True)
        return torch.stack([torch.cat([_read(base, name) for name in names]) for names in experts])
    tensors = [_read(base, name) for name in stack.tensors]
    return torch.stack(
        [torch.cat([turned(matrix, stack.turn) for matrix in matrices]) for matrices in zip(*tensors, strict=True)]
    )


def _read(base: BaseFiles, name: str) -> Tensor:
    source = Source(*base.tensors[name])
    return whole(source).view(source.entry.shape)
