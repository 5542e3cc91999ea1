"""The stored rows that a tensor of the result starts from, and whether a tensor is the base's own."""

import torch
from torch import Tensor

from lowrank.checkpoint.stored_base import NUMBERS
from lowrank.core.merging import row_blocks
from lowrank.files.safetensors import DTYPES, FLOATS
from lowrank.merge.disk.adapters import Contribution
from lowrank.merge.disk.recipe import Recipe
from lowrank.modelfiles.base import BaseFiles, Source
from lowrank.modelfiles.blocks import opened, read_entry_rows
from lowrank.modelfiles.one_expert import OneExpert
from lowrank.modelfiles.workspace import Workspace


def read_rows(recipe: Recipe, descriptor: int, rows: slice, workspace: Workspace, role: str = "stored") -> Tensor:
    """The stored rows (n', m) that the recipe starts from, before any change; `descriptor` is that of its source."""
    columns = recipe.matrix[1]
    if recipe.replacement is not None:
        block = recipe.replacement.reshape(recipe.matrix)[rows]
        return _with_rows(block.to(recipe.stored_dtype) if recipe.contributions else block, recipe, rows)
    assert recipe.source is not None
    length = (*recipe.source.entry.shape, 1)[0]
    known = slice(min(rows.start, length), min(rows.stop, length))
    if known == rows:
        return _with_rows(read_entry_rows(recipe.source, descriptor, columns, rows, workspace, role), recipe, rows)
    block = torch.zeros(rows.stop - rows.start, columns, dtype=recipe.stored_dtype)  # the end is an adapter's own
    if known.start < known.stop:
        block[: known.stop - known.start] = read_entry_rows(recipe.source, descriptor, columns, known, workspace, role)
    return _with_rows(block, recipe, rows)


def _with_rows(block: Tensor, recipe: Recipe, rows: slice) -> Tensor:
    """The block with those rows in it that adapters own, rounded to its dtype."""
    for owned in recipe.rows:
        here = (owned.at >= rows.start) & (owned.at < rows.stop)
        if here.any():
            block = block.index_copy(0, owned.at[here] - rows.start, owned.values.detach()[here].to(block.dtype))
    return block


def first_numbers(base: BaseFiles, name: str, one: Contribution) -> torch.Tensor | None:
    """The first numbers of W0's first row, in float64; None where it is no matrix. one: how the tensor stores W0.

    Of a stack they are those of its first expert's first row, as the model has it.
    """
    source, transposed = Source(*base.tensors[name]), one.transposed
    if source.entry.dtype not in FLOATS:
        return None
    if one.stack is not None:
        return OneExpert(source, 0, one.stack.turn).matrix[0, :NUMBERS].double()
    if len(source.entry.shape) != 2:
        return None
    with opened(source) as descriptor:
        rows = slice(0, min(NUMBERS, source.entry.shape[0]) if transposed else 1)
        some = read_entry_rows(source, descriptor, source.entry.shape[1], rows, Workspace(), "first")
        return (some[:, 0] if transposed else some[0, :NUMBERS]).double()


def equals_stored(base: BaseFiles, name: str, tensor: Tensor) -> bool:
    """True where `tensor`, rounded to the dtype of the base's tensor of this name, is that tensor bit for bit."""
    source = Source(*base.tensors[name])
    dtype = DTYPES.get(source.entry.dtype)
    if dtype is None or tuple(tensor.shape) != source.entry.shape:
        return False
    recipe = Recipe(name, source.entry.dtype, source.entry.shape, source)
    workspace, (n, m) = Workspace(), recipe.matrix
    matrix = tensor.reshape(n, m)
    with opened(source) as descriptor:
        return all(
            torch.equal(matrix[rows].to(dtype), read_rows(recipe, descriptor, rows, workspace))
            for rows in row_blocks(n, m)
        )
