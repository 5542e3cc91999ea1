"""DoRA's gains of a stack's experts in one forward: the norm of an expert is computed when a token first goes to it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank.core.dora import gain_of, row_norms
from lowrank.core.factors import LoraFactors

if TYPE_CHECKING:
    from lowrank.layers.stack import LoraStack


class ExpertGains:
    """g_e = m_e / ‖W_e + ΔW_e‖ of every output row, differentiable in m (E, d); norms are constants (DoRA §4.3).

    On a GPU, where to ask which experts have tokens is to wait for it, every expert's norm is computed.
    """

    def __init__(self, layer: "LoraStack", factors: LoraFactors) -> None:
        assert factors.magnitude is not None
        self._layer, self._factors = layer, factors
        self._magnitudes = factors.magnitude.unbind()
        self._found: dict[int, Tensor] = {}

    def of(self, expert: int) -> Tensor:
        """One expert's, (d,)."""
        if expert not in self._found:
            self._found[expert] = gain_of(self._magnitudes[expert], self._norms(expert))
        return self._found[expert]

    def of_each(self, experts: Tensor) -> Tensor:
        """One expert's for each of some rows, experts (S,) → (S, d)."""
        if experts.device.type != "cpu":
            return self.of_all()[experts]
        present, places = experts.unique(return_inverse=True)
        return torch.stack([self.of(expert) for expert in present.tolist()])[places]

    def of_groups(self, rows: int, offsets: Tensor) -> Tensor:
        """For rows that are sorted by expert, whose rows end at offsets (E,): (rows, d); after the last, anybody's."""
        places = torch.arange(rows, device=offsets.device)
        return self.of_each(torch.bucketize(places, offsets, right=True).clamp_max(len(offsets) - 1))

    def of_all(self) -> Tensor:
        """Every expert's, (E, d)."""
        return torch.stack([self.of(expert) for expert in range(len(self._magnitudes))])

    @torch.no_grad()
    def _norms(self, expert: int) -> Tensor:
        weight = self._layer.one_expert(expert).detach()
        factors = self._factors.of_expert(expert)
        return row_norms(weight.t() if self._layer.transposed else weight, *factors.effective(), factors.scale)
