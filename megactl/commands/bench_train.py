"""`megactl bench train`: the same model under several sets of options, in one start: time, memory beside the prediction, loss."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.bench_recompute import measure
from megactl.commands.common import emit_json, write_text
from megactl.commands.host_need import host_need, refuse_host_need
from megactl.commands.schema_options import dressed, parameter, setting_parameters, unknown_options
from megactl.commands.tables import markdown_table, show_table
from megactl.config.flags import all_flags, given
from megactl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megactl.config.validate import Resolved
    from megactl.engine.bench.training import Measured

HEADER = ("row", "tp x cp x dp x pp", "ms", "± %", "tokens/s", "MFU %", "peak MiB", "predicted", "ms / first", "MiB / first", "loss")
_NUMBERS = tuple(range(2, len(HEADER)))

_HELP = "\n\n".join(
    (
        "Time one model under several sets of options. All options of `megactl train` are taken; each --row adds its own to them.",
        "The ranks start once and go through the rows. Each trains on the same batch from the same weights, so the losses say whether "
        "rows compute the same thing. Memory is the largest peak of allocated bytes over the GPUs, beside what --dry-run predicts.",
    )
)
_EPILOG = """Examples:

megactl bench train --preset gpt-345m --mock-data --precision bf16 --gbs 32 --row "--tp 4" --row "--tp 4 --sp" --row "--tp 2 --pp 2 --vpp 2"

megactl bench train --preset gpt-1.3b --mock-data --gbs 16 --row "--zero 1" --row "--zero 2" --row "--zero 3 --offload optimizer"

megactl bench train --preset gpt-tiny --mock-data --device cpu --nproc 2 --iterations 3 --row "--dp 2" --row "--pp 2 --gbs 2" """


def _options() -> list[inspect.Parameter]:
    general = {
        "preset": Annotated[str | None, typer.Option("--preset", metavar="NAME", help="Start from a named model, such as gpt-345m")],
        "config": Annotated[str | None, typer.Option("--config", metavar="FILE.toml", help="Settings from a TOML file")],
        "assignments": Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any one setting; repeatable")],
        "row": Annotated[list[str] | None, typer.Option("--row", metavar="'OPTIONS'", help="Options of one row; repeatable")],
        "markdown": Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the table as Markdown")],
        "as_json": Annotated[bool, typer.Option("--json", help="Print one JSON document")],
    }
    defaults = {"as_json": False}
    found = [parameter("ctx", typer.Context, inspect.Parameter.empty)]
    found += [parameter(name, annotation, defaults.get(name)) for name, annotation in general.items()]
    return [*found, *setting_parameters()]


@dressed(_options(), help=_HELP, epilog=_EPILOG)
def train(**options: Any) -> int:
    """Run the command; the help text is `_HELP`, the options are made from the schema. Returns the exit code."""
    from megactl.engine.bench.training import Cell

    context = options.pop("ctx")
    problems = unknown_options(context, "bench train")
    if not options["row"]:
        problems.append(Problem("--row", "is not given, and there is nothing to compare", "such as --row '--tp 2' --row '--pp 2'"))
    if problems:
        raise ConfigError(problems)
    prepared = _prepared(options)
    cells = [Cell((text,), resolved) for text, (resolved, _) in prepared.items()]
    # Iterations are what is timed; the schedule of the learning rate plays no part.
    measured, code = measure(cells, next(iter(prepared.values()))[1], cells[0].resolved.run.training.iterations)
    rows = [_row(found, prepared[found.key[0]][0]) for found in measured]
    for row in rows:
        row["time_over_first"] = row["ms"] / rows[0]["ms"]
        row["memory_over_first"] = row["peak_mib"] / rows[0]["peak_mib"] if row["peak_mib"] else None
    if rows and not options["as_json"]:
        # Before a file that cannot be written: minutes of measuring are in it.
        show_table(HEADER, [_cells(row) for row in rows], right=_NUMBERS)
    if options["markdown"] is not None and rows:
        write_text(options["markdown"], markdown_table(HEADER, [_cells(row) for row in rows], right=_NUMBERS) + "\n")
    if options["as_json"]:
        emit_json({"rows": rows, "exit_code": code})
    return code


def _prepared(options: Mapping[str, Any]) -> dict[str, tuple[Resolved, Any]]:
    """(resolved run, how it starts) of each row, by its text. Raises ConfigError with every mistake of every row, each told by its row."""
    from megactl.commands.train import memory_of
    from megactl.config.load import load
    from megactl.config.prepare import prepare

    common = given(options)
    sources = {"preset": options["preset"], "config": options["config"], "assignments": options["assignments"] or ()}
    found, problems = {}, []
    for text in options["row"]:
        try:
            loaded = load(**sources, flags=common | read_options(text), environ=os.environ)
            resolved, start = prepare(loaded, os.environ)
            refuse_host_need(host_need(resolved, start, memory_of(resolved)["stages"]), resolved)
            found[text] = resolved, start
        except ConfigError as error:
            problems += [Problem(f"--row '{text}': {item.where}", item.rule, item.instead) for item in error.problems]
    worlds = {start.world_size for _, start in found.values()}
    if len(worlds) > 1:
        shown = ", ".join(f"'{text}': {start.world_size}" for text, (_, start) in found.items())
        problems.append(Problem(f"--row {shown}", "the rows need different numbers of ranks", "give --nproc, and --dp so that all use it"))
    if problems:
        raise ConfigError(problems)
    return found


def read_options(text: str) -> dict[str, tuple[str, Any]]:
    """Dotted name -> (flag as typed, value as text) of options in one text, such as "--tp 2 --sp". Raises ConfigError for unknown ones."""
    from megactl.config.load import unknown_flag

    spelled = {form: flag for flag in all_flags() for form in flag.declaration.split("/")}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    words = _words(text)
    while words:
        word, sep, value = words.pop(0).partition("=")
        flag = spelled.get(word)
        if flag is None:
            problems.append(Problem(word, *unknown_flag(word, spelled)))
            # Its value is no mistake of its own.
            while words and not words[0].startswith("--"):
                words.pop(0)
        elif flag.setting.type is bool:
            values[flag.parameter] = word == flag.name if not sep else value
        elif sep or words:
            values[flag.parameter] = value if sep else words.pop(0)
        else:
            problems.append(Problem(word, "needs a value", f"such as {word} {flag.setting.default}"))
    if problems:
        raise ConfigError(problems)
    return given(values)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError([Problem(text, f"cannot be read: {error}", "close every quotation mark")]) from error


def _row(measured: Measured, resolved: Resolved) -> dict[str, Any]:
    from megactl.commands.train import memory_of
    from megactl.config.layout import degrees
    from megactl.costmodel.flops import model_flops

    run, batch, world = resolved.run, resolved.batch.global_batch_size, measured.world_size
    seconds = measured.median_ms / 1e3
    return {
        "row": measured.key[0], "layout": degrees(run, world), "ms": measured.median_ms,
        "spread": measured.spread,
        "tokens_per_s": batch * run.training.seq_length / seconds,
        "mfu": _mfu(measured, run.training.precision, model_flops(run.model, run.training.seq_length, batch) / seconds / world),
        "peak_mib": measured.peak_mib, "predicted_mib": memory_of(resolved)["largest_rank_bytes"] / 2**20, "loss": measured.loss,
    }  # fmt: skip


def _mfu(measured: Measured, precision: str, flops_per_second: float) -> float | None:
    """Share of the GPU's peak, None where that is not known."""
    from megactl.costmodel.hardware import peak_tflops

    peak = None if measured.device == "cpu" else peak_tflops(measured.device, precision)
    return flops_per_second / 1e12 / peak if peak else None


def _cells(row: Mapping[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    layout: Sequence[int] = list(row["layout"].values())
    return [
        row["row"], " x ".join(map(str, layout)), f"{row['ms']:.1f}", f"{100 * row['spread']:.1f}", f"{row['tokens_per_s']:.0f}",
        number(row["mfu"] and 100 * row["mfu"], ".1f"), number(row["peak_mib"], ".0f"), f"{row['predicted_mib']:.0f}",
        f"{row['time_over_first']:.2f}", number(row["memory_over_first"], ".2f"), f"{row['loss']:.5f}",
    ]  # fmt: skip
