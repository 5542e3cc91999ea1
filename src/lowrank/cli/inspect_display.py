"""What `lowrank inspect` shows: sentences and a table, or one JSON object. A terminal gets it fitted and in style."""

import json
import os
import sys
from pathlib import Path

from lowrank.analysis.as_json import as_json
from lowrank.analysis.columns import columns
from lowrank.analysis.inspection import Inspection
from lowrank.analysis.summary import summary
from lowrank.cli.say import say, styled
from lowrank.cli.table import plain_table


def show(inspection: Inspection, html: Path | None, as_object: bool) -> None:
    """Print the inspection, and where the report went."""
    if as_object:
        say(json.dumps(as_json(inspection), allow_nan=False))
        return
    before = [*summary(inspection), *inspection.notes]
    chosen = columns(inspection)
    rows = [[column.value(layer) for column in chosen] for layer in inspection.layers]
    after = [f"kept in full: {key} {list(shape)}" for key, shape in inspection.full.items()]
    if html is not None:
        after.append(f"report: {html}")
    titles, meanings = [column.title for column in chosen], [column.meaning for column in chosen]
    if sys.stdout.isatty():
        _print_styled(before, titles, meanings, rows, after)
    else:
        say(*before, "", *plain_table([titles, *rows]), *after)


def _print_styled(
    before: list[str], titles: list[str], meanings: list[str], rows: list[list[str]], after: list[str]
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for sentence in before:
        console.print(styled(f"• {sentence}"))
    prefix = _common_prefix([row[0] for row in rows])
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for i, title in enumerate(titles):
        name = title if i else title + (f" ({prefix}…)" if prefix else "")
        table.add_column(styled(name), justify="right" if i else "left", overflow="ellipsis" if i else "fold")
    for path, *cells in rows:
        table.add_row(styled(path.removeprefix(prefix)), *map(styled, cells))
    console.print()
    console.print(table)
    legend = "; ".join(f"{title}: {meaning}" for title, meaning in list(zip(titles, meanings, strict=True))[2:])
    console.print(styled(legend, "dim"))
    for line in after:
        console.print(styled(line))


def _common_prefix(paths: list[str]) -> str:
    """What all paths begin with, up to a dot; nothing for a single path."""
    common = os.path.commonprefix(paths) if len(paths) > 1 else ""  # noqa: RUF071  these are no paths of files
    return common[: common.rfind(".") + 1]
