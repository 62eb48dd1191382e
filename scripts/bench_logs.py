#!/usr/bin/env python3
"""Times the reading of large logs beside the perl one-liner that people keep in their notes, in turns, on the same files.

    .venv/bin/python scripts/bench_logs.py [--megabytes 2000] [--rounds 5] [--folder /tmp] [--output results.jsonl]

Makes two files (and removes them): `mixed`, a tenth iteration and timer lines and the rest what libraries print, and `dense`, nothing
but iteration and timer lines. perl sums the time per iteration; megactl does what parse-logs does: it reads every field of every
iteration, the timers that a row needs, and whatever else it knows.
Each contestant is a process of its own, with its start: wall time, processor time and largest resident memory are the system's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PERL = 'm|elapsed time per iteration .ms.: ([\\d\\.]+)| && do {$x+=$1; $c++}; END { print $c ? int($x/$c/1000) : "fail" }'
READ = (
    "import sys; from megactl.report.logs.reading import read_runs; from megactl.report.logs.rows import TIMERS; "
    "runs = read_runs(sys.argv[1], timers=TIMERS); columns = runs[0].iterations; "
    "print(int(sum(columns.seconds) / len(columns)))"
)
TIMERS = [
    "forward-compute",
    "forward-recv",
    "backward-compute",
    "backward-send",
    "backward-send-forward-recv",
    "backward-params-all-reduce",
    "backward-embedding-all-reduce",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-copy-main-to-model-params",
    "optimizer",
    "batch-generator",
]


def iteration_lines(number: int, draw: random.Random) -> str:
    """One iteration line of Megatron-LM 2.4 and its timers."""
    timers = " | ".join(f"{name}: {draw.uniform(1, 90000):.2f}" for name in TIMERS)
    return (
        f" iteration {number:8d}/ 9999999 | consumed samples: {number * 1024:12d} |"
        f" elapsed time per iteration (ms): {draw.uniform(120000, 140000):.1f} | learning rate: {draw.uniform(1e-5, 2e-4):.3E} |"
        f" global batch size:  1024 | lm loss: {draw.uniform(2, 12):.6E} | loss scale: 16384.0 | grad norm: {draw.uniform(0.1, 9):.3f} |"
        f" number of skipped iterations:   0 | number of nan iterations:   0 |\ntime (ms) | {timers}\n"
    )


def other_line(draw: random.Random) -> str:
    """A line as libraries print them around the training."""
    host, pid, gpu = f"r{draw.randrange(1, 9)}i{draw.randrange(9)}n{draw.randrange(9)}", draw.randrange(1000, 99999), draw.randrange(4)
    kinds = (
        lambda: f"{host}:{pid}:{pid + 200} [{gpu}] NCCL INFO Channel {gpu:02d} : {gpu}[1a000] -> {gpu + 1}[1c000] via P2P/IPC/read",
        lambda: f"{host}:{pid}:{pid + 200} [{gpu}] NCCL INFO comm 0x{pid:x}{pid:x} rank {gpu} nranks 16 cudaDev {gpu} busId 1a000",
        lambda: f"[2026-11-21 10:{pid % 60:02d}:{gpu:02d},{pid % 1000:03d}] [INFO] [utils.py:{pid % 900}:helper] rank {gpu} bucket {pid}",
        lambda: f" > loading shuffle-idx mapping from /scratch/data/part_{pid}_text_document_indexmap_{pid}ns_1024sl_1234s_shuffle_idx.npy",
        lambda: (
            f"[default{gpu}]:/usr/lib/python3/site-packages/torch/nn/functional.py:{pid}: UserWarning: this call is slower than it could be"
        ),
        lambda: "*" * 41,
        lambda: f"    loaded indexed file in 0.{pid % 1000:03d} seconds, total number of samples: {pid * 31}",
    )
    return draw.choice(kinds)() + "\n"


def write_log(path: Path, megabytes: int, *, share: float) -> None:
    """A log of that size in which about `share` of the bytes are iteration and timer lines. Some thousand blocks are drawn and repeated."""
    draw = random.Random(1)
    with path.open("w") as file:
        number = written = 0
        noise = "".join(other_line(draw) for _ in range(20000))
        while written < megabytes * 1_000_000:
            number += 1
            block = iteration_lines(number, draw)
            wanted = int(len(block) * (1 / share - 1))
            start = draw.randrange(0, max(1, len(noise) - wanted))
            start = noise.find("\n", start) + 1 if wanted else 0
            block += noise[start : start + wanted] + ("\n" if wanted else "")
            file.write(block)
            written += len(block)


def measured(command: list[str]) -> dict[str, float]:
    """Run a command to its end: seconds by the clock, of the processor, and its largest resident memory in MB."""
    begin = time.perf_counter()
    child = os.posix_spawnp(command[0], command, {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C"})
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{command[:2]} failed with {status}")
    return {"wall_s": time.perf_counter() - begin, "cpu_s": usage.ru_utime + usage.ru_stime, "resident_mb": usage.ru_maxrss / 1024}


def rounds(path: Path, count: int) -> Iterator[dict[str, object]]:
    """Every contestant on one file, in turns. One pass before the first round puts the file into the page cache."""
    contestants = {"perl": ["perl", "-lne", PERL, str(path)], "megactl": [sys.executable, "-c", READ, str(path)]}
    for name in contestants:
        measured(contestants[name])
    for number in range(count):
        for name, command in contestants.items():
            yield {"file": path.stem, "bytes": path.stat().st_size, "round": number, "contestant": name, **measured(command)}


def table(results: list[dict[str, object]]) -> str:
    """Medians with their range, as markdown."""
    lines = ["| file | contestant | CPU s (range) | GB/s of a core | wall s (range) | resident MB |", "|---|---|---:|---:|---:|---:|"]
    for file in dict.fromkeys(result["file"] for result in results):
        for name in ("perl", "megactl"):
            mine = [result for result in results if (result["file"], result["contestant"]) == (file, name)]
            cpu, wall = [sorted(float(result[key]) for result in mine) for key in ("cpu_s", "wall_s")]  # type: ignore[arg-type]
            speed = float(mine[0]["bytes"]) / statistics.median(cpu) / 1e9  # type: ignore[arg-type]
            resident = max(float(result["resident_mb"]) for result in mine)  # type: ignore[arg-type]
            lines.append(
                f"| {file} | {name} | {statistics.median(cpu):.2f} ({cpu[0]:.2f} to {cpu[-1]:.2f}) | {speed:.2f} |"
                f" {statistics.median(wall):.2f} ({wall[0]:.2f} to {wall[-1]:.2f}) | {resident:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the files are made; the system's temporary folder otherwise")
    parser.add_argument("--output", type=Path, default=None, help="a line of JSON a run")
    options = parser.parse_args()
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, share in (("mixed", 0.1), ("dense", 1.0)):
            path = Path(folder, f"{name}.out")
            write_log(path, options.megabytes, share=share)
            results += rounds(path, options.rounds)
            path.unlink()
    if options.output:
        options.output.write_text("".join(json.dumps(result) + "\n" for result in results))
    print(table(results))


if __name__ == "__main__":
    main()
