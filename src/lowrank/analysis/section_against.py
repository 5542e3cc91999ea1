"""The report on two adapters side by side."""

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

from markupsafe import Markup

from lowrank.analysis.compare import Comparison, Similarity
from lowrank.analysis.figures.phi import phi_figure, phi_legend
from lowrank.analysis.figures.scale import Scale
from lowrank.analysis.inspection import Layer
from lowrank.analysis.page import Figure, Section, Table, by_module, map_figure
from lowrank.analysis.words import number, percent

MOST_PANELS = 24
MOST_CELLS = 60_000  # of all grids of single modules together; beyond, the file would be slow to open
Side = Callable[[Comparison], Similarity | None]


def against_section(layers: Sequence[Layer]) -> Section:
    """Cosines, grids of φ, and what merging the two would do."""
    shared = [layer for layer in layers if layer.against is not None]
    bound = max((abs(layer.against.cosine or 0.0) for layer in shared if layer.against), default=1.0) or 1.0
    cosines = map_figure(
        shared,
        "Cosine of the two changes",
        "1: the same change (up to its size); 0: unrelated; −1: the opposite one. The scale ends at the largest.",
        lambda layer: None if layer.against is None else layer.against.cosine,
        Scale(-bound, bound, diverging=True),
    )
    return Section("Beside the other adapter", (cosines, *_grids(shared)), (_merging(shared),))


SIDES: tuple[tuple[str, str, Side], ...] = (
    ("right singular directions of ΔW (inputs)", "the inputs they read", lambda pair: pair.right),
    ("left singular directions of ΔW (outputs)", "the outputs they write", lambda pair: pair.left),
    ("right singular directions of A alone", "as Figures 3 and 4 of Hu et al. compare them", lambda pair: pair.a),
)


def _grids(shared: Sequence[Layer]) -> Iterator[Figure]:
    for words, meaning, side in SIDES:
        pictures = [
            Markup(phi_figure(found, name))
            for name, group in by_module(shared)[:MOST_PANELS]
            if (found := _similarities(group, side))
        ]
        yield Figure(
            f"φ(i, j): {words}",
            f"Mean over the layers, {meaning}. Row i, column j: what share of the smaller of two subspaces, that of "
            "our first i directions and that of the other's first j, lies in the larger; 1 is all of it. The small "
            "square is what directions drawn at random would give: only what is stronger than that means something.",
            (*pictures, Markup(phi_legend())),
        )
    yield _single_grids(shared)


def _single_grids(shared: Sequence[Layer]) -> Figure:
    alive = [layer for layer in shared if layer.against is not None and layer.against.right is not None]
    ranked = sorted(alive, key=_strongest, reverse=True)
    chosen, cells = [], 0
    for layer in ranked:
        assert layer.against is not None and layer.against.right is not None
        cells += 2 * len(layer.against.right.grid) * len(layer.against.right.grid[0])
        if cells > MOST_CELLS:
            break
        chosen.append(layer)
    names = {id(layer): _full_name(layer) for layer in chosen}
    pictures = [
        Markup(phi_figure([similarity], f"{names[id(layer)]}, {where}"))
        for layer in chosen
        for where, _, side in (("in", "", SIDES[0][2]), ("out", "", SIDES[1][2]))
        if layer.against is not None and (similarity := side(layer.against)) is not None
    ]
    rest = f" The first {len(chosen)} of {len(alive)}; --json has all." if len(chosen) < len(alive) else ""
    return Figure(
        "φ(i, j) of every module",
        f"As above, module by module, inputs and outputs, those that share most first.{rest}",
        tuple(pictures),
        folded=True,
    )


def _strongest(layer: Layer) -> float:
    assert layer.against is not None and layer.against.right is not None
    return layer.against.right.whole - layer.against.right.random


def _merging(shared: Sequence[Layer]) -> Table:
    rows = []
    for name, group in by_module(shared):
        pairs = [layer.against for layer in group if layer.against is not None and layer.against.cosine is not None]
        if not pairs:
            continue
        rows.append(
            (
                name,
                number(fmean(p.cosine for p in pairs if p.cosine is not None)),
                number(fmean(p.growth for p in pairs if p.growth is not None)),
                percent(fmean(p.disturbed_by for p in pairs if p.disturbed_by is not None)),
                percent(fmean(p.random_disturbed_by for p in pairs if p.random_disturbed_by is not None)),
                percent(fmean(p.disturbs for p in pairs if p.disturbs is not None)),
                percent(fmean(p.random_disturbs for p in pairs if p.random_disturbs is not None)),
                f"{fmean(p.rank_for_90 for p in pairs):.1f}",
            )
        )
    return Table(
        "If the two were merged together",
        "Means over the layers. growth: length of the sum beside that of unrelated changes (1.41 for equal ones, 0 for "
        "opposite ones). disturbed: what the other adds on the inputs that this one reads, as a share of what this one "
        "does there; disturbs: the reverse; each beside what unrelated directions would give.",
        ("module", "cosine", "growth", "disturbed", "(by chance)", "disturbs", "(by chance)", "rank of the sum, 90%"),
        tuple(rows),
    )


def _similarities(layers: Sequence[Layer], side: Side) -> list[Similarity]:
    found = [side(layer.against) for layer in layers if layer.against is not None]
    return [similarity for similarity in found if similarity is not None]


def _full_name(layer: Layer) -> str:
    return layer.place.module if layer.place.layer is None else f"{layer.place.layer} {layer.place.module}"
