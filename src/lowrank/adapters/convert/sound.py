"""Factors that can be meant: of floating-point numbers, not empty, finite, and still so in the file that is written."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowrank.checkpoint.adapter_folder import AdapterContent
from lowrank.checkpoint.sound import FLOATS
from lowrank.core.finite import all_finite
from lowrank.errors import CheckpointError


def widened(tensor: Tensor, where: str) -> Tensor:
    """The tensor in float32 or wider. Raises CheckpointError for one that holds no numbers to compute with (float8)."""
    if tensor.dtype not in FLOATS:
        raise CheckpointError(f"{where} is {tensor.dtype}, none of float16, bfloat16, float32 and float64")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_sound(source: Path, content: AdapterContent) -> None:
    """Raise CheckpointError for factors that are empty or not finite, and for a scale that is not."""
    for path, target in content.targets.items():
        factors = [tensor for tensor in (target.a, target.b, target.magnitude) if tensor is not None]
        if any(tensor.numel() == 0 for tensor in factors):
            shapes = f"A {list(target.a.shape)} and B {list(target.b.shape)}"
            raise CheckpointError(f"{source}: {path} has {shapes}, which hold nothing")
        if not all(all_finite(tensor) for tensor in factors):
            raise CheckpointError(f"{source}: {path} holds values that are not finite")
        if not math.isfinite(target.scale):
            raise CheckpointError(f"{source}: {path} has a scale of {target.scale}")


def ready(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, out: Path) -> dict[str, Tensor]:
    """The tensors as a file takes them: sorted, contiguous, floating-point ones in `dtype` (as they are if None).

    Raises CheckpointError for values that this dtype cannot hold.
    """
    cast: dict[str, Tensor] = {}
    for name, tensor in sorted(tensors.items()):
        cast[name] = tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        if not all_finite(cast[name]):
            raise CheckpointError(
                f"{out} was not written: {name} would hold values that {cast[name].dtype} cannot hold"
            )
    return cast
