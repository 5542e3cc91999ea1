"""One module of an adapter, as a value without a model."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """ΔW = scale·B·A of one module, flat: a (r, k), b (d, r).

    kind: linear (which includes Conv1D), embedding, conv, or experts, which have a (E, r, k), b (E, d, r).
    For convolutions, kernel is the weight's shape (d, in/groups, *kernel). magnitude: (d,), for
    DoRA; (E, d) of experts.
    """

    kind: str
    a: Tensor
    b: Tensor
    scale: float
    kernel: tuple[int, ...] = ()
    groups: int = 1
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k)."""
        return self.b.shape[0], self.a.shape[1]
