"""Stacked experts without a model, each expert as a linear module of its own: `experts.3.down_proj`."""

import os
from dataclasses import replace

from lowrank.checkpoint.expert_files import magnitude_fault, told_apart, wraps_of
from lowrank.checkpoint.keys import MAGNITUDE, A, B
from lowrank.checkpoint.read import AdapterFiles, Packing, read_with_stacks
from lowrank.checkpoint.sound import rank_faults
from lowrank.errors import CheckpointError
from lowrank.injection.patterns import matches
from lowrank.layers.experts import STACKS


def read_each_expert(
    folder: str | os.PathLike[str], allow_pickle: bool = False, packing: Packing | None = None
) -> AdapterFiles:
    """`read_adapter`, of an adapter of stacked experts too, each of which is a module. packing: of B, if not PEFT's."""
    return with_each_expert(replace(read_with_stacks(folder, allow_pickle), packing=packing))


def with_each_expert(files: AdapterFiles) -> AdapterFiles:
    """The same adapter with a module for every expert of its stacks; itself where it has none.

    Stacks are in the order that every module of experts in transformers has: what goes in (gate, up) before what goes
    out. Raises CheckpointError where which is which cannot be told, and for factors of no whole number of experts.
    """
    if not files.config.lora.target_parameters:
        return files
    told = told_apart(files, wraps_of(files), lambda root: _stacks_at(files, root))
    low_rank = {path: tensors for path, tensors in told.low_rank.items() if path not in told.experts}
    singles: dict[str, str] = {}
    known, scales, start = dict(files.config.known), dict(files.companion.scales), set(files.companion.start)
    fused = dict(files.companion.fused)
    for path in told.experts:
        a, b = told.low_rank[path][A], told.low_rank[path][B]
        magnitudes = told.low_rank[path].get(MAGNITUDE)
        rank = files.config.rank(path)
        count, rest = divmod(a.shape[0], rank)
        if rest or a.shape[0] != b.shape[-1]:
            raise CheckpointError(
                f"{files.folder}: {path} has A {list(a.shape)} and B {list(b.shape)}, and adapter_config.json says "
                f"rank {rank}, which makes no whole number of experts"
            )
        if fault := magnitude_fault(told, path, count, len(b)):
            raise CheckpointError(f"{files.folder}: {fault}")
        by_expert = files.packing == "by-expert"
        of_b = b.unflatten(1, (count, rank)).mT if by_expert else b.unflatten(1, (rank, count))  # (d, r, E)
        for expert, one in enumerate(a.unflatten(0, (count, rank))):
            single = expert_path(path, expert)
            singles[single] = path
            own = {} if magnitudes is None else {MAGNITUDE: magnitudes[expert]}
            low_rank[single] = {A: one, B: of_b[:, :, expert]} | own
            known[single] = rank, files.config.scale(path)
            if path in scales:
                scales[single] = scales[path]
            if path in start:
                start.add(single)
            if path in fused:
                fused[single] = fused[path]
    companion = replace(files.companion, scales=scales, start=frozenset(start), fused=fused)
    config = replace(files.config, known=known)
    every = replace(files, low_rank=low_rank, config=config, companion=companion, singles=singles)
    if faults := rank_faults(every):
        raise CheckpointError(f"{files.folder}: {'; '.join(faults)}")
    return every


def expert_path(stack: str, number: int) -> str:
    """The path of one expert of the stack at a path: of `experts.down_proj`, `experts.3.down_proj`."""
    root, _, name = stack.rpartition(".")
    return f"{root}.{number}.{name}"


def _stacks_at(files: AdapterFiles, root: str) -> dict[str, str]:
    """The stacks of the module at `root` that target_parameters names; none where it is a module of target_modules."""
    lora = files.config.lora
    if lora.target_modules is not None and matches(root, lora.target_modules, "target_modules"):
        return {}
    names = lora.target_parameters or ()
    return {name: "experts" for name in STACKS if matches(f"{root}.{name}", names, "target_parameters")}
