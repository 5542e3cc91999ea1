"""Formats that know one scale for a whole adapter: what differs goes into B."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lowrank.checkpoint.adapter_folder import AdapterContent, Target
from lowrank.errors import CheckpointError


def at_scale(target: Target, scale: float) -> Target:
    """The same ΔW with another scale ≠ 0: B takes the quotient."""
    if target.scale == scale:
        return target
    return replace(target, b=target.b * (target.scale / scale), scale=scale)


def common_scale(targets: Mapping[str, Target]) -> float:
    """The scale that most modules have; 1 where that is 0, which nothing could be divided by."""
    return _commonest(target.scale for target in targets.values())


def common_alpha(targets: Mapping[str, Target]) -> float:
    """The lora_alpha, s·r, that most modules have; 1 where that is 0."""
    return _commonest(target.scale * target.a.shape[0] for target in targets.values())


def _commonest(numbers: Iterable[float]) -> float:
    """The most frequent number other than 0, the smallest of several."""
    counts = Counter(number for number in numbers if number)
    return min(counts, key=lambda number: (-counts[number], number), default=1.0)


def refuse(content: AdapterContent, name: str, *, dora: bool, full: bool, conv: bool) -> None:
    """Raise CheckpointError for what a format called `name` has no place for; true: it has none."""
    kinds = {target.kind for target in content.targets.values()}
    if dora and any(target.magnitude is not None for target in content.targets.values()):
        raise CheckpointError(f"a DoRA adapter cannot be written as {name}, which knows no magnitudes")
    if conv and "conv" in kinds:
        raise CheckpointError(f"an adapter with convolutions cannot be written as {name}, whose factors are matrices")
    if full and content.full:
        key = next(iter(content.full))
        raise CheckpointError(
            f"an adapter with tensors in full ({key.path}.{key.name}, ...) cannot be written as {name}, which holds "
            "factors only: merge it into its base"
        )
