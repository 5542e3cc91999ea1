"""What `accelerate` says it did."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerPath:
    """One LoRA layer of PEFT: its path in the model, and why it stays with PEFT's forward (None: it runs fused)."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class AccelerationReport:
    """Every LoRA layer of a PEFT model and the way it is computed. `print(report)` shows it.

    It tells the state at the time of the call, for inputs of the base weight's dtype.
    """

    layers: tuple[LayerPath, ...]

    @property
    def fused(self) -> tuple[LayerPath, ...]:
        """The layers computed by the fused kernels."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def with_peft(self) -> tuple[LayerPath, ...]:
        """The layers that stay with PEFT's own forward, each with its reason."""
        return tuple(layer for layer in self.layers if layer.reason is not None)

    def summary(self) -> str:
        """One line: how many layers run fused, how many stay with PEFT."""
        return f"{len(self.fused)} of {len(self.layers)} LoRA layers fused, {len(self.with_peft)} computed by PEFT"

    def __str__(self) -> str:
        """A line for each layer, then the sum."""
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{layer.name:{width}}  {'fused' if layer.reason is None else f'PEFT: {layer.reason}'}"
            for layer in self.layers
        ]
        return "\n".join([*lines, self.summary()])
