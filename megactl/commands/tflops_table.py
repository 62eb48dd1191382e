"""`megactl tflops --table`: the TFLOPs column of the tables in a file computed again, and what the rows say about themselves."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megactl.commands.architecture_options import read_request
from megactl.commands.common import emit_json
from megactl.errors import ConfigError, MegactlError, Problem

if TYPE_CHECKING:
    from megactl.commands.tflops_values import Reader
    from megactl.report.seed_table import CheckedRow, Finding, Given, TableReport

_TAKEN = ("training.seq_length", "training.global_batch_size", "parallel.tensor_parallel")
_NOT_TAKEN = ("sec", "time_ms", "nodes", "gas", "gpu", "peak")
_STDIN = "-"
_SHOWN = {
    "gpus": "GPUs", "nodes": "nodes", "billions": "size", "global_batch": "GBS", "micro_batch": "MBS", "accumulation": "GAS",
    "seconds": "speed", "seq_length": "seq", "tp": "TP", "pp": "PP", "dp": "DP",
}  # fmt: skip


def run_table(file: str, reader: Reader, settings: Mapping[str, Any], *, in_place: bool, as_json: bool) -> int:
    """Regenerate `file` ("-": stdin) to stdout, or in place; print the lists. Returns the exit code."""
    from megactl.costmodel.flops import seed_tflops
    from megactl.report.seed_table import regenerate

    given, assumed = _given(file, reader, settings, in_place=in_place)
    data = _read(file)
    text = data.decode("utf-8", "surrogateescape")
    factor = assumed.pop("factor_used")

    def formula(**values: Any) -> float:
        return seed_tflops(**values, factor=factor)

    report = regenerate(text, formula, given)
    if not report.tables:
        raise MegactlError(
            f"{_named(file)}: no table has a TFLOPs column", "name the column TFlops, and put a line of dashes below the header"
        )
    assumed |= report.assumed
    changed = report.text.encode("utf-8", "surrogateescape")
    if in_place and changed != data:
        _write(Path(file), changed)
    if as_json:
        emit_json(_plain({"file": file, "in_place": in_place, "assumed": assumed, **report.as_dict()}))
        return 0
    if not in_place:
        sys.stdout.flush()
        sys.stdout.buffer.write(changed)
        sys.stdout.flush()
    print_report(report, _named(file), assumed, sys.stdout if in_place else sys.stderr)
    return 0


def _given(file: str, reader: Reader, settings: Mapping[str, Any], *, in_place: bool) -> tuple[Given, dict[str, Any]]:
    """What the options say for all tables, and what is assumed. Raises ConfigError holding every mistake."""
    from megactl.report.seed_table import Given

    assumed: dict[str, Any] = {}
    factor, _ = reader.recompute(assumed)
    size, gpus, per_node = reader.billions(), reader.count("ng"), reader.count("gpus_per_node")
    if in_place and file == _STDIN:
        reader.problems.append(Problem("--in-place", "stdin cannot be written", "leave --in-place out, or name a file"))
    for name in _NOT_TAKEN:
        if reader.options.get(name) is not None:
            reader.problems.append(Problem(reader.where(name), "is read from each row of the tables", "leave it out with --table"))
    try:
        request = read_request(settings, needs_model=False)
    except ConfigError as error:
        raise ConfigError([*reader.problems, *error.problems]) from None
    for name, origin in request.origins.items():
        if request.is_set(name) and name not in _TAKEN and origin.startswith(("flag", "preset")):
            typed = origin.removeprefix("flag ").replace("preset ", "--preset ")
            problem = Problem(typed, "is not used with --table, whose rows name sizes", "leave it out")
            reader.problems += [problem] if problem not in reader.problems else []
    if reader.problems:
        raise ConfigError(reader.problems)
    if not request.is_set("training.seq_length"):
        assumed = {"seq": request.seq_length, **assumed}
    batch, tp = request.given("training.global_batch_size"), request.given("parallel.tensor_parallel")
    assumed["factor_used"] = factor
    return Given(request.seq_length, gpus, per_node, batch, size.value if size else None, tp), assumed


def _named(file: str) -> str:
    return "stdin" if file == _STDIN else file


def _read(file: str) -> bytes:
    try:
        data = sys.stdin.buffer.read() if file == _STDIN else _read_file(Path(file))
    except OSError as error:
        raise MegactlError(f"{_named(file)}: cannot be read: {error.strerror}", "name a Markdown file, or - for stdin") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in data:
        raise MegactlError(f"{_named(file)}: is not UTF-8 text", "name a Markdown file; convert UTF-16 with `iconv -f UTF-16 -t UTF-8`")
    return data


def _read_file(path: Path) -> bytes:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise MegactlError(f"{path}: is not a plain file", "use `--table -` to read a pipe")
    return path.read_bytes()


def _write(path: Path, data: bytes) -> None:
    """Replace the file at one moment, with its permissions; of a link, the file it leads to."""
    from megactl.storage.durable import replace_file

    target = path.resolve()
    try:
        replace_file(target, data, f"megactl-{os.getpid()}", mode=stat.S_IMODE(target.stat().st_mode))
    except OSError as error:
        failed = MegactlError(f"{path}: cannot be written: {error.strerror}", "leave --in-place out and redirect stdout")
        failed.exit_code = 1
        raise failed from error


def _plain(value: Any) -> Any:
    """Bytes that were no UTF-8 as JSON can have them: a replacement character each."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def print_report(report: TableReport, name: str, assumed: Mapping[str, Any], stream: TextIO) -> None:
    """The three lists and what was left out, for people."""
    changed = sum(row.old != row.new for row in report.rows)
    tables = f"{report.tables} table{'s' * (report.tables != 1)} with TFLOPs"
    print(f"{name}: {tables}, {len(report.rows)} rows computed, {changed} cells changed", file=stream)
    if assumed:
        print("assumed: " + ", ".join(f"{'TP' if key == 'tp' else f'--{key}'} {value}" for key, value in assumed.items()), file=stream)
    _print_rows("rows that do not match", report.by_verdict("mismatch"), stream)
    _print_rows("rows explained by rounding", report.by_verdict("rounding"), stream)
    _print_findings("rows whose own columns disagree", report.inconsistent, stream)
    if report.by_verdict("filled"):
        _print_rows("empty cells that were filled", report.by_verdict("filled"), stream)
    if report.skipped:
        _print_findings("not computed", report.skipped, stream)


def _kinds(rows: Sequence[CheckedRow | Finding]) -> list[str]:
    return [kind for kind in _SHOWN if any(row.cells.get(kind) for row in rows)]


def _print_rows(title: str, rows: Sequence[CheckedRow], stream: TextIO) -> None:
    from megactl.commands.tables import show_table

    print(f"\n{title}: {len(rows) or 'none'}", file=stream)
    if not rows:
        return
    kinds = _kinds(rows)
    header = ("line", *(_SHOWN[kind] for kind in kinds), "was", "is", "range")
    cells = [
        [str(row.line), *(row.cells.get(kind) for kind in kinds), row.old, row.new, f"{row.least:.2f} to {row.most:.2f}"] for row in rows
    ]
    show_table(header, cells, right=range(len(header) - 1), stream=stream)


def _print_findings(title: str, findings: Sequence[Finding], stream: TextIO) -> None:
    from megactl.commands.tables import show_table

    print(f"\n{title}: {len(findings) or 'none'}", file=stream)
    if findings:
        show_table(("line", "problem"), [[str(finding.line), finding.problem] for finding in findings], right=(0,), stream=stream)
