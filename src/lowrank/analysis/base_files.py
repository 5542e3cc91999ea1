"""The weights W0 that an adapter changes, from the base's files alone: read one at a time, no model is built."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowrank.checkpoint import AdapterFiles
from lowrank.checkpoint.each_expert import expert_path
from lowrank.checkpoint.fusions import Turn
from lowrank.errors import CheckpointError
from lowrank.files.safetensors import FLOATS
from lowrank.merge.disk.adapters import Adapter, Contribution
from lowrank.merge.disk.expert_places import single_parts, stacks_for
from lowrank.merge.disk.match import match
from lowrank.modelfiles.base import BaseFiles, Source, read_base
from lowrank.modelfiles.blocks import whole
from lowrank.modelfiles.one_expert import OneExpert


@dataclass(frozen=True, slots=True)
class Block:
    """A tensor of the base that holds W0 of a module, or a block of its rows. transposed: it holds W0ᵀ.

    expert: which one W0 is of the tensor's, where it holds all experts of a mixture; turn: how their bytes lie.
    """

    name: str
    transposed: bool
    expert: int | None = None
    turn: Turn = ""


@dataclass(frozen=True)
class BaseWeights:
    """Where the base stores W0 of every adapted module, single experts of a mixture included.

    sources: {module: the blocks of its rows, in order}, by the order of the files, so that one pass over them will do;
    parts: {module: which of how many equal row blocks of that W0 is}, of an old adapter's single experts in stacks.
    """

    base: BaseFiles
    sources: dict[str, tuple[Block, ...]]
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def matrix(self, path: str) -> Tensor:
        """W0 of h = W0·x, (d, k), in the base's own dtype."""
        blocks = [self._read(block) for block in self.sources[path]]
        matrix = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        number, count = self.parts.get(path, (0, 1))
        return matrix.chunk(count)[number]

    def _read(self, block: Block) -> Tensor:
        source = Source(*self.base.tensors[block.name])
        stored = whole(source) if block.expert is None else OneExpert(source, block.expert, block.turn).matrix
        return stored.t() if block.transposed else stored


def find_base_weights(files: AdapterFiles, location: str | os.PathLike[str]) -> BaseWeights:
    """The places of an adapter's modules in the base at `location`, found as merging on disk finds them.

    files: with stacks of experts as the adapter's file has them; each expert is a module of its own in what is found.

    Raises CheckpointError for a base whose files are damaged, that is not this adapter's (all faults listed), or that
    is quantised.
    """
    base = read_base(location)
    singles = single_parts(base, files, stacks_for(base, files))
    found = match(base, Adapter(files.folder, files, 1.0))
    order = {name: number for number, name in enumerate(base.tensors)}
    blocks: dict[str, list[Block]] = {}
    for result_name, contribution in found.changed.items():
        name = found.heads.get(result_name, result_name)
        if (dtype := base.tensors[name][1].dtype) not in FLOATS:
            raise CheckpointError(
                f"{base.folder}: {name} is stored as {dtype}, a form that is not read here: give the base that it was "
                "made from"
            )
        for path, block in _blocks(base, name, contribution):
            blocks.setdefault(path, []).append(block)  # of a stack's, those of the first rows come first
    for path, part in singles.items():
        blocks[path] = blocks[expert_path(part.stack, part.expert)]
    blocks = {path: held for path, held in blocks.items() if not singles or path in files.low_rank}
    in_files = sorted(blocks.items(), key=lambda item: (order[item[1][0].name], item[1][0].expert or 0))
    parts = {path: (part.number, part.blocks) for path, part in singles.items()}
    return BaseWeights(base, {path: tuple(held) for path, held in in_files}, parts)


def _blocks(base: BaseFiles, name: str, contribution: Contribution) -> Iterator[tuple[str, Block]]:
    """(a module, the block of it in this tensor): one module, or every expert of a stack."""
    path, transposed = contribution.path, contribution.transposed
    if (one := contribution.expert) is not None:
        yield expert_path(path, one.number), Block(name, transposed)
    elif (stack := contribution.stack) is not None:
        for number in range(base.tensors[name][1].shape[0]):
            yield expert_path(path, number), Block(name, transposed, number, stack.turn)
    else:
        yield path, Block(name, transposed)
