"""A table as lines of text."""

from collections.abc import Iterator, Sequence


def plain_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of equal columns, however wide: nothing is cut where no one looks. The first column is flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
