#!/usr/bin/env python3
"""The largest GPT that trains on one GPU: with nothing, with full recomputation, and with more and more of it in host memory.

    PYTHONPATH=. python3 scripts/bench_gpu/max_size.py --output max_size [--hidden 4096] [--seq 2048] [--step 2] [--seconds 470]

Models differ in depth alone. For each setting the formulas of `--dry-run` say how many layers, a multiple of --step, fit this GPU and
this host; then a process of its own trains that many (four steps), and another one --step layers more. What the formulas say does not
fit the host is not started: the machine would end it without a word. --gpu-gib and --host-gib set limits below what is here, and
are needed where no GPU is.

Writes OUTPUT.md (the table) and OUTPUT.jsonl (a line a run). After --seconds nothing more is started, and what was not says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megactl.commands.host_need import HostNeed
from megactl.commands.tables import markdown_table
from megactl.commands.train import memory_of
from megactl.config.load import load
from megactl.config.validate import Resolved, resolve
from megactl.costmodel.parameters import parameter_parts
from megactl.machine.gpus import find_gpus
from megactl.machine.host import host_memory
from megactl.machine.system import System

GIB = 2**30
SETTINGS = {
    "all on the GPU": "",
    "full recomputation": "--recompute full",
    "optimizer in host memory": "--recompute full --offload optimizer",
    "optimizer and parameters": "--zero 3 --recompute full --offload optimizer,parameters",
    "and saved inputs": "--zero 3 --recompute full --offload optimizer,parameters,activations",
}
# Of the GPU's memory: the rest is for the context, libraries and what lies between tensors.
SHARE = 0.94
HEADER = ("setting", "layers", "parameters", "predicted GiB", "peak GiB", "host GiB", "s / iteration", "outcome")


@dataclass(frozen=True)
class Size:
    """A depth of a setting, and what the formulas say of it: bytes on the device and on the host."""

    setting: str
    layers: int
    parameters: int
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What came of training it: seconds of an iteration and peak bytes of the GPU, or the problem."""

    size: Size
    seconds: float | None = None
    peak_bytes: float | None = None
    problem: str | None = None


def words_of(arguments: argparse.Namespace, setting: str, layers: int) -> list[str]:
    """The options of `megactl train` and `bench train`."""
    shape = f"--layers {layers} --hidden {arguments.hidden} --heads {arguments.heads} --seq {arguments.seq} --vocab {arguments.vocab}"
    rest = f"--mock-data --precision bf16 --mbs 1 --gbs 1 --device {arguments.device} --nproc 1 {SETTINGS[setting]}"
    return [*shape.split(), *rest.split()]


def predicted(arguments: argparse.Namespace, setting: str, layers: int) -> Size:
    """What the formulas say; on a CPU the device's bytes are the host's as well."""
    resolved = resolved_run(words_of(arguments, setting, layers), arguments.device)
    (stage,) = memory_of(resolved)["stages"]
    parameters = sum(parameter_parts(resolved.run.model, seq_length=resolved.run.training.seq_length).values())
    return Size(setting, layers, parameters, stage["total"], stage["host"] + (stage["total"] if arguments.device == "cpu" else 0))


def resolved_run(words: Sequence[str], device: str) -> Resolved:
    """A run on one rank, from the options as they are typed."""
    from megactl.commands.bench_train import read_options

    loaded = load(flags=read_options(" ".join(words)))
    return resolve(loaded.run, world_size=1, visible=1, gpus=int(device == "cuda"), origins=loaded.origins, run_dir="unused")


def deepest(sizes: Callable[[int], Size], fits: Callable[[Size], bool], step: int, most: int = 512) -> Size | None:
    """The largest multiple of `step` layers that fits; None where not even one step does. What grows with depth needs no full search."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(sizes(middle * step)) else (low, middle - 1)
    return sizes(low * step) if low else None


def train(arguments: argparse.Namespace, size: Size, timeout: float) -> Outcome:
    """Train four steps in a process of its own."""
    row = f"--layers {size.layers}"
    words = [sys.executable, "-m", "megactl", "bench", "train", *words_of(arguments, size.setting, size.layers), "--iterations", "1"]
    with tempfile.TemporaryDirectory(prefix="max-size-") as folder:
        words += ["--row", row, "--json", "--run-dir", str(Path(folder) / "run")]
        code, out, err = execute(words, timeout)
    if code != 0:
        return Outcome(size, problem=reason(code, err))
    (found,) = json.loads(out)["rows"]
    return Outcome(size, found["ms"] / 1e3, found["peak_mib"] and found["peak_mib"] * 2**20)


def execute(words: Sequence[str], timeout: float) -> tuple[int | None, str, str]:
    """Exit code (None: it took too long, and was ended with all it had started), stdout, stderr."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, *process.communicate()
    return process.returncode, out, err


def reason(code: int | None, err: str) -> str:
    """Why a run has no figures, in a few words."""
    if code is None:
        return "took too long"
    if "out of memory" in err.lower():
        return "out of GPU memory"
    if "of host memory" in err:
        return "refused: host memory"
    last = err.strip().splitlines()[-1] if err.strip() else "no output"
    return f"exit code {code}: {last[:120]}"


def limits(arguments: argparse.Namespace) -> tuple[float, float]:
    """Bytes that models may take of (the GPU, the host)."""
    gpus = find_gpus(System()).devices
    if arguments.gpu_gib is None and not gpus:
        sys.exit("no GPU is seen; give --gpu-gib")
    device = arguments.gpu_gib * GIB if arguments.gpu_gib is not None else gpus[0].memory * 2**20
    host = host_memory(System())
    usable = arguments.host_gib * GIB if arguments.host_gib is not None else host.usable if host is not None else 0
    return SHARE * device, usable


def fits_host(size: Size, usable: float) -> bool:
    """By the rule of every start."""
    return HostNeed(1, size.host_bytes, int(usable), "").fits


def search(arguments: argparse.Namespace) -> list[Outcome]:
    """Both depths of each setting."""
    device, host = limits(arguments)
    end, found = time.monotonic() + arguments.seconds, []
    for setting in SETTINGS:
        sizes = partial(predicted, arguments, setting)
        best = deepest(sizes, lambda size: size.device_bytes <= device and fits_host(size, host), arguments.step)
        tried = [sizes(layers) for layers in ((best.layers, best.layers + arguments.step) if best else (arguments.step,))]
        for size in tried:
            left = end - time.monotonic()
            if not fits_host(size, host):
                outcome = Outcome(size, problem="not started: host memory")
            elif left < arguments.least:
                outcome = Outcome(size, problem="not started: no time left")
            else:
                outcome = train(arguments, size, left)
            print(" | ".join(cells(outcome)), file=sys.stderr, flush=True)
            found.append(outcome)
    return found


def cells(outcome: Outcome) -> list[str]:
    """A row of the table."""
    size = outcome.size
    measured: list[Any] = [outcome.peak_bytes and f"{outcome.peak_bytes / GIB:.1f}", outcome.seconds and f"{outcome.seconds:.2f}"]
    peak, seconds = (value or "-" for value in measured)
    return [
        size.setting, str(size.layers), f"{size.parameters / 1e9:.2f}B", f"{size.device_bytes / GIB:.1f}", peak,
        f"{size.host_bytes / GIB:.1f}", seconds, outcome.problem or "trains",
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Parse, search, write. Exits with 1 where a depth that should fit did not train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (
        ("hidden", int, 4096), ("heads", int, 32), ("seq", int, 2048), ("vocab", int, 51200), ("step", int, 2), ("seconds", float, 470.0),
        ("least", float, 20.0), ("gpu-gib", float, None), ("host-gib", float, None), ("device", str, "cuda"), ("output", Path, None),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default, required=name == "output")
    arguments = parser.parse_args(words)
    outcomes = search(arguments)
    table = markdown_table(HEADER, [cells(outcome) for outcome in outcomes], right=tuple(range(1, 7)))
    arguments.output.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    lines = [json.dumps(asdict(outcome)) for outcome in outcomes]
    arguments.output.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(table)
    first = {outcome.size.setting: outcome for outcome in reversed(outcomes)}
    return int(any(outcome.seconds is None for outcome in first.values()))


if __name__ == "__main__":
    sys.exit(main())
