"""Where a base's files keep the experts that the model has as one stack: singly or whole, by transformers' table."""

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank.checkpoint.fusions import Turn, fusions_of
from lowrank.modelfiles.base import BaseFiles

GATE_AND_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True, slots=True)
class StackInFiles:
    """parts: the row blocks of the stack's matrices, one after another, each by the tensors of all experts in order."""

    parts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class WholeStack:
    """tensors: the row blocks of the stack's matrices, mostly one, each a tensor (E, n, m).

    turn: how the files turn the matrices against those of the model; halves: whether a matrix is a gate's rows above an
    up projection's, which merging in memory takes apart.
    """

    tensors: tuple[str, ...]
    turn: Turn
    halves: bool = False


InFiles = StackInFiles | WholeStack


def stacks_in_files(base: BaseFiles) -> dict[str, InFiles]:
    """{the stack's path in the model: where its experts are} of all stacks that the base has every expert of."""
    fusions = fusions_of(base.config)
    singles: dict[tuple[str, int], dict[int, dict[int, str]]] = {}
    wholes: dict[tuple[str, int, Turn], dict[int, str]] = {}
    for name, (_, entry) in base.tensors.items():
        if part := fusions.part(name):
            singles.setdefault((part.stack, part.blocks), {}).setdefault(part.number, {})[part.expert] = name
        elif len(entry.shape) == 3 and (whole := fusions.whole(name)):
            wholes.setdefault((whole.stack, whole.blocks, whole.turn), {})[whole.number] = name
    found: dict[str, InFiles] = {
        path: StackInFiles(tuple(tuple(parts[i][e] for e in range(len(parts[i]))) for i in range(count)))
        for (path, count), parts in singles.items()
        if _is_whole(parts, count)
    }
    for (path, count, turn), tensors in wholes.items():
        if set(tensors) == set(range(count)):
            found.setdefault(path, WholeStack(tuple(tensors[i] for i in range(count)), turn))
    return {path: _with_halves(base, path, stack, found) for path, stack in found.items()}


def _is_whole(parts: Mapping[int, Mapping[int, str]], count: int) -> bool:
    """Whether every part is there, with the same experts, from 0 on."""
    experts = set(range(len(parts.get(0, ()))))
    return set(parts) == set(range(count)) and all(set(part) == experts for part in parts.values())


def _with_halves(base: BaseFiles, path: str, stack: InFiles, found: Mapping[str, InFiles]) -> InFiles:
    """The stack, a whole one with the word on its halves: (E, 2I, H) beside (E, H, I), not (E, H, 2I) beside (E, I, H).

    Files that turn the matrices, or have the halves in turn, do so for models that have them one above the other.
    """
    root, _, leaf = path.rpartition(".")
    if not isinstance(stack, WholeStack) or leaf != GATE_AND_UP or len(stack.tensors) > 1:
        return stack
    down = found.get(f"{root}.{DOWN}")
    if stack.turn or not isinstance(down, WholeStack) or len(down.tensors) > 1:
        return WholeStack(stack.tensors, stack.turn, True)
    _, rows, columns = base.tensors[stack.tensors[0]][1].shape
    halves = base.tensors[down.tensors[0]][1].shape[1:] == (columns, rows // 2)
    return WholeStack(stack.tensors, stack.turn, halves)
