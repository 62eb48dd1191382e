"""A real Slurm: a sweep of which one task is stopped and requeues itself alone, and a run that torchrun starts on two nodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_slurm_real import TINY

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = f"env PYTHONPATH={ROOT} OMP_NUM_THREADS=1 {sys.executable} -m megactl"


def submit(real_slurm, folder: Path, *flags: str) -> str:
    """Render with the small run's options and submit; the job's number."""
    words = [sys.executable, "-m", "megactl", "slurm", "render", *TINY, *flags, "--output", "job.sh"]
    done = real_slurm.call(*words, cwd=folder, limit=120, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    done = real_slurm.call("sbatch", "--parsable", "job.sh", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def status(folder: Path) -> str | None:
    path = folder / "summary.json"
    return json.loads(path.read_text())["status"] if path.exists() else None


def test_a_task_of_a_sweep_requeues_itself_alone(real_slurm, tmp_path):
    number = submit(real_slurm, tmp_path, "--sweep", "seed=1,2", "--iterations", "150", "--command", COMMAND, "--run-dir", "run")
    try:
        second = f"{number}_1"
        metrics = tmp_path / "run" / "seed-2" / "metrics.jsonl"
        real_slurm.wait(second, lambda _: metrics.exists() and metrics.read_text().count("\n") > 5)
        assert real_slurm.call("scancel", "--signal=USR2", second).returncode == 0
        job = real_slurm.wait(second, lambda job: job["Restarts"] == "1")
        first = real_slurm.ended(f"{number}_0")
        job = real_slurm.ended(second)
        assert (first["JobState"], first["Restarts"]) == ("COMPLETED", "0")
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
        assert [status(tmp_path / "run" / f"seed-{seed}") for seed in (1, 2)] == ["completed", "completed"]
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [row["iteration"] for row in rows if row.get("kind") is None] == list(range(1, 151))
    finally:
        real_slurm.call("scancel", "--quiet", number)


def test_torchrun_on_two_nodes(real_slurm, tmp_path):
    command = f"{sys.executable} -m megactl"
    flags = ("--launcher", "torchrun", "--signal", "none", "--iterations", "12", "--env", f"PYTHONPATH={ROOT}", "--run-dir", "run")
    number = submit(real_slurm, tmp_path, *flags, "--command", command)
    try:
        job = real_slurm.ended(number)
        log = "".join(path.read_text() for path in tmp_path.glob("*.out"))
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 4
    finally:
        real_slurm.call("scancel", "--quiet", number)
