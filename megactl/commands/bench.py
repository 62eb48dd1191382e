"""`megactl bench`: the operators megactl compiles, timed beside torch's; its other benches are added here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.bench_recompute import recompute
from megactl.commands.bench_train import train
from megactl.commands.common import emit_json, say, write_text
from megactl.commands.tables import markdown_table, show_table
from megactl.commands.typer_app import App
from megactl.errors import EXIT_INTERRUPTED, ConfigError, Problem

if TYPE_CHECKING:
    from megactl.engine.bench import Plan, Row

app = App(help="Time operators beside torch's, and training under each strategy of recomputation.")
app.command("recompute")(recompute)
app.command("train", **train.command_options)(train)

_HEADER = ("operator", "direction", "size", "shape", "type", "megactl", "eager", "compile", "copy")
_HEADER += ("GB/s", "of copy", "against torch", "verdict")
_DEVICES, _DTYPES = ("auto", "cpu", "cuda"), ("fp32", "bf16", "fp16", "fp64")


@app.command("ops")
def ops(
    op: Annotated[list[str] | None, typer.Option("--op", metavar="NAME", help="Operators to time (repeatable; default: all).")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", metavar="NAME", help="Shapes of a preset's micro-batch, or small, which fits a cache (repeatable)."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", metavar="|".join(_DTYPES), help="Types (repeatable; default: bf16, on a CPU fp32).")
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option("--micro-batch-size", "--mbs", metavar="N", help="Sequences (default: 16384 tokens, on a CPU 4096).")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="|".join(_DEVICES), help="Where to compute.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads of torch (default: torch's own).")] = None,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", help="Time of the rounds of a row, after the warm-up.")] = 1.0,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Let torch.compile compete, too.")] = True,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 where ours is slower than eager torch, differs, or failed.")] = False,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the table as Markdown.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Time megactl's operators beside eager torch, torch.compile and a plain copy of the same bytes, in turn, in one run.

    Times are medians; +- is half the distance between the quartiles. GB/s counts the bytes that any implementation must move, "of copy" is
    the share of a plain copy's speed, "against torch" how many times as fast ours is as torch's fastest way. Results are compared before
    anything is timed.

    Examples:

      megactl bench ops

      megactl bench ops --op adamw_ --op dropout_add --size gpt-345m --size small --dtype bf16

      megactl bench ops --device cuda --json --markdown ops.md --check
    """
    plan = _plan(locals())
    from megactl.engine.bench import bench_environment, run_operators

    environment = bench_environment(plan.device)
    say(f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}; operators: {environment['operators']}")
    rows: list[Row] = []

    def done(row: Row) -> None:
        rows.append(row)
        say(_progress(row))

    try:
        run_operators(plan, done)
        interrupted = False
    except KeyboardInterrupt:
        # Minutes of measuring may be done already.
        interrupted = True
        say("interrupted: these are the rows that were done", label="warning")
    if markdown is not None:
        write_text(markdown, markdown_page(rows, environment))
    if json_:
        facts = {"environment": environment, "seconds": plan.seconds, "interrupted": interrupted}
        emit_json({**facts, "rows": [row.as_dict() for row in rows]})
    else:
        _print_table(rows)
    failed = [row for row in rows if row.is_slower_than_eager or row.verdict in ("differs", "failed")]
    if check and failed:
        say(f"{len(failed)} of {len(rows)} rows are slower than eager torch, differ from it, or failed: {', '.join(map(_name, failed))}")
    return EXIT_INTERRUPTED if interrupted else int(check and bool(failed))


def _plan(given: Mapping[str, Any]) -> Plan:
    """What to time. Raises ConfigError with every option that is wrong."""
    _check(given)
    from megactl.engine.bench import OPERATORS, Plan, size_named, use_threads
    from megactl.engine.sampling import choose_device

    unknown = [name for name in given["op"] or () if name not in OPERATORS]
    if unknown:
        raise ConfigError([Problem(f"--op {name}", "no such operator", f"use one of {', '.join(OPERATORS)}") for name in unknown])
    device = choose_device(given["device"])
    if given["threads"] is not None:
        use_threads(given["threads"])
    names = given["size"] or (["gpt-345m"] if device.type == "cuda" else ["small", "gpt-345m"])
    return Plan(
        operators=given["op"] or list(OPERATORS),
        sizes=[size_named(name, device.type, given["micro_batch_size"]) for name in names],
        dtypes=given["dtype"] or (["bf16"] if device.type == "cuda" else ["fp32"]),
        device=device,
        seconds=given["seconds"],
        compile=given["compile_"],
    )


def _check(given: Mapping[str, Any]) -> None:
    dtypes, batch, threads, seconds = given["dtype"] or (), given["micro_batch_size"], given["threads"], given["seconds"]
    rules = [
        (f"--device {given['device']}", f"must be one of {', '.join(_DEVICES)}", "set auto", given["device"] in _DEVICES),
        *((f"--dtype {name}", f"must be one of {', '.join(_DTYPES)}", "leave it out for the device's own", name in _DTYPES)
          for name in dtypes),
        (f"--micro-batch-size {batch}", "must be at least 1", "leave it out for a full device", batch is None or batch >= 1),
        (f"--threads {threads}", "must be at least 1", "leave it out for torch's own number", threads is None or threads >= 1),
        (f"--seconds {seconds}", "must be above 0 and at most 600", "set 1", 0 < seconds <= 600),
    ]  # fmt: skip
    problems = [Problem(where, rule, instead) for where, rule, instead, holds in rules if not holds]
    if problems:
        raise ConfigError(problems)


def _name(row: Row) -> str:
    return " ".join(part for part in (row.op, row.variant, row.direction, row.size, row.dtype) if part)


def _progress(row: Row) -> str:
    problems = [f"{name}: {reason}" for name, reason in row.failures.items()]
    if row.verdict == "differs":
        problems += [f"{name}: relative difference {error:.1e}" for name, error in row.errors.items()]
    return f"{_name(row)}: {row.verdict}" + (f" ({'; '.join(problems)})" if problems else "")


def cells(row: Row) -> list[str]:
    """A row of the table for people, in the order of its header."""
    eager = row.fastest_eager
    compiled = "failed" if "torch.compile" in row.failures else _time(row, "torch.compile")
    fastest, share, rate = row.speed_against(row.fastest_torch), row.speed_against("copy"), row.gb_per_s("megactl")
    place = " (in cache)" if row.in_cache else ""
    return [
        f"{row.op} {row.variant}".strip(),
        row.direction,
        row.size,
        " x ".join(map(str, row.shape)) + place,
        row.dtype,
        _time(row, "megactl"),
        _time(row, eager) if eager else "failed" if row.failures else "-",
        compiled,
        _time(row, "copy"),
        f"{rate:.3g}" if rate else "-",
        f"{100 * share:.0f} %" if share else "-",
        f"{fastest:.2f}" if fastest else "-",
        row.verdict.upper() if row.verdict in ("slower than torch", "differs", "failed") else row.verdict,
    ]


def _time(row: Row, name: str | None) -> str:
    """ "0.123 ms +-2 %", or "-" without a timing."""
    timing = row.timings.get(name) if name else None
    if timing is None:
        return "-"
    value, unit = (timing.median * 1e6, "µs") if timing.median < 1e-3 else (timing.median * 1e3, "ms")
    return f"{value:.4g} {unit} ±{100 * timing.spread:.0f} %"


def _print_table(rows: Sequence[Row]) -> None:
    colours = {"slower than torch": "yellow", "differs": "red", "failed": "red", "faster": "green"}
    show_table(_HEADER, [cells(row) for row in rows], styles=[colours.get(row.verdict) for row in rows])


def markdown_page(rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    """The page for benchmarks/: the machine, the table, which of torch's ways was the fastest, what failed, what the bytes are."""
    commit = environment["commit"] or {}
    dirty = " with changes" if commit.get("dirty") else ""
    clocks = ", ".join(f"{name} {value}" for name, value in (environment["clocks"] or {}).items())
    facts = [
        ("device", environment["device"]), ("driver", environment["driver"]), ("clocks at start", clocks or None),
        ("processor", f"{environment['cpu']}, {environment['cores']} cores"), ("threads", environment["threads"]),
        ("timed by", environment["timed_by"]), ("load of the machine at start", f"{environment['load_average']:.1f} processes"),
        ("last-level cache", f"{environment['cache_bytes'] / 2**20:.1f} MiB" if environment["cache_bytes"] else None),
        ("torch", environment["torch"]), ("Python", environment["python"]), ("operators", environment["operators"]),
        ("commit", f"{commit['hash']}{dirty}" if commit else environment["source_hash"]),
    ]  # fmt: skip
    table = markdown_table(_HEADER, [cells(row) for row in rows])
    peers = {_name(row): row.fastest_torch for row in rows if row.fastest_torch}
    moved = {f"{row.op} {row.variant}".strip() + f", {row.direction}": row.moves for row in rows if row.moves}
    failures = [f"* {_name(row)}, {name}: {reason}" for row in rows for name, reason in row.failures.items()]
    parts = [
        "\n".join(f"* {name}: {value}" for name, value in facts if value is not None),
        table,
        "Torch's fastest way: " + "; ".join(f"{name}: {peer}" for name, peer in peers.items()) + ".",
        "Bytes counted: " + "; ".join(f"{name}: {text}" for name, text in moved.items()) + ".",
        *(["Failed:", "\n".join(failures)] if failures else []),
    ]
    return "\n\n".join(parts) + "\n"
