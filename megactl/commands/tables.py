"""Tables as commands print them: for people (rich), as markdown (tabulate), as CSV. Cells are text; None is "-", in CSV nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from megactl.commands.common import printable, wants_colour

Cell = str | None

# Wide enough that no cell is folded where nobody looks: a file or a pipe is read by programs too.
_WIDE = 1000


def show_table(
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    right: Sequence[int] = (),
    styles: Sequence[str | None] = (),
    stream: TextIO | None = None,
) -> None:
    """Print a table on `stream` (default stdout). `right` are the columns (from 0) of numbers, `styles` a rich style (or None) a row.

    On a terminal it keeps to its width; elsewhere no cell is folded.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = sys.stdout if stream is None else stream
    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="right" if index in right else "left")
    for index, row in enumerate(rows):
        # Text, not markup: a cell may hold a file name such as "[red].out".
        table.add_row(*(Text(_shown(cell)) for cell in row), style=styles[index] if styles else None)
    width = None if stream.isatty() else _WIDE
    Console(file=stream, width=width, no_color=not wants_colour(stream), highlight=False).print(table)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Sequence[int] = ()) -> str:
    """The table in GitHub's markdown, without a line end after it. A pipe in a cell is escaped, a line end becomes a space."""
    from tabulate import tabulate

    cells = [[_shown(cell).replace("\n", " ").replace("|", "\\|") for cell in row] for row in rows]
    alignment = ["right" if index in right else "left" for index in range(len(header))]
    return tabulate(cells, headers=list(header), tablefmt="github", disable_numparse=True, colalign=alignment if cells else None)


def csv_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The table as CSV (RFC 4180 quoting, "\\n" line ends), with a header line."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue()


def _shown(cell: Cell) -> str:
    return "-" if cell is None else printable(cell)
