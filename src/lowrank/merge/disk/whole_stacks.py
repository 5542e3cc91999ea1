"""An adapter of stacked experts against a tensor of a base that holds all experts: which way round, and which rows."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal

from lowrank.checkpoint.expert_files import magnitude_fault
from lowrank.checkpoint.keys import MAGNITUDE
from lowrank.checkpoint.layout import kind_in_file
from lowrank.checkpoint.read import AdapterFiles
from lowrank.merge.disk.adapters import Adapter, Contribution, InStack
from lowrank.modelfiles.base import BaseFiles
from lowrank.modelfiles.experts import WholeStack
from lowrank.modelfiles.model_class import experts_of_class

Way = Literal["as stored", "transposed"]  # A meets the matrix's columns, or its rows


def whole_stack_changes(
    base: BaseFiles, adapter: Adapter, stacks: Mapping[str, WholeStack]
) -> tuple[dict[str, Contribution], list[str]]:
    """({tensor: the stack's change in it}, the faults) for stacks of the adapter, {its path: where the base has it}."""
    files, faults = adapter.files, []
    changed: dict[str, Contribution] = {}
    ways = {path: _ways(base, files, path, stack) for path, stack in stacks.items()}
    certain = {found[0] for found in ways.values() if len(found) == 1}
    for path, stack in stacks.items():
        if not ways[path]:
            faults.append(_shape_fault(base, files, path, stack))
            continue
        dora = MAGNITUDE in files.low_rank[path]
        way = ways[path][0] if len(ways[path]) == 1 else _of_square(base, stack, certain, dora)
        count, rows, columns = whole_shape(base, stack)
        if fault := magnitude_fault(files, path, count, rows if way == "as stored" else columns):
            faults.append(fault)
        changed |= _contributions(base, adapter, path, stack, way)
    return changed, faults


def whole_shape(base: BaseFiles, stack: WholeStack) -> tuple[int, int, int]:
    """(E, n, m) of the whole, whose row blocks may be several tensors."""
    shapes = [base.tensors[name][1].shape for name in stack.tensors]
    return shapes[0][0], sum(shape[1] for shape in shapes), shapes[0][2]


def _ways(base: BaseFiles, files: AdapterFiles, path: str, stack: WholeStack) -> list[Way]:
    """Which ways round the factors of `path` have the stack's shapes."""
    count, rows, columns = whole_shape(base, stack)
    shapes = [base.tensors[name][1].shape for name in stack.tensors]
    if any(len(shape) != 3 or (shape[0], shape[2]) != (count, columns) for shape in shapes):
        return []
    rank = files.config.rank(path)
    a, b = (tuple(tensor.shape) for tensor in files.pair(path))
    ways: list[Way] = ["as stored"] if (a, b) == ((count * rank, columns), (rows, count * rank)) else []
    if (a, b) == ((count * rank, rows), (columns, count * rank)) and len(stack.tensors) == 1:
        ways.append("transposed")
    return ways


def _of_square(base: BaseFiles, stack: WholeStack, certain: Iterable[Way], dora: bool) -> Way:
    """Which way round a square matrix is: as the files say, as the adapter's other stacks are, as the model's class.

    Files that are transposed where need be are not, as transformers reads them, where the shapes are the same.
    """
    if stack.turn:
        return "transposed" if stack.turn == "transposed" else "as stored"
    ways = set(certain)
    if len(ways) == 1:
        return ways.pop()
    return "transposed" if kind_in_file(experts_of_class(base), dora) == "transposed-experts" else "as stored"


def _shape_fault(base: BaseFiles, files: AdapterFiles, path: str, stack: WholeStack) -> str:
    count, rows, columns = whole_shape(base, stack)
    rank = files.config.rank(path)
    got = [list(tensor.shape) for tensor in files.pair(path)]
    return (
        f"{path} has A {got[0]} and B {got[1]}, and {' and '.join(stack.tensors)}, {count} experts of "
        f"{rows}×{columns}, want {[count * rank, columns]} and {[rows, count * rank]} at rank {rank}"
    )


def _contributions(
    base: BaseFiles, adapter: Adapter, path: str, stack: WholeStack, way: Way
) -> dict[str, Contribution]:
    """{tensor: its part of the change}; where the files turn the matrices, the change is that of the model's."""
    turn = "" if stack.turn.startswith("transposed") and way == "as stored" else stack.turn
    kind = "conv1d-linear" if way == "transposed" and not turn else "linear"
    changes, start = {}, 0
    for name in stack.tensors:
        _, n, m = base.tensors[name][1].shape
        rows = m if turn.startswith("transposed") else n
        cut = [0, rows // 2, rows] if stack.halves and kind == "linear" and rows % 2 == 0 else [0, rows]
        parts = tuple(slice(start + one, start + two) for one, two in pairwise(cut))
        start += rows
        whole = (slice(None),) if kind == "conv1d-linear" else parts
        changes[name] = Contribution(adapter, path, kind, stack=InStack(whole, turn))
    return changes
