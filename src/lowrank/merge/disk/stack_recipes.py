"""A tensor of all experts, (E, n, m), as the matrices that lie in it one after another, each merged on its own."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from lowrank.files.safetensors import Entry, nbytes_of
from lowrank.merge.disk.adapters import ExpertRows, InStack
from lowrank.merge.disk.recipe import Recipe
from lowrank.merge.disk.turned import Turned
from lowrank.modelfiles.one_expert import OneExpert, RowsOfExpert, turned_shape
from lowrank.modelfiles.tensors import Source, StoredEntry


def matrices(recipe: Recipe) -> Iterator[tuple[Recipe, int]]:
    """(a matrix of the tensor, where it begins in the tensor's bytes): the tensor itself where it is no stack.

    The matrices are those of a merge in memory, a gate apart from its up projection, so that the bits are the same.
    """
    stack = recipe.contributions[0].stack if recipe.contributions else None
    if stack is None:
        yield recipe, 0
        return
    start = 0
    for number in range(recipe.shape[0]):
        for matrix in _of_expert(recipe, number, stack):
            yield matrix, start
            start += matrix.nbytes


def _of_expert(recipe: Recipe, number: int, stack: InStack) -> list[Recipe]:
    assert recipe.source is not None
    expert = OneExpert(recipe.source, number, stack.turn)
    parts = [_part(recipe, expert, stack, block) for block in range(len(stack.rows))]
    if not stack.turn:
        return parts
    name = f"expert {number} of {recipe.name}"
    return [Recipe(name, recipe.dtype, recipe.shape[1:], repacked=Turned(name, tuple(parts), stack.turn))]


def _part(recipe: Recipe, expert: OneExpert, stack: InStack, block: int) -> Recipe:
    """One of an expert's matrices as the model has it, one of the row blocks of equal size."""
    rows, columns = turned_shape(recipe.shape[1:], stack.turn)
    count = len(stack.rows)
    here = slice(rows // count * block, rows // count * (block + 1))
    shape = here.stop - here.start, columns
    replacement = recipe.replacement
    return Recipe(
        f"expert {expert.number} of {recipe.name}" + (f", rows from {here.start} on" if block else ""),
        recipe.dtype,
        shape,
        _source(expert, here, shape),
        None if replacement is None else expert.of_model(replacement[expert.number])[here],
        tuple(
            replace(one, stack=None, expert=ExpertRows(expert.number, recipe.shape[0], one.stack.rows[block]))
            for one in recipe.contributions
            if one.stack is not None
        ),
    )


def _source(expert: OneExpert, rows: slice, shape: tuple[int, int]) -> Source:
    """Where the rows are: bytes of the file as they are, or what has to be read by expert."""
    source, entry = expert.source, expert.source.entry
    if expert.turn or isinstance(entry, StoredEntry):
        return Source(
            source.shard, StoredEntry(entry.name, entry.dtype, shape, entry.offset, RowsOfExpert(expert, rows))
        )
    before = expert.number * prod(entry.shape[1:]) + rows.start * shape[1]
    return Source(source.shard, Entry(entry.name, entry.dtype, shape, entry.offset + nbytes_of(entry.dtype, (before,))))
