"""The change ΔW = s·B·A of one module, as an adapter's files have it."""

from dataclasses import dataclass

from torch import Tensor

from lowrank.checkpoint import AdapterFiles
from lowrank.checkpoint.restore import unfold, with_moved_base
from lowrank.core.factors import LoraFactors

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Change:
    """ΔW of a module: a (R, k), b (d, R) over the whole weight, whatever the variant.

    kind: linear (Conv1D included), embedding or conv; rank: the r that was given, which is R unless parts of a fused
    projection or start factors are folded in; parts: the adapted parts of a fused projection; started: training did not
    start at ΔW = 0, and ΔW is counted from there; magnitude: DoRA's m (d,), of which s·B·A knows nothing.
    """

    path: str
    kind: str
    a: Tensor
    b: Tensor
    scale: float
    rank: int
    parts: tuple[str, ...]
    started: bool
    magnitude: Tensor | None

    @property
    def shape(self) -> Shape:
        """(d, k) of ΔW."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def parameters(self) -> int:
        """How many numbers were trained: r·(k + d), for parts their own rows only, plus DoRA's d."""
        a_rows = self.rank * max(1, len(self.parts))
        b_rows = sum(self.b.abs().sum(1) > 0) if self.parts else self.b.shape[0]
        magnitude = 0 if self.magnitude is None else self.magnitude.numel()
        return a_rows * self.a.shape[1] + int(b_rows) * self.rank + magnitude


def read_change(files: AdapterFiles, path: str, base: Tensor | None = None) -> Change:
    """The change of the module at `path`; base: its W0 (d, k), where it is at hand.

    An adapter that PEFT trained from PiSSA or OLoRA and saved unconverted counts from W0 only if `base` is given: its
    start is found again from W0. Raises CheckpointError for a grouped convolution that cannot be merged.
    """
    folded = files.factors(path, stored_shape(files, path))
    factors = unfold(folded, path, files.companion)
    method = files.config.moved_base
    if base is not None and method is not None and files.kind(path) == "linear" and path not in files.singles:
        factors = with_moved_base(factors, method, base)
    a, b = factors.effective()
    return Change(
        path=path,
        kind=files.kind(path),
        a=a.detach(),
        b=b.detach(),
        scale=factors.scale,
        rank=factors.rank,
        parts=_parts(files, path, factors),
        started=factors.start_a is not None,
        magnitude=None if factors.magnitude is None else factors.magnitude.detach(),
    )


def stored_shape(files: AdapterFiles, path: str) -> tuple[int, ...]:
    """The shape of a convolution's weight, from its factors alone; () for other kinds, which do not need it."""
    if files.kind(path) != "conv":
        return ()
    a, b = files.pair(path)
    groups = a.shape[0] // b.shape[1]
    return (b.shape[0], a.shape[1] // groups, *a.shape[2:])


def _parts(files: AdapterFiles, path: str, factors: LoraFactors) -> tuple[str, ...]:
    if not factors.parts:
        return ()
    names = files.companion.fused[path].names
    return names if len(names) == len(factors.parts) else tuple(str(i) for i in range(len(factors.parts)))
