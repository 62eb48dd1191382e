"""Result tables as people keep them in notes (GPUs, size, batch, speed, TFLOPs): the TFLOPs column computed again, the rows checked.

The formula comes from outside. What is read from the text: the columns by their names, units in cells and headers, TP where it is no
column but the text names one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megactl.report.markdown import Row, Table, find_tables, prose, replace_cells, split_lines
from megactl.report.quantity import BILLIONS, COUNT, SECONDS, Quantity, number_span, read_quantity

Formula = Callable[..., float]
"""TFLOP/s per GPU of (billions, seconds, gpus, global_batch, seq_length), all by name."""

# What a column is, by its header in small letters without blanks and signs.
_NAMES: dict[str, tuple[str, ...]] = {
    "gpus": ("gpus", "ngpus", "numgpus", "ng", "worldsize", "totalgpus"),
    "nodes": ("nodes", "nnodes", "numnodes"),
    "billions": ("size", "msize", "modelsize", "ms", "model", "params", "parameters"),
    "global_batch": ("gbs", "globbs", "globalbs", "globalbatch", "globalbatchsize"),
    "micro_batch": ("mbs", "micbs", "microbs", "microbatch", "microbatchsize"),
    "accumulation": ("gas", "ppchunks", "chunks", "microbatches", "numgas", "gradacc", "gradientaccumulationsteps"),
    "seconds": ("speed", "time", "sec", "seconds", "siter", "siteration", "iterationtime", "timeperiteration", "elapsed"),
    "tflops": ("tflops", "tflopss", "tflopsgpu", "tflopssgpu", "tflopspergpu"),
    "seq_length": ("seq", "seqlen", "seqlength", "sequencelength"),
    "tp": ("tp", "tpsize"),
    "pp": ("pp", "ppsize"),
    "dp": ("dp", "dpsize"),
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}
_UNITS = {"billions": BILLIONS, "seconds": SECONDS}
# "PP*TP=8*4=32" is a product, and says nothing of TP.
_TENSOR_PARALLEL = re.compile(r"(?<![\w*-])(?:TP(?:_SIZE)? ?= ?|--tensor-model-parallel-size[ =])(\d{1,5})(?![\d*])")
_TFLOPS: Mapping[str, float] = {"": 1.0, "tflops": 1.0, "tf": 1.0}
# No row of results lies outside, and within no product of four overflows.
_LEAST, _MOST = 1e-9, 1e15
_NO_NUMBER = ("", "-", "--", "?", "n/a", "na", "nan", "tbd")


@dataclass(frozen=True)
class Given:
    """What the user says for all tables; it stands in for columns that a table does not have."""

    seq_length: int
    gpus: int | None = None
    gpus_per_node: int | None = None
    global_batch: int | None = None
    billions: float | None = None
    tp: int | None = None


@dataclass(frozen=True)
class CheckedRow:
    """A row whose TFLOPs could be computed. `line` counts from 1. `old` is the cell as it was (None: empty), `new` as it is now.

    `verdict`: match (equal at the digits shown), rounding (explained by the digits shown of `because`), mismatch, or filled (the cell
    was empty). `least` and `most`: the formula's range over the rounding of the printed speed.
    """

    line: int
    cells: dict[str, str]
    old: str | None
    new: str
    computed: float
    least: float
    most: float
    verdict: str
    because: str | None = None


@dataclass(frozen=True)
class Finding:
    """A line (from 1) and what is to say about it."""

    line: int
    problem: str
    cells: dict[str, str] = field(default_factory=dict)


@dataclass
class TableReport:
    """The text with the column computed again, and what was found on the way."""

    text: str = ""
    tables: int = 0
    rows: list[CheckedRow] = field(default_factory=list)
    inconsistent: list[Finding] = field(default_factory=list)
    skipped: list[Finding] = field(default_factory=list)
    assumed: dict[str, str] = field(default_factory=dict)

    def by_verdict(self, verdict: str) -> list[CheckedRow]:
        """The rows with one verdict."""
        return [row for row in self.rows if row.verdict == verdict]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "tables": self.tables,
            "rows": len(self.rows),
            "changed": sum(row.old != row.new for row in self.rows),
            "mismatches": [asdict(row) for row in self.by_verdict("mismatch")],
            "rounding": [asdict(row) for row in self.by_verdict("rounding")],
            "inconsistent": [asdict(finding) for finding in self.inconsistent],
            "filled": [asdict(row) for row in self.by_verdict("filled")],
            "skipped": [asdict(finding) for finding in self.skipped],
            "text": self.text,
        }


def regenerate(text: str, formula: Formula, given: Given) -> TableReport:
    """Compute the TFLOPs column of every table in `text` that has one, and check each row against itself. Changes nothing else."""
    lines, report = split_lines(text), TableReport()
    tables = find_tables(lines)
    given = _with_tensor_parallel(given, prose(lines, tables), report)
    changes: dict[tuple[int, int], str] = {}
    for table in tables:
        columns = _columns(table, report)
        if not columns:
            continue
        report.tables += 1
        missing = _missing_columns(columns, given)
        if missing:
            report.skipped.append(Finding(table.line + 1, f"the table has no column {' and no column '.join(missing)}"))
        for row in table.rows:
            _check_row(_Reading(table, row, columns, given), None if missing else formula, report, changes)
    report.text = "".join(replace_cells(lines, changes, tables))
    return report


def _with_tensor_parallel(given: Given, text: Iterator[str], report: TableReport) -> Given:
    """TP as the text names it, where the user did not and the text does not contradict itself."""
    if given.tp is not None:
        return given
    named = [int(number) for line in text for number in _TENSOR_PARALLEL.findall(line)]
    if len(set(named)) != 1:
        return given
    report.assumed["tp"] = f"{named[0]}, which the text names {len(named)} times" if len(named) > 1 else f"{named[0]}, as the text says"
    return Given(**{**asdict(given), "tp": named[0]})


def _columns(table: Table, report: TableReport) -> dict[str, int]:
    """Kind of column -> its number; nothing for a table without layout or TFLOPs."""
    found: dict[str, int] = {}
    for number, header in enumerate(table.header):
        kind = _kind(header)
        if kind == "tflops" and kind in found:
            report.skipped.append(Finding(table.line + 1, f"two columns are TFLOPs: {table.header[found[kind]]} and {header}"))
            return {}
        if kind is not None:
            found.setdefault(kind, number)
    return found if "tflops" in found else {}


def _kind(header: str) -> str | None:
    name = re.sub(r"\(.*?\)|\[.*?\]", "", header)
    return _KINDS.get(re.sub(r"[^a-z0-9%]", "", name.lower()))


def _unit(header: str) -> str:
    """The unit in the brackets of a header such as "Time (ms)"; empty where it names none."""
    match = re.search(r"[(\[]\s*([A-Za-z]+)\s*[)\]]", header)
    return match[1].lower() if match else ""


@dataclass(frozen=True)
class _Reading:
    """One row, read by what its columns are."""

    table: Table
    row: Row
    columns: Mapping[str, int]
    given: Given

    def text(self, kind: str) -> str:
        cell = self.row.cell(self.columns.get(kind))
        return cell.text if cell else ""

    def quantity(self, kind: str) -> Quantity | None:
        column = self.columns.get(kind)
        units = _UNITS.get(kind, COUNT)
        unit = _unit(self.table.header[column]) if column is not None else ""
        found = read_quantity(self.text(kind), units, default_unit=unit if unit in units else "")
        return found if found and _LEAST <= found.value <= _MOST else None

    def number(self, kind: str) -> int | None:
        found = self.quantity(kind)
        return int(found.value) if found else None

    def either(self, kind: str, otherwise: float | None) -> float | None:
        """The cell's number; where the table has no such column, what the user gave."""
        if kind in self.columns:
            found = self.quantity(kind)
            return found.value if found else None
        return otherwise

    def gpus(self) -> float | None:
        if "gpus" not in self.columns and "nodes" in self.columns and self.given.gpus_per_node:
            nodes = self.number("nodes")
            return nodes * self.given.gpus_per_node if nodes else None
        return self.either("gpus", self.given.gpus)

    def global_batch(self) -> float | None:
        parts = [self.number(kind) for kind in ("micro_batch", "accumulation", "dp")]
        if "global_batch" not in self.columns and all(parts):
            return float(parts[0] * parts[1] * parts[2])  # type: ignore[operator]
        return self.either("global_batch", self.given.global_batch)

    def cells(self) -> dict[str, str]:
        return {kind: self.text(kind) for kind in self.columns if kind != "tflops"}


def _missing_columns(columns: Mapping[str, int], given: Given) -> list[str]:
    """What the formula needs and neither a column nor the user gives, by the name people use for it."""
    product = {"micro_batch", "accumulation", "dp"} <= set(columns)
    known = {
        "Speed": "seconds" in columns,
        "GPUs": "gpus" in columns or given.gpus is not None or ("nodes" in columns and given.gpus_per_node is not None),
        "Size": "billions" in columns or given.billions is not None,
        "GBS": "global_batch" in columns or given.global_batch is not None or product,
    }
    return [name for name, there in known.items() if not there]


def _check_row(row: _Reading, formula: Formula | None, report: TableReport, changes: dict[tuple[int, int], str]) -> None:
    line = row.row.line + 1
    if not any(cell.text for cell in row.row.cells):
        return
    report.inconsistent += [Finding(line, problem, row.cells()) for problem in _inconsistencies(row)]
    if formula is None:
        return
    problem = _unreadable(row)
    if problem is not None:
        report.skipped.append(Finding(line, problem, row.cells()))
        return
    checked = _compute(row, formula, line)
    report.rows.append(checked)
    if checked.new != (checked.old or ""):
        changes[row.row.line, row.columns["tflops"]] = checked.new


def _inconsistencies(row: _Reading) -> Iterator[str]:
    """What the row's own columns say twice, and differently."""
    gpus, dp = row.gpus(), row.number("dp")
    tp, pp = row.either("tp", row.given.tp), row.either("pp", 1)
    if gpus and dp and tp and pp and tp * pp * dp != gpus:
        yield f"TP*PP*DP={tp:.0f}*{pp:.0f}*{dp}={tp * pp * dp:.0f} != GPUs {gpus:.0f}"
    whole, micro, steps = (row.number(kind) for kind in ("global_batch", "micro_batch", "accumulation"))
    if whole and micro and dp and steps and micro * steps * dp != whole:
        yield f"MBS*GAS*DP={micro}*{steps}*{dp}={micro * steps * dp} != GBS {whole}"
    if whole and micro and dp and "accumulation" not in row.columns and whole % (micro * dp):
        yield f"GBS {whole} is no multiple of MBS*DP={micro}*{dp}={micro * dp}"


def _unreadable(row: _Reading) -> str | None:
    """Why the row's TFLOPs cannot be computed, or None."""
    columns = row.columns
    values = {
        "seconds": row.quantity("seconds"),
        "gpus": row.gpus(),
        "billions": row.either("billions", row.given.billions),
        "global_batch": row.global_batch(),
        "seq_length": row.either("seq_length", row.given.seq_length),
        "tflops": row.row.cell(row.columns["tflops"]),
    }
    for kind in (kind for kind, value in values.items() if not value):
        if kind not in columns or not row.row.cell(columns[kind]):
            return f"the row ends before {row.table.header[columns[kind]]}" if kind in columns else f"{kind} is not known"
        text, header = row.text(kind), row.table.header[columns[kind]]
        absurd = (found := read_quantity(text, _UNITS.get(kind, COUNT))) is not None and found.value > 0
        rule = f"is {text!r}, which no run has" if absurd else f"is {text!r}, not a number above 0" if text else "is empty"
        return f"{header} {rule}"
    text = row.text("tflops")
    if text.lower() not in _NO_NUMBER and read_quantity(text, _TFLOPS) is None:
        return f"{row.table.header[columns['tflops']]} is {text!r}, not a number"
    return None


def _compute(row: _Reading, formula: Formula, line: int) -> CheckedRow:
    seconds, text = row.quantity("seconds"), row.text("tflops")
    assert seconds is not None, "the row is readable"
    size = row.quantity("billions") or Quantity(row.given.billions or 0.0, 0.0, 0)
    named = {"gpus": row.gpus(), "global_batch": row.global_batch(), "seq_length": row.either("seq_length", row.given.seq_length)}

    def at(speed: float, larger: float = 0.0) -> float:
        return formula(billions=size.value + larger, seconds=speed, **named)

    # A speed shown as 0.0 may be anything above zero; half of what is shown stands for the smallest.
    fast, slow = max(seconds.value - seconds.half_unit, seconds.value / 2), seconds.value + seconds.half_unit
    computed, least, most = at(seconds.value), at(slow), at(fast)
    span = number_span(text)
    if span is None or text.lower() in _NO_NUMBER:
        return CheckedRow(line, row.cells(), None, f"{computed:.1f}", computed, least, most, "filled")
    old = read_quantity(text, _TFLOPS)
    assert old is not None, "the row is readable"
    new = text[: span[0]] + f"{computed:.{old.shown}f}" + text[span[1] :]
    low, high = old.value - old.half_unit, old.value + old.half_unit
    verdict, because = "mismatch", None
    if float(f"{computed:.{old.shown}f}") == old.value:
        verdict, new = "match", text
    elif least <= high and low <= most:
        verdict, because = "rounding", "speed"
    elif at(slow, -size.half_unit) <= high and low <= at(fast, size.half_unit):
        verdict, because = "rounding", "speed and size"
    return CheckedRow(line, row.cells(), text, new, computed, least, most, verdict, because)
