"""What `lowrank data show` prints, and its page."""

from collections.abc import Sequence
from html import escape

from rich.console import Console
from rich.text import Text

from lowrank.cli.say import styled
from lowrank.data.met import Met
from lowrank.data.survey import OFTEN, Runs, Survey
from lowrank.errors import some

OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there is no colour
BAR = 40
STYLE = "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto}"
STYLE += "pre{white-space:pre-wrap;background:#f6f6f6;padding:1em}mark{background:#bfe8bf}"

Lines = list[tuple[str, str]]


def figures(found: Survey, met: Sequence[Met]) -> list[str]:
    """The histogram, the tokens or labels, and rows that are met more than once, as lines."""
    most = max(count for _, count in found.lengths)
    lines = ["length in tokens:"]
    lines += [f"  to {edge:>6,}  {count:>8,}  {'█' * round(BAR * count / most)}" for edge, count in found.lengths]
    for name, tokens in (("first", found.first), ("last", found.last)):
        if tokens:
            lines.append(f"{name} trained tokens: " + ", ".join(f"{token!r} {count:,}" for token, count in tokens))
    if found.labels:
        lines.append("labels: " + some((f"{name} {count:,}" for name, count in found.labels), OFTEN))
    lines.append(f"rows that stand in it once more: {found.duplicates:,}")
    for source in met:
        where = f" ({some(source.at)})" if source.at else ""
        lines.append(f"rows of {source.source} that are trained on too: {len(source.at):,} of {source.count:,}{where}")
    return lines


def show(summary: Lines, found: Sequence[str], rows: list[tuple[str, Runs]]) -> None:
    """On a terminal what is trained is green, elsewhere in brackets."""
    console = Console(highlight=False)
    coloured = console.is_terminal and not console.no_color
    for title, row in rows:
        console.print(styled(f"── {title}"), soft_wrap=True)
        text = Text()
        for part, trained in row:
            shown = part if coloured or not trained else OPEN + part + CLOSE
            text.append(styled(shown, "bold green" if trained else "dim"))
        console.print(text, soft_wrap=True)
    for line in [*(f"{what + ':':<12}{value}" for what, value in summary), *found]:
        console.print(styled(line), soft_wrap=True)


def page(summary: Lines, found: Sequence[str], rows: list[tuple[str, Runs]]) -> str:
    """One offline page: everything from the data is escaped, and nothing is fetched."""
    lines = [f"{what}: {value}" for what, value in summary] + [*found]
    body = [f"<pre>{escape(chr(10).join(lines))}</pre>"]
    for title, row in rows:
        text = "".join(f"<mark>{escape(part)}</mark>" if trained else escape(part) for part, trained in row)
        body.append(f"<h3>{escape(title)}</h3><pre>{text}</pre>")
    head = f'<!doctype html><meta charset="utf-8"><title>lowrank data</title><style>{STYLE}</style>'
    return head + "<h1>What is trained (marked)</h1>" + "".join(body) + "\n"
