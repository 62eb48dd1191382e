#!/usr/bin/env python3
"""Times megactl's training step beside other programs that train the same model, in turn, on one machine.

    PYTHONPATH=. python3 scripts/bench_gpu/speed.py --output speed [--rounds 3] [--iterations 13] [--warm-up 3] \\
        --ours "megactl=--preset gpt-345m --vocab 50304 --mock-data --precision bf16 --mbs 16 --gbs 16" \\
        --peer "plain PyTorch=python3 peers/plain_torch.py --mbs 16 --attn cudnn"

Every round starts each contestant once as a process of its own, in an order that rotates. --ours NAME=FLAGS runs `megactl train FLAGS`;
without it, gpt-345m with 16 sequences. --peer NAME=COMMAND runs a command that prints one JSON line with "s_per_iter" (seconds of the
median iteration after its own warm-up); "tok_s" and "peak_GiB" are taken where they are there. Both may be given several times.

Of megactl's run the seconds of each iteration are read from metrics.jsonl, the first --warm-up ones are dropped, and the median is
taken: what the peers do by themselves, so give them as many iterations. A contestant that fails is a row that says so.

Writes OUTPUT.md (the table) and OUTPUT.jsonl (a line for each run). Ratios are taken between medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megactl.report.records import METRICS_FILE, read_records, read_summary

OURS = "megactl=--preset gpt-345m --vocab 50304 --mock-data --precision bf16 --mbs 16 --gbs 16"
GIB = 2**30


@dataclass(frozen=True)
class Contestant:
    """What is started. `ours`: command is the flags of `megactl train`."""

    name: str
    command: str
    ours: bool


@dataclass(frozen=True)
class Outcome:
    """One run: seconds of the median iteration, tokens a second, peak memory of a GPU in GiB; or why there is none."""

    name: str
    round: int
    seconds: float | None = None
    tokens_per_s: float | None = None
    peak_gib: float | None = None
    problem: str | None = None


def run_contestant(contestant: Contestant, turn: int, arguments: argparse.Namespace) -> Outcome:
    """Start it, wait, and read its figures."""
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        run_dir = Path(folder) / "run"
        command = contestant.command
        if contestant.ours:
            length = f"--iterations {arguments.iterations} --log-interval {arguments.iterations} --run-dir {shlex.quote(str(run_dir))}"
            command = f"{shlex.quote(sys.executable)} -m megactl train {contestant.command} {length}"
        print(f"round {turn}: {contestant.name}: {command}", file=sys.stderr, flush=True)
        code, output = execute(command, arguments.timeout)
        try:
            if code != 0:
                raise ValueError(f"exit code {code}: {output.strip().splitlines()[-1] if output.strip() else 'no output'}")
            figures = read_run(run_dir, arguments.warm_up) if contestant.ours else read_peer(output)
        except (ValueError, KeyError, TypeError, OSError) as error:
            print(output[-4000:], file=sys.stderr)
            return Outcome(contestant.name, turn, problem=f"{type(error).__name__}: {error}")
        return Outcome(contestant.name, turn, **figures)


def execute(command: str, timeout: float) -> tuple[int, str]:
    """(exit code, everything printed) of a shell command; at the timeout its whole process group is ended, and the code is 124."""
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return 124, f"{output}\nended after {timeout:.0f} s"


def read_run(run_dir: Path, warm_up: int) -> dict[str, float | None]:
    """The figures of a megactl run. Raises ValueError where no iteration is left after the warm-up."""
    steps = read_records(run_dir / METRICS_FILE).steps[warm_up:]
    if not steps:
        raise ValueError(f"no iteration after the first {warm_up}")
    peak = (read_summary(run_dir) or {}).get("peak_memory_gb")
    tokens = steps[0]["tokens_per_s"] * steps[0]["seconds"]
    seconds = statistics.median(step["seconds"] for step in steps)
    return {"seconds": seconds, "tokens_per_s": tokens / seconds, "peak_gib": peak * 1e9 / GIB if peak else None}


def read_peer(output: str) -> dict[str, float | None]:
    """The figures in the last JSON line with s_per_iter. Raises ValueError where there is none."""
    for line in reversed(output.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "s_per_iter" in found:
            return {"seconds": float(found["s_per_iter"]), "tokens_per_s": found.get("tok_s"), "peak_gib": found.get("peak_GiB")}
    raise ValueError("printed no JSON line with s_per_iter")


def table(contestants: list[Contestant], outcomes: list[Outcome]) -> str:
    """Markdown: a row a contestant, with how many times as fast it is as each of the others named first."""
    seconds = {item.name: [o.seconds for o in outcomes if o.name == item.name and o.seconds is not None] for item in contestants}
    peers = [item.name for item in contestants if not item.ours and seconds[item.name]]
    header = ["contestant", "s/iteration", "each round", "tokens/s", "peak GiB", *(f"speed / {name}" for name in peers)]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for item in contestants:
        own = [o for o in outcomes if o.name == item.name]
        if not seconds[item.name]:
            rows.append([item.name, f"failed: {own[-1].problem}", *[""] * (len(header) - 2)])
            continue
        middle = statistics.median(seconds[item.name])
        tokens = statistics.median([o.tokens_per_s for o in own if o.tokens_per_s] or [0.0])
        peak = max((o.peak_gib for o in own if o.peak_gib), default=None)
        each = ", ".join("failed" if o.seconds is None else f"{o.seconds:.4f}" for o in own)
        ratios = [f"{statistics.median(seconds[name]) / middle:.3f}" for name in peers]
        rows.append([item.name, f"{middle:.4f}", each, f"{tokens:,.0f}", "-" if peak is None else f"{peak:.1f}", *ratios])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def page(contestants: list[Contestant], outcomes: list[Outcome], facts: dict[str, Any]) -> str:
    """The table with the machine and the commands."""
    commands = [f"* {item.name}: `{'megactl train ' if item.ours else ''}{item.command}`" for item in contestants]
    machine = [f"* {name}: {value}" for name, value in facts.items()]
    return "\n".join([*machine, "", table(contestants, outcomes), *commands]) + "\n"


def facts() -> dict[str, Any]:
    """The machine, in a process of its own: this one must not hold memory of the GPU."""
    code = (
        "import json; from megactl.engine.environment import collect_environment as c; e = c();"
        "print(json.dumps({k: e[k] for k in ('gpus', 'driver', 'cpu', 'cores', 'torch', 'python', 'commit', 'source_hash')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rounds; 1 where a contestant never gave a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", action="append", metavar="NAME=FLAGS", help=f"default: {OURS}")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=13)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds of one run")
    parser.add_argument("--output", type=Path, required=True, help="path of the two files, without a suffix")
    arguments = parser.parse_args(argv)
    contestants = []
    for text, ours in [*((text, True) for text in arguments.ours or [OURS]), *((text, False) for text in arguments.peer)]:
        name, equals, command = text.partition("=")
        if not (name and equals and command):
            parser.error(f"{text!r}: give NAME=COMMAND")
        contestants.append(Contestant(name, command, ours))
    if len({item.name for item in contestants}) < len(contestants):
        parser.error("two contestants have one name")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    machine = facts()
    with arguments.output.with_name(arguments.output.name + ".jsonl").open("w") as raw:
        for turn in range(arguments.rounds):
            shift = turn % len(contestants)
            for contestant in contestants[shift:] + contestants[:shift]:
                outcomes.append(run_contestant(contestant, turn + 1, arguments))
                raw.write(json.dumps(asdict(outcomes[-1])) + "\n")
                raw.flush()
            # After each round, so that a run that is cut short leaves a page.
            arguments.output.with_name(arguments.output.name + ".md").write_text(page(contestants, outcomes, machine))
    print(table(contestants, outcomes))
    return int(any(all(o.seconds is None for o in outcomes if o.name == item.name) for item in contestants))


if __name__ == "__main__":
    raise SystemExit(main())
