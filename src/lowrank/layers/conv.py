"""Adapted convolutions in one, two and three dimensions."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.core.dora import rescaled_change
from lowrank.core.factors import LoraFactors
from lowrank.layers.base import LoraLayer, plain_class

FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoraConv(LoraLayer):
    """h = W0 * x + bias + Σ s·B·(A * dropout(x)), with A a convolution to r channels and B a 1×1 convolution.

    A is kept flat, (r, in/groups · kernel), B is (d, r). A has the base's stride, padding, padding mode, dilation and
    groups, so that s·B·A, reshaped, is a kernel of the base's own shape (d, in/groups, *kernel) and merges exactly:
    every group of input channels passes through the same A, and the output channels of a group see that group's r.
    DoRA rescales output channels, where there is one group.
    A subclass with a forward of its own (that pads, or standardises its kernel) runs it on W0 + Σ ΔW, without dropout.
    """

    kind = "conv"
    supports_dora = True
    groups: int
    bias: nn.Parameter | None

    @classmethod
    def stored(cls, weight: Tensor) -> Tensor:
        """(d, in/groups, *kernel) → (d, k)."""
        return weight.flatten(1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's answer plus every active adapter's change."""
        if not self.active_factors:
            return self.base_forward(*args, **kwargs)
        if plain_class(self).forward not in FORWARDS:
            return self.adapted_forward(*args, **kwargs)
        return self._convolve(*args, **kwargs)

    def _convolve(self, input: Tensor) -> Tensor:
        h = base = self.base_forward(input)
        for factors in self.active_factors:
            change = self._change(input, factors)
            if factors.magnitude is not None:
                change = self._dora_change(base, change, factors)
            h = h + change.to(h.dtype)
        return h

    def _dora_change(self, base: Tensor, change: Tensor, factors: LoraFactors) -> Tensor:
        """g·(W0 + ΔW) * x − W0 * x with g = m / ‖W0 + ΔW‖ of every output channel."""
        ones = [1] * (self.base_weight.dim() - 2)
        bias = None if self.bias is None else self.bias.view(-1, *ones)
        return rescaled_change(base, change, self.gain(factors).view(-1, *ones), bias)

    def _change(self, input: Tensor, factors: LoraFactors) -> Tensor:
        x = F.dropout(input, factors.dropout, self.training)
        return self._path(x, *factors.moved()) * factors.scale

    def _path(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        _, inputs, *spatial = self.base_weight.shape
        kernel = a.to(x.dtype).view(a.shape[0], inputs, *spatial).repeat(self.groups, *[1] * (len(spatial) + 1))
        middle = self._conv_forward(x, kernel, None)  # type: ignore[operator]  # (N, groups·r, *out)
        pointwise = b.to(x.dtype).view(*b.shape, *[1] * len(spatial))
        return POINTWISE[len(spatial)](middle, pointwise, groups=self.groups)
