"""`megactl parse-logs`: a table out of the logs of training runs, their curves, and whether two runs differ."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megactl.commands.common import printable, say
from megactl.commands.parse_logs_request import Failed, Format, Request, Sort, Typed, checked
from megactl.errors import ConfigError, MegactlError, Problem

if TYPE_CHECKING:
    from megactl.report.logs.records import Run, Unreadable
    from megactl.report.logs.rows import Row

_SCRIPTS = "Changing many scripts at once (give the scripts in place of logs)"


def parse_logs(
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE...", help="Logs, folders of logs, or quoted patterns.")] = None,
    format_: Annotated[Format | None, typer.Option("--format", help="How rows are written (default: table).")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="A,B", help="Columns, or sets of them: all, layout, speed, memory, zero, save.")
    ] = None,
    sort: Annotated[
        Sort | None, typer.Option("--sort", help="tflops: most first; speed: fewest seconds first; mtime: newest first (default: input).")
    ] = None,
    failed: Annotated[Failed | None, typer.Option("--failed", help="Show or hide runs that have no iteration (default: show).")] = None,
    ng: Annotated[int | None, typer.Option("--ng", min=1, metavar="N", help="GPUs, in place of what the logs say.")] = None,
    ms: Annotated[float | None, typer.Option("--ms", metavar="B", help="Parameters in 10^9, in place of what the logs say.")] = None,
    seq: Annotated[
        int | None, typer.Option("--seq", min=1, metavar="N", help="Tokens in a sequence, in place of what the logs say.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="GPU the runs were on, for MFU: v100, a100, h100 ...")] = None,
    from_filename: Annotated[
        bool, typer.Option("--from-filename", help="Where a log is silent, read size, mbs, pp, dp, gas and more from its name.")
    ] = False,
    per_iteration: Annotated[bool, typer.Option("--per-iteration", help="A row an iteration line, in every format.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw loss and speed into FILE (.png, .svg or .pdf).")] = None,
    experiment: Annotated[
        str | None,
        typer.Option("--experiment", metavar="NAME", help="With --plot: the runs are of figure_13 or the like (default: by their names)."),
    ] = None,
    diff: Annotated[
        tuple[str, str] | None, typer.Option("--diff", metavar="A B", help="Compare two runs; FILE#1 is the second run of a file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the rows to FILE in place of stdout.")
    ] = None,
    rename_by: Annotated[
        str | None,
        typer.Option("--rename-by", metavar="gas", help="Put -gas-N into the names of scripts and their logs.", rich_help_panel=_SCRIPTS),
    ] = None,
    set_job_name: Annotated[
        bool, typer.Option("--set-job-name", help="Set #SBATCH --job-name to the script's name.", rich_help_panel=_SCRIPTS)
    ] = False,
    set_time: Annotated[
        str | None, typer.Option("--set-time", metavar="TIME", help="Set #SBATCH --time, e.g. 00:20:00.", rich_help_panel=_SCRIPTS)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change, and change nothing.", rich_help_panel=_SCRIPTS)
    ] = False,
    undo_file: Annotated[
        Path | None,
        typer.Option(
            "--undo-file", metavar="FILE", help="Where to write what undoes it (default: megactl-undo-TIME.json).", rich_help_panel=_SCRIPTS
        ),
    ] = None,
    undo: Annotated[
        Path | None, typer.Option("--undo", metavar="FILE", help="Take back what this undo file records.", rich_help_panel=_SCRIPTS)
    ] = None,
) -> int:
    """Make a table out of the logs of training runs: seconds an iteration, TFLOPs, layout, memory, and how each run ended.

    Reads Megatron-LM, Megatron-DeepSpeed, DeepSpeed, Hugging Face Trainer and megactl logs, also .gz and .zst; one row a run.
    What a log does not say stays empty. docs/parse-logs.md says what each column means.

    Examples:

      megactl parse-logs results/*.out

      megactl parse-logs results --sort tflops --failed hide --format markdown

      megactl parse-logs 'results/**/*.out' --from-filename --ng 64 --seq 1024 --columns layout

      megactl parse-logs run.out --per-iteration --format csv --output run.csv

      megactl parse-logs a.out b.out --plot curves.png

      megactl parse-logs --diff a.out b.out

      megactl parse-logs --set-time 00:20:00 --dry-run *.slurm
    """
    from megactl.commands import parse_logs_scripts as scripts

    wanted = scripts.Wanted(rename_by, set_job_name, set_time, dry_run, undo_file, undo)
    typed = Typed(
        files=files or [], json=json_, format=format_, columns=columns, sort=sort, failed=failed, ng=ng, ms=ms, seq=seq, gpu=gpu,
        from_filename=from_filename, per_iteration=per_iteration, plot=plot, experiment=experiment, diff=diff, output=output,
    )  # fmt: skip
    if wanted.any:
        return scripts.change_scripts(wanted, typed.files, typed.flags(), as_json=json_)
    request = checked(typed, scripts.left_over(wanted))
    if request.gpu_unknown is not None:
        say(f"--gpu {request.gpu_unknown}: its peak is not known, so MFU is n/a", label="warning")
    return _diff(typed, request) if typed.diff else _rows(typed, request)


def _rows(typed: Typed, request: Request) -> int:
    from megactl.report.logs.find import find_logs
    from megactl.report.logs.records import read_many
    from megactl.report.logs.rows import TIMERS, row_of

    found = find_logs(typed.files)
    if not found.files:
        raise ConfigError([Problem(name, why, "correct the name, or quote the pattern") for name, why in found.missing])
    for name, why in found.missing:
        say(printable(f"{name}: {why}"), label="error")
    runs, unreadable = _read(read_many(found.files, timers=TIMERS), found.walked)
    rows = _sorted([row_of(run, request.given) for run in runs], request.sort)
    if request.hide_failed:
        rows = [row for row in rows if row.speed.mean is not None]
    _warn(rows)
    _emit(rows, typed, request)
    if typed.plot is not None:
        _plot(rows, typed.plot, typed.experiment)
    return 1 if unreadable or found.missing else 0


def _read(results: Iterable[Run | Unreadable], walked: set[str]) -> tuple[list[Run], int]:
    """The runs, and how many files could not be read. A file out of a folder that is no log at all is counted, not shown."""
    from megactl.report.logs.records import Run

    runs, unreadable, others = [], 0, 0
    for result in results:
        if not isinstance(result, Run):
            say(printable(f"{result.path}: {result.reason}"), label="error")
            unreadable += 1
        elif result.file in walked and result.system == "unknown" and not len(result.iterations) and not result.events:
            others += 1
        else:
            runs.append(result)
    if others:
        some = "1 file of the folders given holds" if others == 1 else f"{others} files of the folders given hold"
        say(f"{some} nothing of a training run, left out", label="note")
    return runs, unreadable


def _sorted(rows: list[Row], sort: Sort) -> list[Row]:
    """Rows without the value that is sorted by come last, in the order given."""
    if sort is Sort.mtime:
        return sorted(rows, key=lambda row: -_mtime(row.source.file))
    key = {Sort.tflops: "tflops_per_gpu", Sort.speed: "mean_s"}.get(sort)
    if key is None:
        return rows
    sign = -1 if sort is Sort.tflops else 1
    known = [row for row in rows if row.values[key] is not None]
    return sorted(known, key=lambda row: sign * row.values[key]) + [row for row in rows if row.values[key] is None]


def _mtime(file: str) -> float:
    try:
        return os.stat(file).st_mtime
    except OSError:
        return 0.0


def _warn(rows: Sequence[Row]) -> None:
    from megactl.commands.parse_logs_view import names_of

    for row, name in zip(rows, names_of(rows), strict=True):
        for warning in row.values["warnings"]:
            say(printable(f"{name}: {warning}"), label="warning")
    lacking = [row for row in rows if row.missing]
    if lacking:
        words = ", ".join(dict.fromkeys(name for row in lacking for name in row.missing))
        say(f"no TFLOPs for {len(lacking)} of {len(rows)} runs, whose logs do not say: {words}", label="note")


def _emit(rows: Sequence[Row], typed: Typed, request: Request) -> None:
    from megactl.commands import parse_logs_view as view

    if request.form is Format.json:
        text = view.iterations_json(rows) if typed.per_iteration else view.rows_json(rows)
    else:
        table = view.iteration_table(rows, request.columns) if typed.per_iteration else view.row_table(rows, request.columns)
        if request.form is Format.table and typed.output is None and sys.stdout.isatty():
            view.show_on_terminal(table)
            return
        text = table.text(request.form)
    _write(text, typed.output)


def _write(text: str, output: Path | None) -> None:
    from megactl.storage import durable

    if output is None:
        print(text, end="", flush=True)
        return
    try:
        durable.write_output(output, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise MegactlError(f"{output}: cannot be written: {error.strerror}", "choose another place with --output") from error
    say(f"wrote {output}")


def _plot(rows: Sequence[Row], path: Path, experiment: str | None) -> None:
    from megactl.commands.parse_logs_view import names_of
    from megactl.report.logs import figures
    from megactl.report.logs.filename import experiment as experiment_in

    if experiment is None:
        carried = {experiment_in(row.source.file) for row in rows}
        experiment = carried.pop() if len(carried) == 1 else None
    if experiment in figures.EXPERIMENTS:
        figures.write_experiment(rows, experiment, path)
    else:
        figures.write_curves(rows, names_of(rows), path)
    say(f"wrote {path}")


def _diff(typed: Typed, request: Request) -> int:
    from megactl.commands.parse_logs_diff import comparison_json, comparison_text
    from megactl.report.logs.compare import compare, differing
    from megactl.report.logs.rows import row_of
    from megactl.report.logs.speed import steady

    a, b = (row_of(_one(word), request.given) for word in typed.diff or ())
    times = [steady(row.source.iterations.seconds, row.source.iterations.interrupted) for row in (a, b)]
    result, arguments = compare(*times), differing(a.source.arguments, b.source.arguments)
    show = comparison_json if request.form is Format.json else comparison_text
    _write(show(a, b, result, arguments), typed.output)
    return 0


def _one(word: str) -> Run:
    """The run that FILE or FILE#N names. A file with several runs needs its #N."""
    from megactl.report.logs.records import Run, read_many
    from megactl.report.logs.rows import TIMERS

    path, mark, number = word.rpartition("#")
    if not mark or not number.isdigit() or os.path.exists(word):
        path, number = word, ""
    runs = []
    for result in read_many([path], timers=TIMERS):
        if not isinstance(result, Run):
            raise MegactlError(f"{result.path}: {result.reason}", "name a readable log")
        runs.append(result)
    known = ", ".join(f"{path}#{run.run}" for run in runs)
    if number == "" and len(runs) > 1:
        raise MegactlError(f"{word}: holds {len(runs)} runs, and --diff compares two", f"name one of {known}")
    run = next((run for run in runs if number in ("", str(run.run))), None)
    if run is None:
        raise MegactlError(f"{word}: there is no such run in it", f"name one of {known}")
    return run
