"""Tensors of which FSDP2 gives every process a part of the rows (torch's DTensor)."""

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or for a DTensor its shards gathered: a collective call, which every process has to make."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
