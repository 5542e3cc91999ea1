"""How much of the change a smaller rank would keep."""

from collections.abc import Sequence

from lowrank.analysis.figures.svg import line, picture, polyline, tag, text, title
from lowrank.analysis.inspection import Layer
from lowrank.analysis.measure import SHARES, mean_energy_kept
from lowrank.analysis.words import percent

WIDTH, HEIGHT = 620.0, 280.0
LEFT, BOTTOM = 52.0, 36.0


def energy_curve(layers: Sequence[Layer]) -> str:
    """The energy kept by rank 1, 2, ...: over all modules (line), and between the best and the worst module (band)."""
    changed = [layer.measure for layer in layers if layer.measure.norm > 0]
    kept = mean_energy_kept(changed)
    n = len(kept)
    shares = [[m.kept_by(rank) / m.norm**2 for m in changed] for rank in range(1, n + 1)]
    parts = [*_axes(n)]
    band = [*((_x(i, n), _y(max(s))) for i, s in enumerate(shares))]
    band += [(_x(i, n), _y(min(s))) for i, s in reversed(list(enumerate(shares)))]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in band)
    parts.append(tag("polygon", {"points": points, "class": "band"}, title("from the worst to the best module")))
    parts.append(polyline(((_x(i, n), _y(share)) for i, share in enumerate(kept)), "curve", "all modules together"))
    for i, share in enumerate(kept):
        words = title(f"rank {i + 1}: {percent(share)}")
        parts.append(tag("circle", {"cx": _x(i, n), "cy": _y(share), "r": 3, "class": "dot"}, words))
    return picture(WIDTH, HEIGHT, parts, "energy kept by rank")


def _axes(n: int) -> list[str]:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, *SHARES):
        style = "guide" if share in SHARES else "grid"
        parts.append(line(LEFT, _y(share), WIDTH - 12, _y(share), style))
    for share in (0.0, 0.25, 0.5, 0.75, SHARES[0], SHARES[-1]):
        parts.append(text(LEFT - 6, _y(share) + 4, f"{share:.0%}", "tick end"))
    step = max(1, n // 16)
    for i in range(0, n, step):
        parts.append(text(_x(i, n), HEIGHT - BOTTOM + 18, str(i + 1), "tick middle"))
    return [*parts, text(WIDTH - 12, HEIGHT - 4, "rank", "tick end")]


def _x(i: int, n: int) -> float:
    return LEFT + 12 + i * (WIDTH - LEFT - 36) / max(n - 1, 1)


def _y(share: float) -> float:
    return 14 + (1 - share) * (HEIGHT - BOTTOM - 14)
