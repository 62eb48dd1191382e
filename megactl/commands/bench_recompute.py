"""`megactl bench recompute`: time and memory of GPT and BERT under each strategy of recomputation, beside published figures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.common import emit_json, say, write_text
from megactl.commands.tables import markdown_table, show_table
from megactl.errors import EXIT_INTERRUPTED, ConfigError, MegactlError, Problem
from megactl.report.published import STRATEGIES, RecomputeRow, recompute_rows

if TYPE_CHECKING:
    from megactl.config.start import StartInfo
    from megactl.engine.bench.training import Cell, Measured

MODELS = ("bert-345m", "gpt-345m")
SEQUENCES = (512, 1024, 1536, 2048)
# The published runs had 8 GPUs and a global batch of 16: as many micro-batches a replica stay with fewer or more replicas.
_PUBLISHED_GPUS, _GLOBAL_BATCH = 8, 16
_MICRO_BATCH = {"bert-345m": 2, "gpt-345m": 4}
_STRATEGY: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "sequence parallel": ("parallel.sequence_parallel=true",),
    "selective": ("memory.recompute=selective",),
    "both": ("parallel.sequence_parallel=true", "memory.recompute=selective"),
    "full": ("memory.recompute=full",),
}
_DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
SETTINGS: dict[str, tuple[str, ...]] = {
    "study": ("training.precision=fp16", "model.attention=unfused", "parallel.zero=0", *_DROPOUT),
    "megactl": ("training.precision=bf16", "model.attention=sdpa", *_DROPOUT),
}
HEADER = ("setting", "sequence", "strategy", "ms", "± %", "peak MiB", "predicted", "study's ms", "study's MiB", "ms / baseline", "study's")
_NUMBERS = (1, *range(3, len(HEADER)))
# JSON key -> attribute of what was measured.
_MEASURED = {"ms": "median_ms", "spread": "spread", "peak_mib": "peak_mib", "loss": "loss"}


@dataclass(frozen=True)
class Layout:
    """Degrees of a part of the table."""

    model: str
    tp: int
    pp: int

    @property
    def name(self) -> str:
        """As in the titles: "bert-345m, tp 2, pp 2"."""
        return f"{self.model}, tp {self.tp}, pp {self.pp}"


def recompute(
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="|".join(MODELS), help="Models (repeatable; default: both).")
    ] = None,
    layout: Annotated[
        list[str] | None, typer.Option("--layout", metavar="TPxPP", help="Degrees such as 2x2 (repeatable; default: the published ones).")
    ] = None,
    seq: Annotated[
        list[int] | None, typer.Option("--seq", "--seq-length", metavar="N", help="Sequence lengths (repeatable; default: 512 to 2048).")
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option("--strategy", metavar="|".join(STRATEGIES), help="Strategies (repeatable; default: all).")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--setting", metavar="|".join(SETTINGS),
            help="study: fp16, unfused attention; megactl: bf16, fused attention (repeatable; default: both).",
        ),
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", metavar="N", help="Timed iterations of each row, after 3 others.")] = 10,
    layers: Annotated[int | None, typer.Option("--layers", metavar="N", help="Fewer layers, to try the command out.")] = None,
    hidden: Annotated[int | None, typer.Option("--hidden", metavar="N", help="Another width, to try the command out.")] = None,
    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to compute.")] = "auto",
    nproc: Annotated[int | None, typer.Option("--nproc", metavar="N", help="Ranks to start here (default: every GPU).")] = None,
    run_dir: Annotated[str | None, typer.Option("--run-dir", metavar="DIR", help="Where rows and logs go.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw time and memory (.png, .svg or .pdf).")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the tables as Markdown.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Predict the memory of every row and train none; of 8 GPUs, or of --nproc.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:  # fmt: skip
    """Train GPT and BERT of 345M parameters under each strategy, and print time and peak memory beside the published study's.

    The study (8 V100, Megatron-LM, fp16, unfused attention, dropout 0.1) is read with micro-batch 2 (BERT) and 4 (GPT) and global batch
    16. With other numbers of GPUs the global batch changes with the replicas, so that each replica does the same work. Layouts that need
    more GPUs than there are, or do not divide them, are left out and named.

    Examples:

      megactl bench recompute

      megactl bench recompute --dry-run

      megactl bench recompute --model gpt-345m --layout 4x1 --seq 1024 --seq 2048 --plot recompute.png --markdown recompute.md

      megactl bench recompute --device cpu --nproc 2 --layout 2x1 --layers 2 --hidden 64 --seq 64 --iterations 2
    """
    wanted = _wanted(locals())
    cells, start, left_out = _cells(wanted)
    for text in left_out:
        say(text, label="left out")
    if not cells:
        raise MegactlError("no layout fits this machine", "choose degrees with --layout TPxPP, or more ranks with --nproc")
    assert start is not None
    measured, code = ([], 0) if dry_run else measure(cells, start, wanted["iterations"])
    document = _document(cells if dry_run else cells[: len(measured)], measured, wanted)
    if not json_:
        # Before a file that cannot be written: minutes of measuring are in it.
        _print(document)
    if markdown is not None and document["rows"]:
        write_text(markdown, _markdown(document))
    if plot is not None and document["rows"]:
        from megactl.report.recompute import write_recompute_plot

        write_recompute_plot(document["rows"], plot)
    if json_:
        emit_json({**document, "left_out": left_out, "exit_code": code})
    return code


def _wanted(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults. Raises ConfigError with every one that is wrong."""
    problems: list[Problem] = []
    for name, allowed in (("model", MODELS), ("strategy", STRATEGIES), ("setting", tuple(SETTINGS))):
        problems += [
            Problem(f"--{name} {value}", f"must be one of {', '.join(allowed)}", f"such as --{name} '{allowed[0]}'")
            for value in given[name] or ()
            if value not in allowed
        ]
    for name, value in (("iterations", given["iterations"]), *(("seq", value) for value in given["seq"] or ())):
        if value < 1:
            problems.append(Problem(f"--{name} {value}", "must be at least 1", "such as --iterations 10 or --seq 1024"))
    degrees = []
    for text in given["layout"] or ():
        tp, _, pp = text.lower().partition("x")
        if not (tp.isdigit() and pp.isdigit() and int(tp) * int(pp)):
            problems.append(Problem(f"--layout {text}", "must be tensor x pipeline degrees", "such as --layout 2x2"))
        else:
            degrees.append((int(tp), int(pp)))
    if given["dry_run"] and given["plot"]:
        problems.append(Problem("--plot with --dry-run", "nothing is measured that could be drawn", "use one of them"))
    if problems:
        raise ConfigError(problems)
    models = given["model"] or list(MODELS)
    published = sorted({(row.model, row.tp, row.pp) for row in recompute_rows()})
    layouts = [Layout(model, tp, pp) for model in models for tp, pp in degrees]
    return {
        **given,
        "layouts": layouts or [Layout(*key) for key in published if key[0] in models],
        "seq": given["seq"] or list(SEQUENCES),
        "strategy": given["strategy"] or list(STRATEGIES),
        "setting": given["setting"] or list(SETTINGS),
    }


def _cells(wanted: Mapping[str, Any]) -> tuple[list[Cell], StartInfo | None, list[str]]:
    """What to time, how the ranks are started, and why the rest is left out."""
    from megactl.engine.bench.training import Cell

    cells: list[Cell] = []
    left_out: list[str] = []
    start = None
    for layout in wanted["layouts"]:
        problem = _misfit(layout, wanted)
        if problem:
            left_out.append(f"{layout.name}: {problem}")
            continue
        for key, assignments in _table(layout, wanted):
            resolved, start = _prepared(layout, assignments, wanted)
            cells.append(Cell(key, resolved))
    return cells, start, left_out


def _misfit(layout: Layout, wanted: Mapping[str, Any]) -> str | None:
    """Why this machine's ranks can not be laid out so."""
    ranks, needed = _ranks(wanted), layout.tp * layout.pp
    return f"needs {needed} ranks or a multiple, and there are {ranks}" if ranks % needed else None


def _ranks(wanted: Mapping[str, Any]) -> int:
    from megactl.config.devices import count_gpus

    if wanted["dry_run"]:
        return wanted["nproc"] or _PUBLISHED_GPUS
    gpus = 0 if wanted["device"] == "cpu" else count_gpus(os.environ)
    return wanted["nproc"] or gpus or 1


def _table(layout: Layout, wanted: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """(key, settings) of each row of a layout; sequence parallelism is nothing without tensor parallelism."""
    for setting in wanted["setting"]:
        for seq_length in wanted["seq"]:
            for strategy in wanted["strategy"]:
                if layout.tp == 1 and "sequence_parallel" in " ".join(_STRATEGY[strategy]):
                    continue
                key = (layout.model, str(layout.tp), str(layout.pp), setting, str(seq_length), strategy)
                yield key, [f"training.seq_length={seq_length}", *SETTINGS[setting], *_STRATEGY[strategy]]


def _prepared(layout: Layout, assignments: Sequence[str], wanted: Mapping[str, Any]) -> tuple[Any, StartInfo]:
    from megactl.config.load import load
    from megactl.config.prepare import prepare

    replicas = _ranks(wanted) // (layout.tp * layout.pp)
    published = max(1, _PUBLISHED_GPUS // (layout.tp * layout.pp))
    micro_batch = _MICRO_BATCH[layout.model]
    global_batch = max(micro_batch * replicas, _GLOBAL_BATCH * replicas // published)
    settings = [
        f"parallel.tensor_parallel={layout.tp}", f"parallel.pipeline_parallel={layout.pp}", f"training.micro_batch_size={micro_batch}",
        f"training.global_batch_size={global_batch}", "data.mock_data=true", f"training.device={wanted['device']}",
        "model.vocab_size=" + ("30522" if layout.model.startswith("bert") else "50257"), *assignments,
    ]  # fmt: skip
    for name, key in (("layers", "model.num_layers"), ("hidden", "model.hidden_size"), ("nproc", "training.nproc")):
        settings += [f"{key}={wanted[name]}"] if wanted[name] is not None else []
    settings += [f"logging.run_dir={wanted['run_dir']}"] if wanted["run_dir"] else []
    resolved, start = prepare(load(preset=layout.model, assignments=settings), os.environ)
    if wanted["dry_run"] and wanted["device"] != "cpu":
        # What GPUs would need, also where there are none.
        resolved = replace(resolved, run=replace(resolved.run, training=replace(resolved.run.training, device="cuda")))
    return resolved, start


def measure(cells: Sequence[Cell], start: StartInfo, iterations: int) -> tuple[list[Measured], int]:
    """Every row that was done, and the exit code of the ranks. They start once, in the run directory of the first cell."""
    from megactl.config.store import claim
    from megactl.engine.bench.training import ROWS_FILE, read_rows, time_cells
    from megactl.engine.launch import launch

    first = cells[0].resolved
    run_dir = Path(first.run.logging.run_dir or "")
    say(f"{len(cells)} rows on {start.world_size} ranks; rows and logs go to {run_dir}")
    with claim(str(run_dir)):
        (run_dir / ROWS_FILE).unlink(missing_ok=True)
        code = launch(first.run, first, start, worker=time_cells(cells, iterations), stopping="this row is the last one")
    measured = read_rows(run_dir)
    if code == 0 and len(measured) < len(cells):
        say("interrupted: these are the rows that were done", label="warning")
        code = EXIT_INTERRUPTED
    return measured, code


def _document(cells: Sequence[Cell], measured: Sequence[Measured], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`measured` are the first cells', in order, or nothing (--dry-run)."""
    own_size = wanted["layers"] is None and wanted["hidden"] is None
    published = {_key(row): row for row in recompute_rows()} if own_size else {}
    rows = [_row(cell, found, published) for cell, found in zip_longest(cells, measured)]
    for row in rows:
        baseline = next((other for other in rows if _group(other) == _group(row) and other["strategy"] == "baseline"), None)
        row["time_over_baseline"] = row["ms"] / baseline["ms"] if baseline and measured else None
    return {"iterations": wanted["iterations"] if measured else 0, "rows": rows}


def _key(row: RecomputeRow) -> tuple[str, ...]:
    return (row.model, str(row.tp), str(row.pp), str(row.seq_length), row.strategy)


def _group(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in ("model", "tp", "pp", "setting", "seq_length"))


def _row(cell: Cell, measured: Measured | None, published: Mapping[tuple[str, ...], RecomputeRow]) -> dict[str, Any]:
    from megactl.commands.train import memory_of

    model, tp, pp, setting, seq_length, strategy = cell.key
    theirs = published.get((model, tp, pp, seq_length, strategy))
    base = published.get((model, tp, pp, seq_length, "baseline"))
    return {
        "model": model, "tp": int(tp), "pp": int(pp), "setting": setting, "seq_length": int(seq_length), "strategy": strategy,
        **{name: getattr(measured, attribute, None) for name, attribute in _MEASURED.items()},
        "predicted_mib": memory_of(cell.resolved)["largest_rank_bytes"] / 2**20,
        "study_ms": theirs.time_ms if theirs else None, "study_mib": theirs.peak_mib if theirs else None,
        "study_over_baseline": theirs.time_ms / base.time_ms if theirs and base else None,
    }  # fmt: skip


def _cells_of(row: Mapping[str, Any]) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        row["setting"], str(row["seq_length"]), row["strategy"], number(row["ms"], ".1f"), number(row["spread"], ".1%").removesuffix("%"),
        number(row["peak_mib"], ".0f"), number(row["predicted_mib"], ".0f"), number(row["study_ms"], ".0f"),
        number(row["study_mib"], ".0f"), number(row["time_over_baseline"], ".2f"), number(row["study_over_baseline"], ".2f"),
    ]  # fmt: skip


def _parts(document: Mapping[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """A title and its rows for each model and layout."""
    titles = dict.fromkeys(Layout(row["model"], row["tp"], row["pp"]) for row in document["rows"])
    for layout in titles:
        rows = [row for row in document["rows"] if (row["model"], row["tp"], row["pp"]) == (layout.model, layout.tp, layout.pp)]
        yield layout.name, [_cells_of(row) for row in rows]


def _print(document: Mapping[str, Any]) -> None:
    for title, rows in _parts(document):
        print(title)
        show_table(HEADER, rows, right=_NUMBERS)


def _markdown(document: Mapping[str, Any]) -> str:
    parts = [f"## {title}\n\n{markdown_table(HEADER, rows, right=_NUMBERS)}" for title, rows in _parts(document)]
    return "\n\n".join(parts) + "\n"
