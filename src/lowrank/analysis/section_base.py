"""The report on the change beside the weights that it changes."""

from collections.abc import Sequence
from statistics import fmean

from lowrank.analysis.figures.scale import Scale
from lowrank.analysis.inspection import Layer
from lowrank.analysis.page import Figure, Section, Table, by_module, map_figure
from lowrank.analysis.words import number
from lowrank.core.intruders import LEADING, THRESHOLD


def base_section(layers: Sequence[Layer]) -> Section:
    """Amplification, intruder dimensions, and the paper's Table 7."""
    amplified = map_figure(
        layers,
        "Amplification factor",
        "‖ΔW‖/‖UᵀW0V‖: how many times as large ΔW is as W0 in the directions that ΔW acts on. Large: ΔW raises what W0 "
        "hardly does there; about 1 or less: W0 does as much there by itself.",
        _factor,
    )
    return Section("Beside the base", (amplified, _intruders(layers)), (_table_7(layers),))


def _factor(layer: Layer) -> float | None:
    return None if layer.base is None or layer.base.amplification is None else layer.base.amplification.factor


def _intruders(layers: Sequence[Layer]) -> Figure:
    worst = max((layer.base.error for layer in layers if layer.base is not None), default=0.0)
    found = (
        f"Directions were found to ‖Wᵀu − σv‖ ≤ {number(worst)}·σ₁; those of W0 that were not looked for are bounded, "
        "and one is counted only if none of them can be alike."
        if worst > 0
        else "All weights were small enough for full decompositions."
    )
    return map_figure(
        layers,
        "Intruder dimensions",
        f"How many of the {LEADING} leading singular directions of W0 + ΔW have a cosine below {THRESHOLD} with every "
        f"singular direction of W0: what ΔW brought in that W0 did not know. {found}",
        lambda layer: None if layer.base is None else float(layer.base.intruders.certain),
        Scale(0.0, float(LEADING)),
    )


def _table_7(layers: Sequence[Layer]) -> Table:
    rows = []
    for name, group in by_module(layers):
        found = [layer.base.amplification for layer in group if layer.base and layer.base.amplification]
        if not found:
            continue
        figures = (
            fmean(a.change for a in found),
            fmean(a.weight for a in found),
            fmean(a.along_change for a in found),
            fmean(a.along_own for a in found),
            fmean(a.along_random for a in found),
            fmean(a.factor for a in found if a.factor is not None),
        )
        rows.append((name, *map(number, figures)))
    return Table(
        "W0 in the directions of ΔW (the paper's Table 7)",
        "Means over the layers. ‖UᵀW0V‖ says how much of W0 lies in the r directions U, V: those of ΔW, W0's own r "
        "leading ones, or r drawn at random (expected). If the first is near the third, ΔW acts where W0 does little.",
        ("module", "‖ΔW‖", "‖W0‖", "U, V of ΔW", "of W0 itself", "random", "amplification"),
        tuple(rows),
    )
