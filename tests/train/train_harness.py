"""Starting `megactl train` as a user does, waiting for it, and reading what it left behind."""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 60.0

# Two layers, 3 kB of weights each: what is tested is the machinery around the model.
TINY = (
    "--layers", "2", "--hidden", "32", "--heads", "4", "--seq-length", "16", "--micro-batch-size", "1", "--global-batch-size", "4",
    "--mock-data", "--vocab", "64", "--device", "cpu", "--iterations", "6", "--log-interval", "1", "--lr", "1e-2", "--warmup", "2",
)  # fmt: skip


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a login shell: no launcher's variables, one thread a rank (a sum over threads depends on their number)."""
    names = ("OMP_", "MKL_", "SLURM_", "TORCHELASTIC", "PYTEST_")
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(names) and k not in launcher}
    kept = {k: v for k, v in kept.items() if not k.startswith("MEGACTL_") or k == "MEGACTL_OPS"}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@dataclass
class Done:
    """How a command ended. `code` as a shell shows it, negative for a signal."""

    code: int
    out: str
    err: str

    def must(self, code: int, *said: str) -> Done:
        """Check the exit code, that every text of `said` is on stderr, and that no traceback is."""
        assert self.code == code, f"exit {self.code}, wanted {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        for text in said:
            assert text in self.err, f"{text!r} is missing in\n{self.err}"
        return self


class Command:
    """A command under way."""

    def __init__(self, pid: int, out: Path, err: Path, status: Callable[[float], int]) -> None:
        self.pid, self._out, self._err, self._status = pid, out, err, status

    @property
    def out(self) -> str:
        """Its stdout so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """Its stderr so far."""
        return self._err.read_text()

    def wait(self, limit: float = LIMIT) -> Done:
        """Wait for its end, at most `limit` seconds."""
        code = os.waitstatus_to_exitcode(self._status(limit))
        return Done(code, self.out, self.err)

    def signal(self, number: int) -> None:
        """Send a signal to the command itself, not to its ranks."""
        os.kill(self.pid, number)

    def ranks(self, count: int) -> dict[int, int]:
        """pid of each rank, once all `count` have opened their log of this attempt."""
        found: dict[int, int] = {}

        def complete() -> bool:
            found.clear()
            for pid in children(self.pid):
                for rank in range(count):
                    if any(f"rank {rank}, pid {pid}," in line for line in self._log_lines(rank)):
                        found[rank] = pid
            return len(found) == count

        wait_for(complete)
        return found

    def iterations(self, count: int) -> None:
        """Wait until `count` iteration lines are on stdout."""
        wait_for(lambda: self.out.count("| consumed samples:") >= count, self.alive)

    def alive(self) -> bool:
        """Whether it still runs."""
        return not gone(self.pid)

    run_dir: Path = Path()

    def _log_lines(self, rank: int) -> list[str]:
        path = self.run_dir / "logs" / f"rank-{rank}.log"
        return [line for line in path.read_text().splitlines() if line.startswith("===")] if path.exists() else []


class Zygote:
    """The process that forks commands; see train_zygote.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ids = folder, itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "train_zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment(), cwd=folder,
        )  # fmt: skip
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._ready = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._ready.wait(LIMIT), "the process that forks commands did not start"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            document = json.loads(line)
            if "ready" in document:
                self._ready.set()
            else:
                self._answers[document["id"]].put(document)

    def begin(self, arguments: tuple[str, ...], *, cwd: Path, environment: dict[str, str], file_limit: int | None = None) -> Command:
        """Start `megactl *arguments`."""
        number = next(self._ids)
        answers = self._answers[number] = queue.Queue()
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        for path in (out, err):
            path.touch()
        request = {"id": number, "argv": list(arguments), "cwd": str(cwd), "env": environment, "out": str(out), "err": str(err)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request | {"file_limit": file_limit}).encode() + b"\n")
        self._process.stdin.flush()
        pid = answers.get(timeout=LIMIT)["pid"]
        return Command(pid, out, err, lambda limit: self._status(answers, pid, limit))

    @staticmethod
    def _status(answers: queue.Queue[dict[str, Any]], pid: int, limit: float) -> int:
        try:
            return answers.get(timeout=limit)["status"]
        except queue.Empty:
            os.killpg(pid, signal.SIGKILL)
            raise AssertionError(f"still running after {limit} s") from None

    def close(self) -> None:
        """End it, and with it whatever it still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT)


class Runs:
    """`megactl train` with the tiny model in folders of one test. Later flags win over TINY's."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        self._started: list[Command] = []

    def begin(self, name: str, *flags: Any, base: tuple[str, ...] = TINY, file_limit: int | None = None, **environment: str) -> Command:
        """Start a run in the folder `name`."""
        arguments = ("train", *merged(base, flags), "--run-dir", str(self.folder / name))
        command = self.zygote.begin(arguments, cwd=self.folder, environment=clean_environment(**environment), file_limit=file_limit)
        command.run_dir = self.folder / name
        self._started.append(command)
        return command

    def __call__(self, name: str, *flags: Any, **options: Any) -> Done:
        """Run to the end."""
        return self.begin(name, *flags, **options).wait()

    def command(self, *arguments: str) -> Done:
        """Any other command line, to its end."""
        return self.zygote.begin(arguments, cwd=self.folder, environment=clean_environment()).wait()

    def end(self) -> None:
        """Kill whatever a failed test has left, ranks included."""
        for command in self._started:
            if command.alive():
                os.killpg(command.pid, signal.SIGKILL)

    def copy(self, name: str, new: str, *, only_step: int | None = None) -> Path:
        """A copy of a run directory; with `only_step` without the other checkpoints, as if the run had died after that save."""
        target = self.folder / new
        shutil.copytree(self.folder / name, target)
        if only_step is not None:
            for path in (target / "checkpoints").glob("step-*"):
                if path.name != f"step-{only_step:08d}":
                    shutil.rmtree(path)
        return target


def merged(base: tuple[str, ...], flags: tuple[Any, ...]) -> list[str]:
    """`base` with the values of `flags` in place of its own: a flag given twice with two values is an error of the command line."""
    given = [str(flag) for flag in flags]
    kept, words = [], list(base)
    while words:
        group = [words.pop(0)]
        while words and not words[0].startswith("--"):
            group.append(words.pop(0))
        if group[0] not in given:
            kept += group
    return kept + given


def children(pid: int) -> list[int]:
    """Child processes of `pid`."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_for(condition: Callable[[], bool], alive: Callable[[], bool] = lambda: True, limit: float = LIMIT) -> None:
    """Wait until `condition` holds; fails after `limit` seconds, or where the process to wait for has ended without it."""
    end = time.monotonic() + limit
    while not condition():
        assert alive() or condition(), "the process ended first"
        assert time.monotonic() < end, "condition not met in time"
        time.sleep(0.005)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(iteration, loss) of every training line of metrics.jsonl, in file order."""
    return [(line["iteration"], line["loss"]) for line in records(run_dir) if line.get("kind") is None]


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    """(iteration, loss) of every evaluation line of metrics.jsonl."""
    return [(line["iteration"], line["loss"]) for line in records(run_dir) if line.get("kind") == "eval"]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def summary(run_dir: Path) -> dict[str, Any]:
    """summary.json."""
    return json.loads((run_dir / "summary.json").read_text())


def checkpoint(run_dir: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in a run directory."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def header(run_dir: Path, step: int) -> dict[str, Any]:
    """What the manifest says beside the tensors."""
    document = json.loads((checkpoint(run_dir, step) / "manifest.json").read_text())
    return {key: value for key, value in document.items() if key not in ("files", "tensors", "checksum")}


def tensors(path: Path) -> dict[tuple[str, str], Any]:
    """Every logical tensor of a checkpoint, whole: (name, kind) -> tensor."""
    from megactl.engine.checkpoint import load_full

    kinds = {piece["kind"] for piece in json.loads((path / "manifest.json").read_text())["tensors"]}
    return {(name, kind): tensor for kind in sorted(kinds) for name, tensor in load_full(path, kind).items()}


def assert_same_tensors(left: Path, right: Path) -> None:
    """Both checkpoints hold the same tensors, bit for bit, and something was learnt between the first step and them."""
    import torch

    first, second = tensors(left), tensors(right)
    assert first.keys() == second.keys() and first
    for key, tensor in first.items():
        other = second[key]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, key
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), f"{key} differs by {(tensor - other).abs().max()}"
    assert any(tensor.abs().max() > 0 for (_, kind), tensor in first.items() if kind == "exp_avg")
