#!/usr/bin/env python3
"""Everything that only a GPU machine can say, in one command of under eight minutes: builds, tests, times and sanitizes.

    python3 scripts/bench_gpu/gpu_suite.py OUT [--steps build,load,tests,bench,memcheck,racecheck] [--limit tests=300] [--archs 90a]

Run from the repository's root with the Python that has torch. Each step has a limit of its own; a step that fails or is cut short does
not stop the next. OUT gets suite.md (a line a step), suite.log (everything printed), ops.json and ops.md (of `megactl bench ops`).

  build      setup.py build_ext --inplace with MEGACTL_ARCHS
  load       the compiled operators load, and say what they were built for
  tests      pytest -m gpu
  bench      megactl bench ops --device cuda; the step's note says how many rows are slower than eager torch
  memcheck   compute-sanitizer over the operators' GPU tests, checking megactl's kernels: out-of-bounds and misaligned accesses
  racecheck  the same for hazards in shared memory, of the operators that use it

Exits with 1 where a step failed; a step that was cut by its limit counts as failed, too, and its note says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Seconds a step may take; together under eight minutes.
LIMITS = {"build": 120, "load": 30, "tests": 100, "bench": 150, "memcheck": 45, "racecheck": 30}
# Captured graphs need torch's caching allocator, which memcheck runs without; the others compile or time.
UNFIT = "not graph and not opcheck and not compile and not bench and not host"
SHARED_MEMORY = "norm or softmax or cross_entropy or adamw or squared"


@dataclass(frozen=True)
class Step:
    """One line of the summary. `note` finds what is worth telling in the output; `stdout`: a file for it instead of the log."""

    name: str
    command: list[str]
    environment: dict[str, str]
    note: Callable[[str], str]
    stdout: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    name: str
    status: str
    seconds: float
    note: str


def steps(out: Path, archs: str, seconds: float) -> list[Step]:
    """All steps, in their order."""
    python = sys.executable
    compiled = {"MEGACTL_OPS": "compiled"}
    tests = [python, "-m", "pytest", "-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider"]
    bench = [python, "-m", "megactl", "bench", "ops", "--device", "cuda", "--seconds", str(seconds), "--json"]
    build = {"MEGACTL_ARCHS": archs, "MAX_JOBS": str(os.cpu_count() or 1)}
    describe = "from megactl.engine import ops; print(ops.describe())"
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], build, _last_line),
        Step("load", [python, "-c", describe], compiled, _last_line),
        Step("tests", [*tests, "--durations=10"], compiled, _pytest_note),
        Step("bench", [*bench, "--markdown", str(out / "ops.md")], compiled, _bench_note(out / "ops.json"), out / "ops.json"),
        Step("memcheck", [*sanitizer("memcheck"), *tests, "-k", UNFIT, "tests/ops"],
             # Each tensor an allocation of its own, or the neighbour in torch's pool hides what lies outside.
             {**compiled, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, _sanitizer_note),
        Step("racecheck", [*sanitizer("racecheck"), *tests, "-k", f"({SHARED_MEMORY}) and {UNFIT}", "tests/ops"], compiled,
             _sanitizer_note),
    ]  # fmt: skip


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer with the options that this version has; its absence shows when the step is run."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    words = [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    try:
        known = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return words
    # torch's own kernels are many and not what is tested here.
    if "--kernel-name" in known:
        words += ["--kernel-name", "kns=megactl"]
    if tool == "memcheck" and "--padding" in known:
        words += ["--padding", "64"]
    return words


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][-200:] if lines else ""


def _pytest_note(output: str) -> str:
    """pytest's closing line, and the first tests that failed."""
    words = re.compile(r"\b(passed|failed|errors?|no tests ran|deselected)\b.* in ")
    closing = [line.strip("= ") for line in output.splitlines() if words.search(line)]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.M)
    return "; ".join([*closing[-1:], *failed[:5]]) or _last_line(output)


def _sanitizer_note(output: str) -> str:
    """The sanitizer's own summary, then pytest's."""
    own = [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line]
    return "; ".join([*own[-1:], _pytest_note(output)])


def _bench_note(document: Path) -> Callable[[str], str]:
    def note(output: str) -> str:
        try:
            rows = json.loads(document.read_text())["rows"]
        except (OSError, ValueError, KeyError):
            return _last_line(output)
        counts: dict[str, int] = {}
        for row in rows:
            counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
        slow = [" ".join((row["op"], row["variant"], row["direction"])) for row in rows if row["slower_than_eager"]]
        parts = [f"{count} {verdict}" for verdict, count in counts.items()]
        return ", ".join(parts) + (f"; slower than eager torch: {', '.join(slow)}" if slow else "; none slower than eager torch")

    return note


def run(step: Step, limit: float, log: Path) -> Outcome:
    """Run a step and append its output to the log."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environment}
    started = time.monotonic()
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    own = log.with_suffix(f".{step.name}")
    with own.open("w") as err, (step.stdout or own).open("a" if step.stdout is None else "w") as out:
        try:
            process = subprocess.Popen(step.command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)
            code = wait(process, limit)
        except OSError as error:
            code, _ = 127, err.write(f"{error}\n")
    seconds = time.monotonic() - started
    output = own.read_text(errors="replace")
    own.unlink()
    with log.open("a") as file:
        file.write(f"\n== {step.name} ({seconds:.0f} s, exit code {code}): {' '.join(step.command)}\n{output}")
    status = "ok" if code == 0 else f"cut after {limit:.0f} s" if code is None else f"FAILED ({code})"
    outcome = Outcome(step.name, status, seconds, step.note(output))
    print(f"   {status}, {seconds:.0f} s: {outcome.note}", flush=True)
    return outcome


def wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """The exit code; None where the limit ended it: first by SIGINT, so that pytest and the sanitizer still print what they found."""
    for number, seconds in ((None, limit), (signal.SIGINT, 10.0), (signal.SIGKILL, 10.0)):
        if number is not None:
            os.killpg(process.pid, number)
        try:
            code = process.wait(seconds)
            return code if number is None else None
        except subprocess.TimeoutExpired:
            continue
    return None


def summary(outcomes: list[Outcome]) -> str:
    """A table, a line a step."""
    lines = ["| step | result | seconds | |", "|---|---|---:|---|"]
    lines += [f"| {item.name} | {item.status} | {item.seconds:.0f} | {item.note.replace('|', '/')} |" for item in outcomes]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the steps asked for; 1 where one did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", default=",".join(LIMITS), help="comma-separated")
    parser.add_argument("--limit", action="append", default=[], metavar="STEP=SECONDS")
    parser.add_argument("--archs", default="90a", help="MEGACTL_ARCHS of the build")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each row of bench")
    arguments = parser.parse_args()
    wanted, limits = arguments.steps.split(","), dict(LIMITS)
    for text in arguments.limit:
        name, _, value = text.partition("=")
        limits[name] = float(value)
    unknown = {*wanted, *limits} - set(LIMITS)
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}: there are {', '.join(LIMITS)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "suite.log"
    log.write_text("")
    outcomes: list[Outcome] = []
    for step in steps(out, arguments.archs, arguments.seconds):
        if step.name in wanted:
            outcomes.append(run(step, limits[step.name], log))
            (out / "suite.md").write_text(summary(outcomes))
    print(summary(outcomes))
    return int(any(item.status != "ok" for item in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
