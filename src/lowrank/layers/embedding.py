"""Adapted lookup tables."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.core.dora import rescaled_change
from lowrank.layers.base import LoraLayer, plain_class


class LoraEmbedding(LoraLayer):
    """h = c·(E[i] + Σ s·B·A[:, i]): ids (...) → (..., d), with A (r, V), B (d, r) and E (V, d) the table.

    c is the subclass's `embed_scale` (Gemma, BART), which multiplies what is looked up; 1 for a plain nn.Embedding.
    A subclass that finds its rows in another way (BART's positions, counted from 2) does so in E + Σ s·(B·A)ᵀ.
    DoRA rescales the d entries of every row alike. Rows that an adapter owns (`layers.rowed`) take the place of E's.
    The padding row gets no gradient, as in the base. There is no dropout: a token id has no entries to drop.
    """

    kind = "embedding"
    transposed = True
    supports_dora = True
    padding_idx: int | None
    embed_scale_name: ClassVar[str] = "embed_scale"

    @staticmethod
    def refusal(module: nn.Module) -> str | None:
        """A table that renormalises itself in forward has no constant W0."""
        if getattr(module, "max_norm", None) is not None:
            return "its max_norm rewrites the table at every lookup, so no merged table gives the same answers"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base's rows plus every active adapter's."""
        if (self.active_factors or self.active_rows) and not self.answers_by_rows():
            return self.adapted_forward(*args, **kwargs)
        h = self.base_forward(*args, **kwargs)
        return self._changed(h, *args, **kwargs) if self.active_factors else h

    def answers_by_rows(self) -> bool:
        """Whether the plain class answers E[i], or c·E[i], and nothing else."""
        return plain_class(self).forward is nn.Embedding.forward or hasattr(self, self.embed_scale_name)

    def mended(self, answer: Tensor, input: Tensor) -> Tensor:
        """The rows that adapters own in the place of the table's, c times: ids (...) → (..., d)."""
        scale = getattr(self, self.embed_scale_name, 1.0)
        scale = scale.to(answer.dtype) if isinstance(scale, Tensor) else scale
        for rows in self.active_rows:
            answer = rows.looked_up(input, answer, scale, self.padding_idx)
        return answer

    def _changed(self, h: Tensor, input: Tensor) -> Tensor:
        scale = getattr(self, self.embed_scale_name, 1.0)
        base = h
        for factors in self.active_factors:
            change = self._rows(input, *factors.moved(), h.dtype) * factors.scale * scale
            if factors.magnitude is not None:
                change = rescaled_change(base, change, self.gain(factors))
            h = h + change.to(h.dtype)
        return h

    def _rows(self, input: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """B·A[:, i]: ids (...) → (..., d)."""
        return F.linear(F.embedding(input, a.t(), self.padding_idx).to(dtype), b.to(dtype))
