"""How much of a change its factors hold: per module and in all, as every report here says it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModuleEnergy:
    """One module of a result.

    ranks: of what it was made from, empty where that was no factors; rank: of the result; norm: ‖ΔW‖_F before
    compression; kept: the share of ‖ΔW‖²_F that the result holds; shortfall: an estimate of how much larger the share
    of the best result of this rank may be, 0 where this is the best.
    """

    path: str
    ranks: tuple[int, ...]
    rank: int
    kept: float
    norm: float
    shortfall: float = 0.0


def overall(modules: Sequence[ModuleEnergy]) -> float:
    """The share of Σ‖ΔW‖²_F over all modules that is kept."""
    total = sum(module.norm**2 for module in modules)
    return sum(module.kept * module.norm**2 for module in modules) / total if total > 0 else 1.0


def span(numbers: Iterable[int]) -> str:
    """ "4", or "2 to 8"."""
    low, *rest = sorted(set(numbers))
    return f"{low} to {rest[-1]}" if rest else f"{low}"


def headline(modules: Sequence[ModuleEnergy]) -> list[str]:
    """How many modules, of which ranks, with how much kept; and the module that lost most, if one lost anything."""
    worst = min(modules, key=lambda module: module.kept)
    lines = [
        f"{len(modules)} modules at rank {span(module.rank for module in modules)}, "
        f"{overall(modules):.4%} of the energy ‖ΔW‖² kept"
    ]
    return lines if worst.kept > 1 - 1e-6 else [*lines, f"least in {worst.path}: {worst.kept:.4%}"]
