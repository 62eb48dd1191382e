"""What was typed to `megactl parse-logs`, and what is asked for with it: every contradiction is found before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from megactl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megactl.report.logs.rows import Given


class Format(StrEnum):
    """How the rows are written."""

    table = "table"
    markdown = "markdown"
    csv = "csv"
    json = "json"


class Sort(StrEnum):
    """Order of the rows."""

    input = "input"
    tflops = "tflops"
    speed = "speed"
    mtime = "mtime"


class Failed(StrEnum):
    """What becomes of runs without an iteration."""

    show = "show"
    hide = "hide"


@dataclass(frozen=True)
class Typed:
    """The options for reading logs as they were typed; None is what was not."""

    files: Sequence[str]
    json: bool
    format: Format | None
    columns: str | None
    sort: Sort | None
    failed: Failed | None
    ng: int | None
    ms: float | None
    seq: int | None
    gpu: str | None
    from_filename: bool
    per_iteration: bool
    plot: Path | None
    experiment: str | None
    diff: tuple[str, str] | None
    output: Path | None

    def flags(self) -> list[str]:
        """The flags that were typed, --json apart."""
        return [
            f"--{name.replace('_', '-')}"
            for name, value in vars(self).items()
            if value not in (None, False) and name not in ("files", "json")
        ]


@dataclass(frozen=True)
class Request:
    """What is to be done. `columns` is empty where none were named; `gpu_unknown` is a GPU whose peak is not known."""

    form: Format
    columns: tuple[str, ...]
    sort: Sort
    hide_failed: bool
    given: Given
    gpu_unknown: str | None


def checked(typed: Typed, others: Sequence[Problem] = ()) -> Request:
    """The request. Raises one ConfigError with every mistake, `others` among them."""
    from megactl.costmodel.hardware import find_gpu
    from megactl.report.logs.rows import Given

    problems = [*others, *_plot_problems(typed), *(_diff_problems(typed) if typed.diff else _row_problems(typed))]
    if typed.ms is not None and not 0 < typed.ms < 1e9:
        problems.append(Problem(f"--ms {typed.ms:g}", "must be a size above 0 in billions of parameters", "give --ms 52 for 52B"))
    if typed.json and typed.format not in (None, Format.json):
        problems.append(Problem(f"--format {typed.format}", "contradicts --json", "leave one of the two out"))
    form = Format.json if typed.json else typed.format or _form_of(typed.output)
    columns = _columns(typed, problems)
    if typed.columns is not None and form is Format.json and not typed.diff:
        problems.append(Problem(f"--columns {typed.columns}", "says nothing with JSON, which has every key", "use --format csv for some"))
    if problems:
        raise ConfigError(problems)
    unknown = typed.gpu if typed.gpu is not None and find_gpu(typed.gpu) is None else None
    given = Given(ng=typed.ng, ms=typed.ms, seq=typed.seq, gpu=typed.gpu, from_filename=typed.from_filename)
    return Request(form, columns, typed.sort or Sort.input, typed.failed is Failed.hide, given, unknown)


def _form_of(output: Path | None) -> Format:
    """The format that the ending of --output asks for."""
    return {".csv": Format.csv, ".json": Format.json, ".md": Format.markdown}.get(output.suffix.lower() if output else "", Format.table)


def _row_problems(typed: Typed) -> list[Problem]:
    if typed.files:
        return []
    return [Problem("FILE...", "is missing", "name logs, folders or quoted patterns: megactl parse-logs results/*.out")]


def _diff_problems(typed: Typed) -> list[Problem]:
    clash = set(typed.flags()) & {"--columns", "--sort", "--failed", "--per-iteration", "--plot", "--experiment"}
    problems = [Problem(flag, "says nothing with --diff", "leave one of the two out") for flag in sorted(clash)]
    if typed.files:
        problems.append(Problem(" ".join(typed.files[:3]), "stands beside --diff A B, which takes two runs", "give just the two"))
    if typed.format in (Format.csv, Format.markdown):
        problems.append(Problem(f"--format {typed.format}", "is no form of --diff", "use table or json"))
    return problems


def _plot_problems(typed: Typed) -> list[Problem]:
    if typed.plot is None and typed.experiment is None:
        return []
    from megactl.config.names import nearest
    from megactl.report.drawing import ENDINGS
    from megactl.report.logs.figures import EXPERIMENTS

    problems = []
    if typed.plot is not None and typed.plot.suffix.lower() not in ENDINGS:
        problems.append(Problem(f"--plot {typed.plot}", "is of no kind that is drawn", f"end the name in {', '.join(ENDINGS)}"))
    if typed.plot is not None and typed.plot == typed.output:
        problems.append(Problem(f"--output {typed.output}", "is the file of --plot", "name two files"))
    if typed.experiment is not None and typed.experiment not in EXPERIMENTS:
        close = nearest(typed.experiment, EXPERIMENTS)
        instead = f"did you mean {close}?" if close else f"use one of {', '.join(EXPERIMENTS)}"
        problems.append(Problem(f"--experiment {typed.experiment}", "is not known", instead))
    if typed.experiment is not None and typed.plot is None:
        problems.append(Problem(f"--experiment {typed.experiment}", "is a kind of plot", "add --plot FILE"))
    return problems


def _columns(typed: Typed, problems: list[Problem]) -> tuple[str, ...]:
    if typed.columns is None:
        return ()
    from megactl.commands.parse_logs_view import COLUMNS, ITERATION_KEYS, SETS
    from megactl.config.names import nearest

    known, sets = (ITERATION_KEYS, {}) if typed.per_iteration else (tuple(COLUMNS), SETS)
    chosen: list[str] = []
    for word in [word.strip() for word in typed.columns.split(",")]:
        if word in sets:
            chosen += sets[word]
        elif word in known:
            chosen.append(word)
        else:
            # People shorten names: tflops is nearer to tflops_per_gpu than any count of letters says.
            close = next((name for name in known if word and name.startswith(word.lower())), None) or nearest(word, [*known, *sets])
            instead = f"did you mean {close}?" if close else f"use some of {', '.join([*sets, *known])}"
            problems.append(Problem(f"--columns {word or repr(typed.columns)}", "is no column", instead))
    return tuple(dict.fromkeys(chosen))
