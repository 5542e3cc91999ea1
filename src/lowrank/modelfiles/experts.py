"""Where a base's files keep the experts that the model has as one stack: one by one, by transformers' own table."""

from collections.abc import Mapping
from dataclasses import dataclass

from lowrank.checkpoint.fusions import fusions_of
from lowrank.modelfiles.base import BaseFiles


@dataclass(frozen=True, slots=True)
class StackInFiles:
    """parts: the row blocks of the stack's matrices, one after another, each by the tensors of all experts in order."""

    parts: tuple[tuple[str, ...], ...]


def stacks_in_files(base: BaseFiles) -> dict[str, StackInFiles]:
    """{the stack's path in the model: where its experts are} of all that the base stores one by one, and whole."""
    fusions = fusions_of(base.config)
    found: dict[tuple[str, int], dict[int, dict[int, str]]] = {}
    for name in base.tensors:
        if part := fusions.part(name):
            found.setdefault((part.stack, part.blocks), {}).setdefault(part.number, {})[part.expert] = name
    return {
        path: StackInFiles(tuple(tuple(parts[i][e] for e in range(len(parts[i]))) for i in range(count)))
        for (path, count), parts in found.items()
        if _is_whole(parts, count)
    }


def _is_whole(parts: Mapping[int, Mapping[int, str]], count: int) -> bool:
    """Whether every part is there, with the same experts, from 0 on."""
    experts = set(range(len(parts.get(0, ()))))
    return set(parts) == set(range(count)) and all(set(part) == experts for part in parts.values())
