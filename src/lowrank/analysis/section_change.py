"""The report on the change itself: where it is large, and how much of its rank it uses."""

from collections.abc import Sequence

from markupsafe import Markup

from lowrank.analysis.figures.energy import energy_curve
from lowrank.analysis.figures.heat_map import column_names
from lowrank.analysis.figures.scale import Scale
from lowrank.analysis.figures.spectra import common_range, spectra
from lowrank.analysis.inspection import Inspection, Layer
from lowrank.analysis.measure import SHARES
from lowrank.analysis.page import Figure, Section, map_figure
from lowrank.analysis.summary import size

MOST_PANELS = 24


def where_section(inspection: Inspection, layers: Sequence[Layer]) -> Section:
    """The size of the change of these modules."""
    relative = inspection.base is not None
    how = "Each cell is one module; the darker (in a dark page the brighter), the more of it changed"
    figure = map_figure(
        layers,
        "Size of the change, ‖ΔW‖/‖W0‖" if relative else "Size of the change, ‖ΔW‖",
        f"{how}." if relative else f"{how}; without the base, larger modules look more changed than small ones.",
        size,
    )
    return Section("Where it changed", (figure,))


def rank_section(layers: Sequence[Layer], dense: Sequence[Layer]) -> Section:
    """What smaller ranks would keep, and the spectra that say so; of single modules those of `dense` alone."""
    title = "How much of the rank it uses"
    if not dense:
        return Section(title, (_energy(layers),))
    most = max(layer.measure.rank for layer in dense)
    ranks = map_figure(
        dense,
        f"Rank that keeps {SHARES[0]:.0%}",
        f"How many directions hold {SHARES[0]:.0%} of a module's ‖ΔW‖²; the scale ends at the rank that was given.",
        lambda layer: float(layer.measure.rank_for[SHARES[0]]),
        Scale(0.0, float(most)),
    )
    return Section(title, (_energy(layers), ranks, _spectra(dense)))


def _energy(layers: Sequence[Layer]) -> Figure:
    return Figure(
        "Energy kept by a smaller rank",
        "The line is the share of all ‖ΔW‖² that the best change of this rank would keep; the band reaches from the "
        "module that loses most to the one that loses least. The sooner it is high, the less rank was needed.",
        (Markup(energy_curve(layers)),),
    )


def _spectra(layers: Sequence[Layer]) -> Figure:
    names = column_names(layers)
    low, high = common_range(layers)
    left_out = f" The first {MOST_PANELS} of {len(names)} kinds of module." if len(names) > MOST_PANELS else ""
    return Figure(
        "Spectra",
        "Singular values σ of ΔW, the strongest first, logarithmic; one line a layer, deeper layers stronger. A line "
        f"that falls steeply uses few of its directions; a flat one uses all of its rank.{left_out}",
        tuple(Markup(spectra(layers, name, low, high)) for name in names[:MOST_PANELS]),
    )
