"""What a merge did."""

from dataclasses import dataclass, field
from pathlib import Path

from lowrank.errors import some
from lowrank.merge.apart import Apart, apart_table

SWALLOWED = 0.5  # below this share of ‖ΔW‖², more of the change is lost in rounding than is left


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The outcome of one merge. `print(report)` shows it.

    merged, replaced, moved: how many tensors were changed by ΔW, replaced in full, taken over as they were; bytes: the
    size of the weights; linked: weight files that share the base's blocks; renamed: leading parts of names that were
    exchanged; notes, warnings: what a careful reader would want to know; surviving: {tensor: share of ‖ΔW‖² left after
    rounding}; rows: merged rows recomputed in float64; worst: the largest error in parts of what is allowed;
    seconds: how long each stage took; repacked: merged weights that went back into the base's stored form; apart:
    {tensor: how far it is from the one that was trained}, of a merge onto the original of a quantised base.
    """

    out: Path
    merged: int
    replaced: int
    moved: int
    bytes: int
    linked: tuple[str, ...]
    renamed: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    surviving: dict[str, float]
    rows: int
    worst: float
    seconds: dict[str, float]
    repacked: int = 0
    apart: dict[str, Apart] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for the result, one for its verification, one for each finding; the warnings are left out."""
        seconds = sum(self.seconds.values())
        lines = [
            f"{self.out}: {self.merged} tensors merged, {self.replaced} replaced, {self.moved} unchanged, "
            f"{self.bytes / 1e9:.2f} GB in {seconds:.1f} s",
            *self._verified(),
        ]
        if self.surviving:
            least = min(self.surviving, key=lambda name: self.surviving[name])
            lines.append(f"left of ‖ΔW‖² after rounding: at least {self.surviving[least]:.1%} ({least})")
        lines += [f"names exchanged, {text}" for text in self.renamed]
        lines += [f"{some(self.linked)}: shared with the base"] if self.linked else []
        lines += [apart_table(self.apart)] if self.apart else []
        return "\n".join([*lines, *self.notes])

    def _verified(self) -> list[str]:
        """What was recomputed, and how near it is."""
        step = f"verified: {self.repacked} requantised weights, every element within a step of the quantiser"
        rounding = f"verified: {self.rows} merged rows recomputed in float64, every element within one rounding"
        return ([step] if self.repacked else []) + ([rounding] if self.rows or not self.repacked else [])

    def __str__(self) -> str:
        """The summary and the warnings."""
        return "\n".join([self.summary(), *(f"warning: {text}" for text in self.warnings)])


def survival_warnings(surviving: dict[str, float], dtype: str, remedy: str = "--dtype float32") -> list[str]:
    """One sentence where rounding loses more of ΔW than it leaves."""
    lost = {name: share for name, share in surviving.items() if share < SWALLOWED}
    if not lost:
        return []
    worst = min(lost, key=lambda name: lost[name])
    return [
        f"{len(lost)} of {len(surviving)} merged tensors lose more than half of ‖ΔW‖² in rounding to {dtype} (worst: "
        f"{worst}, {lost[worst]:.1%} left): the change is small against the weights; merge into float32 "
        f"({remedy}), or keep the adapter apart"
    ]
