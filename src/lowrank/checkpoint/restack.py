"""Experts that were modules of their own for a while (`checkpoint.each_expert`) in one stack again."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowrank.checkpoint.expert_files import WRAP
from lowrank.checkpoint.target import Target
from lowrank.layers.experts import STACKS


def restacked(targets: Mapping[str, Target], singles: Mapping[str, str]) -> dict[str, Target]:
    """The targets with those of single experts in the stacks that they are of: a (E, r, k), b (E, d, r); m (E, d).

    singles: {a single expert's path: its stack's}. r is the largest rank that an expert has; others get zeros.
    """
    whole: dict[str, Target] = {}
    stacks: dict[str, dict[int, Target]] = {}
    for path, target in targets.items():
        if path not in singles:
            whole[path] = target
            continue
        root, _, _ = singles[path].rpartition(".")
        number = path.removeprefix(f"{root}.").partition(".")[0]
        stacks.setdefault(singles[path], {})[int(number)] = target
    return whole | {path: _stack([experts[i] for i in range(len(experts))]) for path, experts in stacks.items()}


def _stack(experts: list[Target]) -> Target:
    rank = max(len(one.a) for one in experts)
    a = torch.stack([padded(one.a, rank, 0) for one in experts])
    b = torch.stack([padded(one.b, rank, 1) for one in experts])
    magnitudes = [one.magnitude for one in experts if one.magnitude is not None]
    return replace(experts[0], kind="experts", a=a, b=b, magnitude=torch.stack(magnitudes) if magnitudes else None)


def padded(tensor: Tensor, rank: int, along: int) -> Tensor:
    """The factor with zeros up to `rank` along one of its sides."""
    shape = list(tensor.shape)
    shape[along] = rank - shape[along]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=along)


def file_paths(targets: Mapping[str, Target]) -> dict[str, str]:
    """{path: the path in a file}: a module of experts is wrapped once for each of its stacks, the first innermost."""
    roots: dict[str, list[str]] = {}
    for path, target in targets.items():
        if target.kind == "experts":
            root, _, name = path.rpartition(".")
            roots.setdefault(root, []).append(name)
    named = {}
    for root, names in roots.items():
        for depth, name in enumerate(sorted(names, key=STACKS.index, reverse=True)):
            named[f"{root}.{name}"] = root + WRAP * depth
    return {path: named.get(path, path) for path in targets}
