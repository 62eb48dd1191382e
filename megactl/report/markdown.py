"""Markdown tables where they stand in a text: found, read, and single cells replaced, with every other character left as it was.

A table is GitHub's (https://github.github.com/gfm/#tables-extension-): rows of cells between pipes, below a line of dashes. Beyond
that, several header lines above the dashes are read as one header (people write them so). Code fences hold no tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

_DASHES = re.compile(r":?-+:?")
_FENCE = re.compile(r"[\s>]*(`{3,}|~{3,})(.*)", re.S)
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Cell:
    """A cell: its text without the blanks around it, and the columns of its line between its pipes, blanks included."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """A line of a table; `line` counts from 0. A row may have fewer cells than the header, or more."""

    line: int
    cells: tuple[Cell, ...]

    def cell(self, column: int | None) -> Cell | None:
        """The cell of a column; None where the row ends before it, or there is no such column."""
        return self.cells[column] if column is not None and column < len(self.cells) else None


@dataclass(frozen=True)
class Table:
    """`header` has one text a column: several header lines are joined by blanks. `line` is that of the first header line, from 0."""

    line: int
    header: tuple[str, ...]
    rows: tuple[Row, ...]


def split_lines(text: str) -> list[str]:
    """Lines with their ends. Only "\\n" ends one: form feeds and the like are what they were, and "\\r\\n" keeps its "\\r"."""
    return _LINE.findall(text)


def find_tables(lines: Sequence[str]) -> list[Table]:
    """The tables of a text, in order."""
    found: list[Table] = []
    code = _code_lines(lines)
    index = 0
    while index < len(lines):
        table = _table_at(lines, code, index, found[-1] if found else None)
        if table is None:
            index += 1
        else:
            found.append(table)
            index = table.rows[-1].line + 1 if table.rows else index + 1
    return found


def prose(lines: Sequence[str], tables: Sequence[Table]) -> Iterator[str]:
    """The lines that belong to no table."""
    inside = {number for table in tables for number in range(table.line, table.rows[-1].line + 1 if table.rows else table.line + 1)}
    return (line for number, line in enumerate(lines) if number not in inside)


def replace_cells(lines: Sequence[str], changes: Mapping[tuple[int, int], str], tables: Sequence[Table]) -> list[str]:
    """The lines with new texts for the cells (line, column). A cell keeps its width, and its blanks where they tell the alignment."""
    changed = list(lines)
    rows = {row.line: row for table in tables for row in table.rows}
    # From the right, so that a cell that grows does not move those still to come.
    for (number, column), text in sorted(changes.items(), reverse=True):
        cell = rows[number].cells[column]
        line = changed[number]
        changed[number] = line[: cell.start] + _refilled(line[cell.start : cell.end], text) + line[cell.end :]
    return changed


def _refilled(old: str, text: str) -> str:
    inner = old.strip()
    left = len(old) - len(old.lstrip()) if inner else min(1, len(old))
    right = len(old) - len(old.rstrip()) if inner else min(1, len(old) - left)
    room = len(old) - len(text) - min(left, 1) - min(right, 1)
    if room <= 0:
        return old[:1] * min(left, 1) + text + old[-1:] * min(right, 1)
    # Numbers stand on the right unless the cell shows that they do not.
    blanks = " " * room
    on_left = bool(inner) and left <= 1 < right
    return " " * min(left, 1) + (text + blanks if on_left else blanks + text) + " " * min(right, 1)


def _code_lines(lines: Sequence[str]) -> list[bool]:
    """For each line whether it is inside a code fence (or one of the fence's own lines); an open fence goes on to the end."""
    inside: list[bool] = []
    fence = ""
    for line in lines:
        match = _FENCE.fullmatch(line)
        if not fence and match and not ("`" in match[1] and "`" in match[2]):
            fence = match[1]
            inside.append(True)
            continue
        inside.append(bool(fence))
        if fence and match and match[1].startswith(fence) and not match[2].strip():
            fence = ""
    return inside


def _table_at(lines: Sequence[str], code: Sequence[bool], index: int, before: Table | None) -> Table | None:
    """The table whose line of dashes is `index`, or None."""
    dashes = _bare(lines[index])
    if code[index] or index == 0 or "|" not in dashes or not all(_DASHES.fullmatch(cell.text) for cell in _cells(dashes)):
        return None
    width = len(_cells(dashes))
    first, barrier = index, before.rows[-1].line if before and before.rows else -1
    while first - 1 > barrier and not code[first - 1] and _is_row(lines[first - 1]) and len(_cells(_bare(lines[first - 1]))) == width:
        first -= 1
        if not _bare(lines[first]).lstrip().startswith("|"):
            break
    if first == index:
        return None
    headers = [_cells(_bare(line)) for line in lines[first:index]]
    header = tuple(" ".join(cells[column].text for cells in headers).strip() for column in range(width))
    last = index + 1
    while last < len(lines) and not code[last] and _is_row(lines[last]):
        last += 1
    return Table(first, header, tuple(Row(number, _cells(_bare(lines[number]))) for number in range(index + 1, last)))


def _bare(line: str) -> str:
    """The line without its end, and a byte-order mark made a blank, so that columns still count."""
    return line.rstrip("\r\n").replace("\ufeff", " ")


def _is_row(line: str) -> bool:
    return "|" in line and not line.isspace()


def _cells(line: str) -> tuple[Cell, ...]:
    """The cells between the pipes of a line; "\\|" is a character of a cell. The outer pipes may be left out."""
    pipes = [match.start() for match in re.finditer(r"(?<!\\)\|", line)]
    edges = [-1, *pipes, len(line)]
    if pipes and not line[: pipes[0]].strip():
        edges = edges[1:]
    if len(edges) > 2 and pipes and not line[pipes[-1] + 1 :].strip():
        edges = edges[:-1]
    return tuple(Cell(line[one + 1 : other].strip(), one + 1, other) for one, other in pairwise(edges))
