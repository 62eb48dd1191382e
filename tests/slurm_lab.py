"""A real Slurm of two virtual nodes on this machine, from the scripts beside the repository; and what tests ask it."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# A lab and ports of its own: a Slurm that somebody brought up by hand with the defaults is not touched.
LAB, PORT = "lab-tests", "36817"


@dataclass(frozen=True)
class Slurm:
    """A Slurm that is up. `environment` is what its commands need on top of the process's own."""

    environment: dict[str, str]

    def call(self, *command: str, cwd: Path | None = None, limit: float = 60, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command with this Slurm; its output is text."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MEGACTL_")) or k == "MEGACTL_OPS"}
        return subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=limit, env={**clean, **self.environment, **more}
        )  # fmt: skip

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`. Asked again where a controller that gets no processor time does not answer."""
        for pause in (1, 5, 20, 0):
            done = self.call("scontrol", "--oneliner", "show", "job", number)
            if done.returncode == 0:
                break
            time.sleep(pause)
        assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))

    def wait(self, number: str, reached: Callable[[dict[str, str]], bool], limit: float = 200) -> dict[str, str]:
        """Ask for the job until `reached`, and return its fields then."""
        end = time.monotonic() + limit
        while not reached(found := self.job(number)):
            assert time.monotonic() < end, f"job {number} did not come so far in {limit} s: {found}"
            time.sleep(0.3)
        return found

    def ended(self, number: str, limit: float = 200) -> dict[str, str]:
        """Wait until the job is over for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.wait(number, lambda job: job["JobState"] in over, limit)


@contextmanager
def slurm_lab(shared: Path) -> Iterator[Slurm]:
    """Bring the lab up, one user at a time on this machine, and take down what was brought up. Skips the test where that cannot be."""
    scripts = shared / "slurm"
    if os.geteuid() != 0 or not (scripts / "slurm-up.sh").exists():
        pytest.skip("needs root and the scripts that start a Slurm")
    # A test installs no packages: without Slurm on the machine the script fails and the test is skipped.
    settings = {"SLURM_LAB": str(scripts / LAB), "SLURM_LAB_PORT": PORT, "SLURM_LAB_INSTALL": "0"}
    environment = {**os.environ, **settings}
    with (Path("/tmp") / f"megactl-{LAB}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        up = subprocess.run(["bash", str(scripts / "slurm-up.sh")], capture_output=True, text=True, timeout=180, env=environment)
        if up.returncode != 0:
            pytest.skip(f"no Slurm could be started here: {up.stderr[-300:]}")
        exports = dict(line.removeprefix("export ").split("=", 1) for line in up.stdout.splitlines() if line.startswith("export "))
        try:
            yield Slurm(exports)
        finally:
            if "already up" not in up.stderr:
                subprocess.run(["bash", str(scripts / "slurm-down.sh")], capture_output=True, timeout=90, env=environment)
