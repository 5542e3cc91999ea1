"""The curve of an intrinsic dimension: the score of every d, between frozen features and full fine-tuning."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from lowrank.analysis.figures.svg import line, picture, polyline, tag, text, title

WIDTH, HEIGHT = 640.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 110.0, 20.0, 44.0
STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --ink: #1d1c1a; --soft: #66625b; --line: #dedad3;
  --strong: #16518c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #191816; --ink: #ece9e3; --soft: #a8a39a; --line: #3a3733; --strong: #7fb3e6; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; max-width: 44rem;
  margin: 2rem auto; padding: 0 1rem; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.middle { text-anchor: middle; } .end { text-anchor: end; } .grid { stroke: var(--line); }
.guide { stroke: var(--soft); stroke-dasharray: 3 4; } .curve { fill: none; stroke: var(--strong); stroke-width: 2; }
.dot { fill: var(--strong); fill-opacity: .55; }
"""


def dimension_curve(scores: Mapping[int, Sequence[float]], levels: Mapping[str, float], metric: str) -> str:
    """scores: {d: one per seed}; levels: {words: score}, dashed lines. A dot a run, a line through the means."""
    values = [*(value for runs in scores.values() for value in runs), *levels.values()]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    first, last = math.log2(min(scores)), math.log2(max(scores))

    def x(d: int) -> float:
        return LEFT + (math.log2(d) - first) / ((last - first) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / spread * (HEIGHT - TOP - BOTTOM)

    parts = []
    for i in range(5):
        value = low + spread * i / 4
        parts += [line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")]
        parts += [text(LEFT - 6, y(value) + 4, f"{value:.3g}", "end")]
    for words, value in levels.items():
        parts += [line(LEFT, y(value), WIDTH - RIGHT, y(value), "guide")]
        parts += [text(WIDTH - RIGHT + 6, y(value) + 4, words, "")]
    parts += [text(x(d), HEIGHT - BOTTOM + 18, f"{d:,}", "middle") for d in scores]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, f"d, trained numbers ({metric} upwards)", "middle"))
    parts.append(polyline(((x(d), y(fmean(runs))) for d, runs in scores.items()), "curve", "mean over the seeds"))
    for d, runs in scores.items():
        for value in runs:
            words = title(f"d = {d:,}: {value:.4g}")
            parts.append(tag("circle", {"cx": x(d), "cy": y(value), "r": 3.5, "class": "dot"}, words))
    return picture(WIDTH, HEIGHT, parts, "score by the dimension of the subspace")


def dimension_page(figure: str, sentences: Sequence[str]) -> str:
    """One HTML file with the figure and what it says in words."""
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    head = f'<meta charset="utf-8"><title>Intrinsic dimension</title><style>{STYLE}</style>'
    body = f"<h1>Intrinsic dimension</h1>{words}{figure}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
