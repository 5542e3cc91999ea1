"""Grids of φ(i, j): how much of i directions of one adapter and j of another is the same."""

from collections.abc import Sequence

from lowrank.analysis.compare import Grid, Similarity, mean_grid
from lowrank.analysis.figures.scale import Scale
from lowrank.analysis.figures.svg import picture, tag, text, title
from lowrank.analysis.words import number
from lowrank.core.subspace import random_grid

PHI = Scale(0.0, 1.0)
LARGE, SMALL = 168.0, 62.0


def phi_figure(similarities: Sequence[Similarity], name: str) -> str:
    """The mean of the grids, and beside it what directions drawn at random would give."""
    grid = mean_grid(similarities)
    chances = [random_grid(s.dimension, len(grid), len(grid[0])).tolist() for s in similarities]
    chance = tuple(
        tuple(sum(c[i][j] for c in chances) / len(chances) for j in range(len(grid[0]))) for i in range(len(grid))
    )
    left, top = 30.0, 22.0
    parts = [
        text(left, 13, name, "panel"),
        *cells(grid, left, top, LARGE),
        text(left - 5, top + 9, "1", "tick end"),
        text(left - 5, top + LARGE, str(len(grid)), "tick end"),
        text(left, top + LARGE + 14, "1", "tick"),
        text(left + LARGE, top + LARGE + 14, str(len(grid[0])), "tick end"),
        text(left + LARGE / 2, top + LARGE + 14, "j (the other)", "tick middle"),
        text(left - 8, top + LARGE / 2 + 4, "i", "tick end"),
        *cells(chance, left + LARGE + 14, top, SMALL),
        text(left + LARGE + 14, top + SMALL + 14, "by chance", "tick"),
        text(left + LARGE + 14, top + LARGE - 18, f"all: {number(grid[-1][-1])}", "tick"),
        text(left + LARGE + 14, top + LARGE - 2, f"chance: {number(chance[-1][-1])}", "tick"),
    ]
    return picture(left + LARGE + SMALL + 40, top + LARGE + 22, parts, f"similarity grid of {name}")


def phi_legend() -> str:
    """Which colour is which φ."""
    return picture(240, 24, PHI.legend(4, 3), "colours of φ")


def cells(grid: Grid, left: float, top: float, size: float) -> list[str]:
    """The grid as a square: one path a level of colour, so that large grids stay small files."""
    height, width = size / len(grid), size / len(grid[0])
    paths: dict[int, list[str]] = {}
    for i, row in enumerate(grid):
        for level, start, stop in _runs([PHI.level(value) for value in row]):
            x, y, w = left + start * width, top + i * height, (stop - start) * width
            paths.setdefault(level, []).append(f"M{x:.2f} {y:.2f}h{w:.2f}v{height:.2f}h{-w:.2f}z")
    words = title(f"φ of all: {number(grid[-1][-1])}, of the strongest one: {number(grid[0][0])}")
    drawn = [tag("path", {"d": "".join(parts), "class": f"q{level}"}) for level, parts in sorted(paths.items())]
    return [tag("g", {"shape-rendering": "crispEdges"}, words + "".join(drawn))]


def _runs(levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(level, start, stop) of every run of equal levels."""
    runs: list[tuple[int, int, int]] = []
    for i, level in enumerate(levels):
        if runs and runs[-1][0] == level:
            runs[-1] = (level, runs[-1][1], i + 1)
        else:
            runs.append((level, i, i + 1))
    return runs
