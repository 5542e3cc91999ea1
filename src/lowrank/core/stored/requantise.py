"""From a matrix back to a stored form, of the same scheme, block and statistics: what a requantised merge writes.

Four bits and int8 as bitsandbytes quantises on a CPU, bit for bit; but the scales of double quantisation get the code
that is nearest, where its kernel misses that one time in some hundred. MXFP4 as the OCP specification says: a block's
power of two from its largest number, halves to even.
"""

import torch
from torch import Tensor

from lowrank.core.stored.base import Stored
from lowrank.core.stored.fourbit import FourBit, Nested
from lowrank.core.stored.mxfp4 import BIAS, E2M1, LARGEST_POWER, Mxfp4
from lowrank.core.stored.scaled import Int8Rows, Scaled

TINY = 1e-38  # the least scale of a block, as bitsandbytes has it


def requantise(matrix: Tensor, like: Stored) -> Stored:
    """`matrix` (d, k), float32, in the form of `like`. Raises NotImplementedError for forms that are only read."""
    if isinstance(like, FourBit):
        return _four_bit(matrix, like)
    if isinstance(like, Int8Rows):
        absmax = matrix.abs().amax(1).float()
        numbers = torch.round(matrix * (127.0 / absmax.unsqueeze(1))).nan_to_num_(0).to(torch.int8)
        return Int8Rows(numbers, absmax, like.dtype)
    if isinstance(like, Scaled) and like.zero is None:
        return _scaled(matrix, like)
    if isinstance(like, Mxfp4):
        return _mxfp4(matrix, like)
    raise NotImplementedError(f"weights stored as {like.scheme} are read here, and not written")


def _four_bit(matrix: Tensor, like: FourBit) -> FourBit:
    numbers, absmax = _blocks(matrix.flatten().float(), like.block)
    code, order = like.code.sort(stable=True)
    index = order[torch.bucketize(numbers, (code[:-1] + code[1:]) / 2, out_int32=True)].to(torch.uint8)
    if len(index) % 2:
        index = torch.cat([index, index.new_zeros(1)])
    packed = (index[::2] << 4) | index[1::2]
    scales = _nested(absmax, like.absmax) if isinstance(like.absmax, Nested) else absmax
    return type(like)(packed, scales, like.code, like.block, like.shape, like.dtype, like.kind)


def _nested(absmax: Tensor, like: Nested) -> Nested:
    offset = absmax.mean()
    numbers, scales = _blocks(absmax - offset, like.block)
    bounds = (like.code[:-1] + like.code[1:]) / 2
    return Nested(torch.bucketize(numbers, bounds).to(torch.uint8), like.code, scales, offset, like.block)


def _blocks(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(numbers in −1…1, absmax of each block), the last block as long as it is."""
    n, whole = len(flat), len(flat) - len(flat) % block
    absmax = flat[:whole].view(-1, block).abs().amax(1) if whole else flat.new_empty(0)
    numbers = flat[:whole].view(-1, block) * (1.0 / absmax.clamp(min=TINY)).unsqueeze(1)
    numbers = numbers.flatten()
    if n > whole:
        last = flat[whole:].abs().amax().clamp(min=TINY)
        absmax, numbers = torch.cat([absmax, last.view(1)]), torch.cat([numbers, flat[whole:] / last])
    return numbers.clamp_(-1, 1), absmax


def _mxfp4(matrix: Tensor, like: Mxfp4) -> Mxfp4:
    numbers = matrix.float().view(*like.scales.shape, -1)  # (d, k/32, 32)
    power = torch.frexp(numbers.abs().amax(-1)).exponent - 1 - LARGEST_POWER
    scales = (power + BIAS).clamp_(0, 254)
    small = torch.ldexp(numbers, (BIAS - scales).unsqueeze(-1))
    code = torch.tensor(E2M1[:8], device=small.device)
    bounds, size = (code[:-1] + code[1:]) / 2, small.abs()
    index = torch.bucketize(size, bounds)
    tied = (index < len(bounds)) & (size == bounds[index.clamp(max=len(bounds) - 1)])
    index = index + (tied & (index % 2 == 1)) + 8 * torch.signbit(small)
    packed = (index[..., ::2] | (index[..., 1::2] << 4)).to(torch.uint8)
    return Mxfp4(packed, scales.to(torch.uint8), like.dtype)


def _scaled(matrix: Tensor, like: Scaled) -> Scaled:
    """Symmetric numbers with a scale for each block, the largest of a block at the end of the range."""
    kind = like.numbers.dtype
    largest = float(torch.finfo(kind).max) if kind.is_floating_point else float(torch.iinfo(kind).max)
    d, k = matrix.shape
    tall, wide = like.block
    rows, columns = like.scales.shape
    padded = matrix.new_zeros(rows * tall, columns * wide)
    padded[:d, :k] = matrix
    blocks = padded.view(rows, tall, columns, wide)
    scales = (blocks.abs().amax((1, 3)) / largest).clamp(min=TINY).to(like.scales.dtype)
    numbers = blocks / scales.float()[:, None, :, None]
    if not kind.is_floating_point:
        numbers = numbers.round()
    numbers = numbers.clamp(-largest, largest).view(rows * tall, columns * wide)[:d, :k]
    return Scaled(numbers.to(kind), scales, like.block, like.dtype)
