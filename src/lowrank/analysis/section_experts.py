"""The report on experts of a mixture, which are too many to be modules among others: a map of layers and experts."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from markupsafe import Markup

from lowrank.analysis.experts import is_expert, leaf_and_number
from lowrank.analysis.figures.heat_map import heat_map
from lowrank.analysis.figures.scale import Scale
from lowrank.analysis.inspection import Inspection, Layer
from lowrank.analysis.measure import SHARES
from lowrank.analysis.page import Figure, Section
from lowrank.analysis.places import Place
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
            _maps(
                layers,
                "How much each expert changed, ‖ΔW‖/‖W0‖" if relative else "How much each expert changed, ‖ΔW‖",
                "Layers downwards, experts across, a map for each projection, all in one scale. An expert that few "
                "tokens are sent to changes little.",
                size,
                Scale(0.0, most),
            ),
            _maps(
                layers,
                f"Rank that keeps {SHARES[0]:.0%} of each expert's change",
                "The scale ends at the rank that was given.",
                lambda layer: float(layer.measure.rank_for[SHARES[0]]),
                Scale(0.0, float(rank)),
            ),
        ),
    )


def _maps(
    layers: Sequence[Layer], title: str, how: str, value: Callable[[Layer], float | None], scale: Scale
) -> Figure:
    by_leaf: dict[str, list[Layer]] = {}
    for layer in layers:
        leaf, expert = leaf_and_number(layer)
        by_leaf.setdefault(leaf, []).append(replace(layer, place=Place(layer.place.layer, f"{expert}")))
    drawn = [heat_map(found, value, scale, f"{title}: {leaf}") for leaf, found in by_leaf.items()]
    names = " and ".join(by_leaf)
    return Figure(title, f"{how} From above: {names}.", tuple(map(Markup, drawn)))
