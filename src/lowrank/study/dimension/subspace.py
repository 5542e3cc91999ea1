"""A model that can only move in a random subspace: θ = θ0 + P·z, z (d,) trained from zero."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank.core.fastfood import Fastfood
from lowrank.errors import ConfigError


def owners(names: Iterable[str]) -> list[str]:
    """The modules that hold these parameters, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def check_dimension(d: int, weights: int, scales: int) -> None:
    """Raise ConfigError for a d that the number of weights D, or of scales, does not allow."""
    if not scales < d <= weights:
        least = f"more than {scales} (a scale each for so many modules)" if scales else "at least 1"
        raise ConfigError(f"--ladder: d = {d}, but it must be {least} and at most {weights:,}, the weights that move")


class Subspace(nn.Module):
    """`model` called with the weights θ0 + λ ⊙ (P·z); z = 0 and λ = 1 at the start, so it starts as the model itself.

    names: the parameters that move, D numbers in all. d: trained numbers in all. scaled: one scale λ per module is
    trained, counted in d (the structure-aware form of Aghajanyan et al. 2020, arXiv 2012.13255, §3.1); else λ = 1. The
    model's own weights are never changed. Raises ConfigError for a d that D, or the number of scales, does not allow.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], d: int, seed: int, scaled: bool = False) -> None:
        super().__init__()
        model.requires_grad_(False)
        self._model = (model,)  # in a tuple it is no submodule: its weights are not what is trained here
        parameters = dict(model.named_parameters())
        self.start = {name: parameters[name] for name in names}
        self.sizes = [value.numel() for value in self.start.values()]
        modules = owners(self.start)
        scales = len(modules) if scaled else 0
        check_dimension(d, sum(self.sizes), scales)
        device = next(iter(self.start.values())).device
        self.projection = Fastfood(d - scales, sum(self.sizes), seed)
        self.z = nn.Parameter(torch.zeros(d - scales, device=device))
        self.scales = nn.Parameter(torch.ones(scales, device=device)) if scales else None
        self.owner = [modules.index(name.rpartition(".")[0]) for name in self.start]
        self._at_rest: tuple[tuple[int, ...], dict[str, Tensor]] = ((), {})

    def weights(self) -> dict[str, Tensor]:
        """{name: θ}; differentiable in z and the scales."""
        moves = self.projection(self.z).split(self.sizes)
        moved = {}
        for i, ((name, start), move) in enumerate(zip(self.start.items(), moves, strict=True)):
            scaled = move if self.scales is None else move * self.scales[self.owner[i]]
            moved[name] = start + scaled.view(start.shape).to(start.dtype)
        return moved

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model answers with the moved weights."""
        return functional_call(self._model[0], self._current(), args, kwargs)

    def _current(self) -> dict[str, Tensor]:
        """The weights; projected once for as long as nothing is trained."""
        if torch.is_grad_enabled():
            return self.weights()
        version = tuple(p._version for p in self.parameters())
        if self._at_rest[0] != version or not self._at_rest[1]:
            self._at_rest = (version, self.weights())
        return self._at_rest[1]

    def train(self, mode: bool = True) -> "Subspace":
        """Dropout and the like, on or off in the model."""
        super().train(mode)
        self._model[0].train(mode)
        self._at_rest = ((), {})
        return self
