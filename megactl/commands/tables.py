"""Tables as commands print them: for people (rich), as markdown (tabulate), as CSV. Cells are text; None is "-", in CSV nothing."""

from __future__ import annotations

import shutil
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
    stream = sys.stdout if stream is None else stream
    cells = [list(header), *([_shown(cell) for cell in row] for row in rows)]
    width = shutil.get_terminal_size().columns if stream.isatty() else _WIDE
    lines = None if wants_colour(stream) and any(styles) else _plain_lines(cells, right, width)
    if lines is None:
        _show_with_rich(cells, right, styles, stream, width)
    else:
        print("\n".join(lines), file=stream)


def _plain_lines(cells: Sequence[Sequence[str]], right: Sequence[int], width: int) -> list[str] | None:
    """The lines that rich would print, for a twentieth of its time; None where a cell must be folded or may be wider than its letters."""
    if not all(cell.isascii() and "\n" not in cell and "\t" not in cell for row in cells for cell in row):
        return None
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if not widths or sum(widths) + 3 * len(widths) + 1 > width:
        return None
    lines = []
    for row in cells:
        sized = zip(row, widths, strict=True)
        aligned = (cell.rjust(size) if index in right else cell.ljust(size) for index, (cell, size) in enumerate(sized))
        lines.append(f"  {'   '.join(aligned)}".rstrip())
    return ["", lines[0], " " + "─" * (sum(widths) + 3 * len(widths) - 1), *lines[1:], ""]


def _show_with_rich(cells: Sequence[Sequence[str]], right: Sequence[int], styles: Sequence[str | None], stream: TextIO, width: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, name in enumerate(cells[0]):
        table.add_column(Text(name), justify="right" if index in right else "left")
    for index, row in enumerate(cells[1:]):
        # Text, not markup: a cell may hold a file name such as "[red].out".
        table.add_row(*map(Text, row), style=styles[index] if styles else None)
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
