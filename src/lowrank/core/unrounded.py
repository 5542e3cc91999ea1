"""A block of arithmetic that autocast does not round."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def unrounded(like: Tensor) -> AbstractContextManager[object]:
    """Inside, products on `like`'s device keep their dtype under autocast; the meta device knows no autocast."""
    device = like.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
