"""The slow, obvious versions of what the library computes: dense matrices in float64, loops, autograd.

Nothing here calls the library's arithmetic; it only reads the tensors of a `LoraFactors`.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.core.factors import LoraFactors
from lowrank.core.rows import RowBlock


def rows_of(part: RowBlock) -> list[int]:
    """The rows of a part of a fused projection, counted one by one."""
    return [part.start + run * part.stride + row for run in range(part.count) for row in range(part.width)]


def product(factors: LoraFactors, a: Tensor, b: Tensor) -> Tensor:
    """B·A over the whole weight, (d, k); for a fused projection each part has its own A and its own rows."""
    a, b = a.double(), b.double()
    if not factors.parts:
        return b @ a
    rank, rows = b.shape[1], [None] * factors.out_features
    taken = 0
    for i, part in enumerate(factors.parts):
        for row in rows_of(part):
            rows[row] = b[taken] @ a[i * rank : (i + 1) * rank]
            taken += 1
    return torch.stack([torch.zeros(a.shape[1], dtype=a.dtype) if row is None else row for row in rows])


def delta(factors: LoraFactors, weight: Tensor) -> Tensor:
    """ΔW of one adapter for W0 = `weight`, (d, k): s·(B·A − B_start·A_start), or DoRA's m·W'/‖W'‖ − W0."""
    change = product(factors, factors.a, factors.b)
    if factors.start_a is not None:
        change = change - product(factors, factors.start_a, factors.start_b)
    change = factors.scale * change
    if factors.magnitude is None:
        return change
    moved = weight.double() + change
    norm = moved.detach().square().sum(1).sqrt()
    return (factors.magnitude.double() / norm).unsqueeze(1) * moved - weight.double()


def matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """W0, (d, k), of a weight as the module stores it."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return weight.t()
    return weight.flatten(1)


def stored(module: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of `matrix`."""
    if isinstance(module, nn.Embedding) or is_conv1d(module):
        return weight.t()
    return weight.reshape(module.weight.shape)


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D, a linear layer that stores W0 transposed."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def adapted_weight(module: nn.Module, adapters: Sequence[LoraFactors]) -> Tensor:
    """W0 + Σ ΔW in float64, shaped as the module stores it."""
    weight = matrix(module, module.weight.detach().double())
    total = weight
    for factors in adapters:
        total = total + delta(factors, weight)
    return stored(module, total)


def answer(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the module would answer with this weight (as stored) and bias, in float64."""
    if isinstance(module, nn.Embedding):
        return weight[x] * float(getattr(module, "embed_scale", 1.0))
    x = x.double()
    if isinstance(module, nn.modules.conv._ConvNd):
        if x.dim() == len(module.kernel_size) + 1:  # one sample without a batch dimension
            return convolution(module, x.unsqueeze(0), weight, bias).squeeze(0)
        return convolution(module, x, weight, bias)
    h = x @ matrix(module, weight).t()
    return h if bias is None else h + bias.double()


def convolution(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution as its definition says it: pad, then a sum over kernel positions, group by group."""
    x = pad(module, x)
    n, spatial = x.shape[0], range(x.dim() - 2)
    size = [
        (x.shape[2 + i] - module.dilation[i] * (module.kernel_size[i] - 1) - 1) // module.stride[i] + 1 for i in spatial
    ]
    ins, outs = module.in_channels // module.groups, module.out_channels // module.groups
    groups = []
    for g in range(module.groups):
        total = x.new_zeros(n, outs, *size)
        for position in itertools.product(*(range(k) for k in module.kernel_size)):
            window = x[:, g * ins : (g + 1) * ins]
            for i, at in enumerate(position):
                first = at * module.dilation[i]
                window = window.narrow(2 + i, first, (size[i] - 1) * module.stride[i] + 1)
                window = window.index_select(2 + i, torch.arange(0, window.shape[2 + i], module.stride[i]))
            kernel = weight[(slice(g * outs, (g + 1) * outs), slice(None), *position)]
            total = total + torch.einsum("ni...,oi->no...", window, kernel)
        groups.append(total)
    h = torch.cat(groups, 1)
    return h if bias is None else h + bias.double().view(-1, *[1] * len(spatial))


def pad(module: nn.Module, x: Tensor) -> Tensor:
    """The input with the module's padding around it, by the module's padding mode."""
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in ((0,) * (x.dim() - 2) if module.padding == "valid" else module.padding)]
    flat = [side for pair in reversed(sides) for side in pair]
    return F.pad(x, flat, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)


def adapted_answer(module: nn.Module, x: Tensor, adapters: Sequence[LoraFactors]) -> Tensor:
    """h of the adapted module in float64."""
    return answer(module, x, adapted_weight(module, adapters), getattr(module, "bias", None))


def rounding_unit(module: nn.Module, x: Tensor, adapters: Sequence[LoraFactors]) -> Tensor:
    """What one rounding of every number that enters h can change in it: eps·(|W0||x| + |bias| + Σ |s||B||A||x|).

    Cancellation between the terms makes h small but not this; a bound on errors in h is a small multiple of it.
    """
    weight = matrix(module, module.weight.detach().double()).abs()
    total = weight
    for factors in adapters:
        change = abs(factors.scale) * product(factors, factors.a.abs(), factors.b.abs())
        if factors.start_a is not None:
            change = change + abs(factors.scale) * product(factors, factors.start_a.abs(), factors.start_b.abs())
        if factors.magnitude is not None:
            change = (1 + factors.magnitude.double().abs() / weight.norm(dim=1)).unsqueeze(1) * (weight + change)
        total = total + change
    bias = getattr(module, "bias", None)
    inputs = x if isinstance(module, nn.Embedding) else x.double().abs()
    unit = answer(module, inputs, stored(module, total), None if bias is None else bias.abs())
    return torch.finfo(module.weight.dtype).eps * unit.detach()


def ulps_apart(left: Tensor, right: Tensor) -> Tensor:
    """How many representable numbers lie between two tensors of one 16- or 32-bit type, element by element."""
    bits = torch.int16 if left.dtype.itemsize == 2 else torch.int32
    low = torch.iinfo(bits).min

    def ordered(t: Tensor) -> Tensor:
        raw = t.contiguous().view(bits).long()
        return torch.where(raw < 0, low - raw, raw)

    return (ordered(left) - ordered(right)).abs()
