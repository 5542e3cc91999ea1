"""The report on experts of a mixture, which are too many to be modules among others: a map of layers and experts."""

from lowrank.analysis.experts import is_expert
from lowrank.analysis.figures.scale import Scale
from lowrank.analysis.inspection import Inspection
from lowrank.analysis.measure import SHARES
from lowrank.analysis.page import Section, map_figure
from lowrank.analysis.summary import size


def experts_section(inspection: Inspection) -> Section:
    """How much every expert changed, and how many directions that took; a map for each of its projections."""
    layers = [layer for layer in inspection.layers if is_expert(layer)]
    most = max(size(layer) for layer in layers) or 1.0
    rank = max(layer.measure.rank for layer in layers)
    relative = inspection.base is not None
    return Section(
        "Experts",
        (
            map_figure(
                layers,
                "How much each expert changed, ‖ΔW‖/‖W0‖" if relative else "How much each expert changed, ‖ΔW‖",
                "An expert that few tokens are sent to changes little.",
                size,
                Scale(0.0, most),
            ),
            map_figure(
                layers,
                f"Rank that keeps {SHARES[0]:.0%} of each expert's change",
                "The scale ends at the rank that was given.",
                lambda layer: float(layer.measure.rank_for[SHARES[0]]),
                Scale(0.0, float(rank)),
            ),
        ),
    )
