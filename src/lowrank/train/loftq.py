"""`--init loftq`: the factors' start, taken while each weight is there both as it was and as it is held."""

import torch
from torch import Tensor, nn

from lowrank.core.init.loftq import loftq
from lowrank.core.stored import Stored
from lowrank.injection.adapters import lora_layers
from lowrank.injection.config import LoraConfig
from lowrank.injection.planning import plan

LOFTQ = "loftq"


class LoftqStarts:
    """The starts of one adapter: planned on the float model, taken layer by layer, put into the injected factors."""

    def __init__(self) -> None:
        self._wanted: dict[str, tuple[int, float]] = {}
        self._starts: dict[str, tuple[Tensor, Tensor]] = {}

    def plan(self, model: nn.Module, config: LoraConfig) -> None:
        """In place: which layers get a start, of which rank and scale."""
        self._wanted = {entry.path: (entry.rank, entry.scale) for entry in plan(model, config).entries}

    def __call__(self, path: str, weight: Tensor, held: Stored) -> None:
        """In place: the start of one layer; weight: W0, held: what quantising left of it."""
        if path in self._wanted:
            self._starts[path] = loftq(weight.float() - held.matrix(torch.float32), *self._wanted[path])

    @torch.no_grad()
    def put(self, model: nn.Module) -> int:
        """In place: the adapter `default` starts there. Returns in how many layers."""
        layers = {path: layer for path, layer in lora_layers(model) if path in self._starts}
        for path, layer in layers.items():
            a, b = self._starts.pop(path)
            factors = layer.factors("default")
            factors.a.copy_(a)
            factors.b.copy_(b)
        return len(layers)
