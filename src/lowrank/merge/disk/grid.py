"""How far a number of a stored form may be from the one that it was made from: half of the form's widest gap."""

import torch
from torch import Tensor

from lowrank.core.stored import FourBit, Mxfp4, Scaled, Stored
from lowrank.core.stored.mxfp4 import BIAS

WIDEST_GAP = {"nf4": 0.31, "fp4": 0.34}  # between neighbouring numbers of the code, in parts of a block's scale


def steps(stored: Stored) -> Tensor:
    """How far a number may be from the nearest of the form, row by row: (n, 1)."""
    if isinstance(stored, FourBit):
        largest = stored.scales(0, stored.shape.numel()).abs().max() * 1.05  # double quantisation moves it a little
        return largest.mul(WIDEST_GAP[stored.kind] / 2 + 0.05).expand(stored.shape[0], 1)
    if isinstance(stored, Mxfp4):  # 6 is the largest number, and those up to 8 become 6
        powers = stored.scales.int().amax(1, keepdim=True) - BIAS
        return torch.ldexp(torch.full(powers.shape, 2.0, device=powers.device), powers)
    largest = stored.matrix(torch.float32).abs().amax(1, keepdim=True)
    if isinstance(stored, Scaled) and stored.numbers.dtype.is_floating_point:
        kind = torch.finfo(stored.numbers.dtype)
        return largest * kind.eps + float(stored.scales.float().max()) * kind.tiny * kind.eps
    if isinstance(stored, Scaled):
        return stored.scales.float().max().expand(stored.shape[0], 1)
    return largest / 127
