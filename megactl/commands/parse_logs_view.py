"""How `megactl parse-logs` shows what it found: headings and number formats of a row's keys, sets of columns, tables in every format."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megactl.commands.common import columns as aligned
from megactl.commands.common import printable, say, strict
from megactl.commands.tables import csv_table, markdown_table, show_table
from megactl.report.logs.records import VALUE_COLUMNS, Run
from megactl.report.logs.rows import KEYS, Row
from megactl.report.records import METRICS_FILE


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def seconds_text(value: float) -> str:
    """Digits that count: 0.661, 1.381, 128.9."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _one(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


@dataclass(frozen=True)
class Column:
    """A key of a row as people read it. Numbers stand on the right."""

    heading: str
    show: Callable[[Any], str] = _plain
    right: bool = True


COLUMNS: dict[str, Column] = {
    "file": Column("file", right=False), "run": Column("run"), "system": Column("system", right=False),
    "status": Column("status", right=False), "evidence": Column("evidence", right=False), "iterations": Column("lines"),
    "mean_s": Column("s/iter", seconds_text), "median_s": Column("median s", seconds_text),
    "steady_mean_s": Column("steady s", seconds_text), "p95_s": Column("p95 s", seconds_text),
    "model_b": Column("size B", lambda value: f"{value:.3g}"), "gpus": Column("GPUs"),
    "nodes": Column("nodes"), "dp": Column("DP"), "tp": Column("TP"), "pp": Column("PP"), "vpp": Column("VPP"), "sp": Column("SP", _yes),
    "recompute": Column("recompute", right=False), "zero": Column("ZeRO"), "bucket": Column("bucket", lambda value: f"{value:.3g}"),
    "offload": Column("offload", right=False), "partition_activations": Column("PA", _yes), "scattered_embeddings": Column("ScatEmb", _yes),
    "mbs": Column("MBS"), "gas": Column("GAS"), "gbs": Column("GBS"), "seq": Column("seq"), "tflops_per_gpu": Column("TFLOPs", _one),
    "tflops_logged": Column("logged", _one), "mfu": Column("MFU", lambda value: f"{value:.1%}"),
    "tokens_per_s": Column("tokens/s", lambda value: f"{value:.0f}"), "allocated_gib": Column("alloc GiB", _one),
    "reserved_gib": Column("reserv GiB", _one), "host_memory_gib": Column("host GiB", _one), "save_s": Column("save s", seconds_text),
    "load_s": Column("load s", seconds_text), "final_loss": Column("loss", lambda value: f"{value:.4g}"), "nan_iterations": Column("NaN"),
    "skipped_iterations": Column("skipped"), "started_at": Column("started", right=False),
}  # fmt: skip

SETS: dict[str, tuple[str, ...]] = {
    "all": tuple(COLUMNS),
    "layout": ("file", "gpus", "model_b", "tp", "pp", "dp", "gas", "mbs", "gbs", "mean_s", "tflops_per_gpu"),
    "speed": ("file", "status", "iterations", "mean_s", "median_s", "steady_mean_s", "p95_s", "tokens_per_s", "tflops_per_gpu", "mfu"),
    "memory": ("file", "status", "allocated_gib", "reserved_gib", "host_memory_gib", "model_b", "gpus", "mbs", "recompute", "offload"),
    "zero": ("file", "zero", "bucket", "offload", "partition_activations", "scattered_embeddings", "recompute", "mean_s", "tflops_per_gpu"),
    "save": ("nodes", "model_b", "save_s", "load_s"),
}  # fmt: skip
"""Names that stand for several columns."""

DEFAULT = (
    "file", "status", "iterations", "mean_s", "steady_mean_s", "tflops_per_gpu", "tflops_logged", "mfu", "model_b", "gpus", "tp", "pp",
    "vpp", "dp", "zero", "mbs", "gas", "gbs", "reserved_gib", "final_loss",
)  # fmt: skip
# What a narrow terminal leaves out first.
_DROPPABLE = (
    "reserved_gib",
    "vpp",
    "zero",
    "final_loss",
    "tflops_logged",
    "gas",
    "steady_mean_s",
    "mbs",
    "model_b",
    "mfu",
    "dp",
    "pp",
    "tp",
)
_STYLES = {"completed": None, None: None, "time-limit": "yellow", "cancelled": "yellow"}
_ALWAYS = ("file", "status", "iterations", "mean_s", "tflops_per_gpu")


def default_columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns shown where none are asked for; one that no run has a value in is left out."""
    return tuple(key for key in DEFAULT if key in _ALWAYS or any(row.values[key] is not None for row in rows))


def names_of(rows: Sequence[Row]) -> list[str]:
    """A short name for each row: its path without the folder all share, and `#1` for the second run of a file and so on."""
    # Every run directory calls its file the same: it is known by its folder.
    files = [row.source.file.removesuffix(f"/{METRICS_FILE}") for row in rows]
    counts = Counter(files)
    parents = [file.split("/")[:-1] for file in counts]
    depth = next(
        (place for place, level in enumerate(zip(*parents, strict=False)) if len(set(level)) > 1), min(map(len, parents), default=0)
    )
    short = {file: "/".join(file.split("/")[depth:]) for file in counts}
    names = []
    for row, file in zip(rows, files, strict=True):
        several = counts[file] > 1 or row.source.run > 0
        names.append(f"{short[file]}#{row.source.run}" if several else short[file])
    return names


@dataclass(frozen=True)
class Table:
    """Rows ready to be shown. `cells` makes them for people, `exact` for programs (of millions only one may be made); `below` are lines
    under the table.

    `droppable` are columns that a narrow terminal may leave out, the first of them first.
    """

    keys: tuple[str, ...]
    header: tuple[str, ...]
    right: tuple[int, ...]
    cells: Callable[[], list[list[str | None]]]
    exact: Callable[[], Iterable[Sequence[str | None]]]
    below: Sequence[str] = ()
    styles: Sequence[str | None] = ()
    droppable: Sequence[str] = ()

    def text(self, form: str) -> str:
        """The table as "csv" (keys as header, every digit), "markdown" or "table"."""
        if form == "csv":
            return csv_table(self.keys, self.exact())
        if form == "markdown":
            return markdown_table(self.header, self.cells(), right=self.right) + "\n"
        text = io.StringIO()
        show_table(self.header, self.cells(), right=self.right, stream=text)
        return text.getvalue() + "".join(f"{line}\n" for line in self.below)


def show_on_terminal(table: Table) -> None:
    """Print a table in colour, without as many droppable columns as it takes to fit the width, and say which."""
    room, dropped = shutil.get_terminal_size().columns, []
    cells = [
        [_tail(cell, room // 4) if key == "file" else cell for key, cell in zip(table.keys, row, strict=True)] for row in table.cells()
    ]
    widths = [max(len(name), *(len(row[place] or "-") for row in cells), 0) + 3 for place, name in enumerate(table.header)]
    for key in table.droppable:
        if sum(widths) > room and key in table.keys:
            widths[table.keys.index(key)] = 0
            dropped.append(key)
    kept = [place for place, key in enumerate(table.keys) if key not in dropped]
    right = [index for index, place in enumerate(kept) if place in table.right]
    shown = [[row[place] for place in kept] for row in cells]
    show_table([table.header[place] for place in kept], shown, right=right, styles=table.styles)
    for line in table.below:
        print(line)
    if dropped:
        say(f"left out, for the terminal is {room} wide: {', '.join(dropped)} (--columns all shows everything)", label="note")


def _tail(name: str | None, width: int) -> str:
    """The end of a long file name: runs differ there."""
    text, width = name or "-", max(24, width)
    return text if len(text) <= width else f"…{text[1 - width :]}"


def row_table(rows: Sequence[Row], chosen: Sequence[str]) -> Table:
    """A row a run. Without chosen columns the default ones, and the evidence of how each run ended below."""
    keys = tuple(chosen) or default_columns(rows)
    named = list(zip(names_of(rows), rows, strict=True))
    return Table(
        keys=keys,
        header=tuple(COLUMNS[key].heading for key in keys),
        right=tuple(index for index, key in enumerate(keys) if COLUMNS[key].right),
        cells=lambda: [[name if key == "file" else cell(key, row.values[key]) for key in keys] for name, row in named],
        exact=lambda: ([_exactly(row.values[key]) for key in keys] for row in rows),
        below=() if chosen else evidence_lines(rows),
        styles=[_STYLES.get(row.values["status"], "red") for row in rows],
        droppable=() if chosen else _DROPPABLE,
    )


def rows_json(rows: Sequence[Row]) -> str:
    """A list of rows with every key."""
    return json_text([{key: row.values[key] for key in KEYS} for row in rows])


def cell(key: str, value: Any) -> str | None:
    """A value as a table for people has it; None where it is not known."""
    if key == "status" and value is None:
        return "unknown"
    return None if value is None else COLUMNS[key].show(value)


def _exactly(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return repr(value) if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def json_text(document: Any) -> str:
    """One JSON document with a line end; NaN is null."""
    text = json.dumps(strict(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name need not be text: its stray bytes become escapes, which JSON has for them.
    return text.encode("utf-8", "backslashreplace").decode()


def evidence_lines(rows: Sequence[Row]) -> list[str]:
    """For every run that did not simply complete, what its log says of its end."""
    told = [(name, row.values) for name, row in zip(names_of(rows), rows, strict=True) if row.values["status"] != "completed"]
    return aligned([(printable(name), values["status"] or "unknown", printable(values["evidence"])[:160]) for name, values in told])


ITERATION_KEYS = ("file", "run", "iteration", "line", *VALUE_COLUMNS, "loss")


def iteration_rows(runs: Iterable[Run]) -> Iterator[tuple[Any, ...]]:
    """A row for every iteration line, in the order of ITERATION_KEYS; NaN is None."""
    for run in runs:
        columns = run.iterations
        values = [getattr(columns, name) for name in (*VALUE_COLUMNS, "loss")]
        for index in range(len(columns)):
            numbers = (None if math.isnan(value[index]) else value[index] for value in values)
            yield (run.file, run.run, columns.iteration[index], columns.line[index] or None, *numbers)


def iteration_table(rows: Sequence[Row], chosen: Sequence[str]) -> Table:
    """A row an iteration line. Columns that no line has are left out where none were chosen."""
    runs = [row.source for row in rows]
    keys = tuple(chosen) or tuple(
        key for key in ITERATION_KEYS if key not in (*VALUE_COLUMNS, "loss") or any(_has(run, key) for run in runs)
    )
    places = [ITERATION_KEYS.index(key) for key in keys]
    return Table(
        keys=keys,
        header=keys,
        right=tuple(index for index, key in enumerate(keys) if key != "file"),
        cells=lambda: [[None if row[place] is None else _plain(row[place]) for place in places] for row in iteration_rows(runs)],
        exact=lambda: ([_exactly(row[place]) for place in places] for row in iteration_rows(runs)),
    )


def iterations_json(rows: Sequence[Row]) -> str:
    """A list of iteration lines with every key."""
    return json_text([dict(zip(ITERATION_KEYS, row, strict=True)) for row in iteration_rows(row.source for row in rows)])


def _has(run: Run, key: str) -> bool:
    return any(not math.isnan(value) for value in getattr(run.iterations, key))
