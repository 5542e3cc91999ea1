"""Adapters that have a pair for each expert as a module of its own, for models that stack their experts.

Such were written while experts were Linear modules (PEFT up to 0.17, transformers 4), and are by `extract` from
checkpoints. Of an expert's gate and up projection, which one stack has above each other, A is [A_gate; A_up] and B is
block-diagonal, of twice the rank: the same ΔW, as of gate and up that are adapted apart. Experts that the adapter does
not have get zeros.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.checkpoint.companion import Fused
from lowrank.checkpoint.fusions import Fusions, Part, fusions_of
from lowrank.checkpoint.keys import A, B
from lowrank.checkpoint.layout import to_file
from lowrank.checkpoint.read import AdapterFiles
from lowrank.checkpoint.sound import FLOATS
from lowrank.core.rows import RowBlock
from lowrank.core.stored.of_module import frozen_shape
from lowrank.errors import CheckpointError
from lowrank.layers.stack import kind_of_stack, stacks_of

Placed = dict[tuple[int, int], str]  # {(row block, expert): the path in the file}


def with_single_experts(files: AdapterFiles, model: nn.Module, modules: Mapping[str, nn.Module]) -> AdapterFiles:
    """The same files with the factors of single experts in their stacks, for a model that has these.

    Raises as `in_stacks`.
    """
    stacks = {f"{path}.{name}": s for path, module in modules.items() for name, s in stacks_of(module).items()}
    if not stacks:
        return files
    foreign = [path for path in files.low_rank if path not in modules]
    parts = parts_of(fusions_of(getattr(model, "config", None)), foreign, stacks)
    kinds = {path: kind_of_stack(stacks[path]) for path in {part.stack for part in parts.values()}}
    shapes = {path: frozen_shape(stacks[path]) for path in kinds}
    sizes = {path: (shapes[path][0], *kind.sizes(shapes[path])) for path, kind in kinds.items()}
    return in_stacks(files, parts, sizes, {path: kind.kind for path, kind in kinds.items()})


def parts_of(fusions: Fusions, paths: Iterable[str], stacks: Container[str]) -> dict[str, Part]:
    """{path: which part of which stack it is} of those of `paths` that are single experts of one of `stacks`."""
    found = {path: fusions.part(f"{path}.weight") for path in paths}
    return {path: part for path, part in found.items() if part is not None and part.stack in stacks}


def in_stacks(
    files: AdapterFiles,
    parts: Mapping[str, Part],
    sizes: Mapping[str, tuple[int, int, int]],
    kinds: Mapping[str, str],
) -> AdapterFiles:
    """The same files with the factors of single experts in their stacks.

    parts: {path in the file: its place}; sizes: {stack: (E, d, k)}, as a map from inputs to outputs; kinds: {stack: its
    layer kind}. Raises CheckpointError for an expert that a stack does not have, for factors that fit no expert of it,
    and for such as were trained on a changed base.
    """
    placed: dict[str, Placed] = {}
    blocks: dict[str, int] = {}
    for path, part in parts.items():
        _check(files, path, part, sizes[part.stack][0])
        placed.setdefault(part.stack, {})[part.number, part.expert] = path
        blocks[part.stack] = part.blocks
    if placed and files.config.moved_base is not None:
        raise CheckpointError(
            f"{files.folder}: its experts were trained from {files.config.moved_base} on a changed base, of which the "
            "start is not found again for single experts: convert it with PEFT first"
        )
    used = {path for pairs in placed.values() for path in pairs.values()}
    low_rank = {path: tensors for path, tensors in files.low_rank.items() if path not in used}
    known, experts, fused = dict(files.config.known), dict(files.experts), dict(files.companion.fused)
    for path, pairs in placed.items():
        of_block = [[files.config.rank(p) for (i, _), p in pairs.items() if i == n] for n in range(blocks[path])]
        ranks = [max(found, default=0) for found in of_block]
        a, b, scale = _stacked(files, path, pairs, ranks, sizes[path])
        if own := _parts(path, ranks, b.shape[1] // len(ranks)):
            fused[path] = own
        low_rank[path] = dict(zip((A, B), to_file(kinds[path], a, b, ()), strict=True))
        known[path], experts[path] = (a.shape[1], scale), kinds[path]
    companion, config = replace(files.companion, fused=fused), replace(files.config, known=known)
    return replace(files, low_rank=low_rank, experts=experts, config=config, companion=companion)


def _parts(path: str, ranks: list[int], rows: int) -> Fused | None:
    """The row blocks that the factors of a stack are of, each with an A of its own; None where one pair can say it all.

    ranks: of every block, 0 where no expert has factors of it. Such of several ranks stay what they are, one pair.
    """
    own = [number for number, rank in enumerate(ranks) if rank]
    if len(ranks) == 1 or len({ranks[number] for number in own}) > 1:
        return None
    names = ("gate", "up") if path.endswith("gate_up_proj") and len(ranks) == 2 else ()
    return Fused(tuple(names[n] for n in own if names), tuple(RowBlock(rows * n, rows) for n in own))


def _check(files: AdapterFiles, path: str, part: Part, count: int) -> None:
    tensors = files.low_rank[path]
    if part.expert >= count:
        raise CheckpointError(
            f"{files.folder}: {path} is expert {part.expert}, and there are {count} at {part.stack}: it was made for "
            "another base"
        )
    if set(tensors) != {A, B}:
        raise CheckpointError(f"{files.folder}: {path} has {' and '.join(sorted(tensors))}, and an expert has A and B")
    if strange := [tensor.dtype for tensor in tensors.values() if tensor.dtype not in FLOATS]:
        raise CheckpointError(f"{files.folder}: {path} is {strange[0]}, none of float16, bfloat16, float32 and float64")


def _stacked(
    files: AdapterFiles, path: str, pairs: Placed, ranks: list[int], sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor, float]:
    """(A (E, Σ r_i, k), B (E, d, Σ r_i), s) of a stack; row block i of B has the columns of A's block i alone."""
    (count, d, k), parts = sizes, len(ranks)
    if d % parts:
        raise CheckpointError(f"{files.folder}: {path} has {d} rows, which are no {parts} equal blocks")
    rows, config = d // parts, files.config
    for source in pairs.values():
        _check_shapes(files, source, path, (rows, k))
    scale = next((s for p in pairs.values() if (s := config.scale(p))), 1.0)
    dtype = torch.promote_types(torch.float32, files.low_rank[next(iter(pairs.values()))][A].dtype)
    a, b = torch.zeros(count, sum(ranks), k, dtype=dtype), torch.zeros(count, d, sum(ranks), dtype=dtype)
    for (part, expert), source in pairs.items():
        start, rank = sum(ranks[:part]), config.rank(source)
        a[expert, start : start + rank] = files.low_rank[source][A].to(dtype)
        own = files.low_rank[source][B].to(dtype) * (config.scale(source) / scale)
        b[expert, rows * part : rows * (part + 1), start : start + rank] = own
    return a, b, scale


def _check_shapes(files: AdapterFiles, source: str, path: str, matrix: tuple[int, int]) -> None:
    """Raise CheckpointError for factors of one expert that are no change of a matrix (rows, k) at the declared rank."""
    rank, (a, b) = files.config.rank(source), (files.low_rank[source][role] for role in (A, B))
    wanted = [rank, matrix[1]], [matrix[0], rank]
    if (list(a.shape), list(b.shape)) != wanted:
        raise CheckpointError(
            f"{files.folder}: {source} has A {list(a.shape)} and B {list(b.shape)}, and an expert of {path} at rank "
            f"{rank} wants {wanted[0]} and {wanted[1]}"
        )
