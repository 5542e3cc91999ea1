"""Formats that know one scale for a whole adapter: what differs goes into B."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from lowrank.checkpoint.adapter_folder import AdapterContent
from lowrank.checkpoint.one_scale import folded
from lowrank.checkpoint.target import Target
from lowrank.errors import CheckpointError


def at_scale(target: Target, scale: float) -> Target:
    """The same ΔW with another scale ≠ 0: B takes the quotient."""
    return target if target.scale == scale else replace(target, b=folded(target.b, target.scale, scale), scale=scale)


def common_alpha(targets: Mapping[str, Target]) -> float:
    """The lora_alpha, s·r, that most modules have; 1 where that is 0."""
    counts = Counter(target.scale * target.a.shape[0] for target in targets.values() if target.scale)
    return min(counts, key=lambda number: (-counts[number], number), default=1.0)


def refuse(content: AdapterContent, name: str, *, dora: bool, full: bool, conv: bool) -> None:
    """Raise CheckpointError for what a format called `name` has no place for; true: it has none."""
    if content.singles:
        raise CheckpointError(
            f"an adapter that adapts stacked experts ({next(iter(content.singles.values()))}, ...) cannot be written "
            f"as {name}: merge it into its base"
        )
    kinds = {target.kind for target in content.targets.values()}
    if dora and any(target.magnitude is not None for target in content.targets.values()):
        raise CheckpointError(f"a DoRA adapter cannot be written as {name}, which knows no magnitudes")
    if conv and "conv" in kinds:
        raise CheckpointError(f"an adapter with convolutions cannot be written as {name}, whose factors are matrices")
    if content.rows:
        raise CheckpointError(
            f"an adapter with rows of {next(iter(content.rows))} (trainable_token_indices) cannot be written as "
            f"{name}, which holds factors only: merge it into its base"
        )
    if full and content.full:
        key = next(iter(content.full))
        raise CheckpointError(
            f"an adapter with tensors in full ({key.path}.{key.name}, ...) cannot be written as {name}, which holds "
            "factors only: merge it into its base"
        )
