"""A real Slurm: an experiment of the SC21 paper in small, from `render --experiment` over `submit` to the table and the figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_slurm_experiments import SMALL

from megactl.cluster.experiments import experiments

# Eight jobs of up to eight ranks each, one after the other, on a machine that others use too.
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(2400)]

ROOT = Path(__file__).resolve().parents[2]
NAME = "figure_11"


@pytest.fixture
def megactl(real_slurm, tmp_path):
    def call(*words: str, limit: float = 120) -> str:
        done = real_slurm.call(sys.executable, "-m", "megactl", *words, cwd=tmp_path, limit=limit, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return call


def test_from_the_paper_to_its_figure(real_slurm, megactl, tmp_path):
    command = f"env PYTHONPATH={ROOT} OMP_NUM_THREADS=1 {sys.executable} -m megactl"
    more = ("--mbs", "8", "--iterations", "6", "--log-interval", "1", "--lr-decay-iterations", "6", "--warmup", "1", "--time", "0:20:00")
    megactl("slurm", "render", "--experiment", NAME, *SMALL, *more, "--command", command)
    jobs = json.loads(megactl("slurm", "submit", "--experiment", NAME, "--json", limit=300))["jobs"]
    points = {f"{NAME}-{row.point}": row for row in experiments()[NAME].rows}
    assert {Path(job["file"]).stem for job in jobs} == set(points)
    try:
        for job in jobs:
            ended = real_slurm.ended(job["job_id"], limit=900)
            log = Path(job["log"])
            assert ended["JobState"] == "COMPLETED", log.read_text() if log.exists() else ended
    finally:
        real_slurm.call("scancel", "--quiet", *(job["job_id"] for job in jobs))

    figure = tmp_path / "figure.png"
    rows = json.loads(megactl("parse-logs", f"{NAME}/logs", "--format", "json", "--plot", str(figure)))
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert len(rows) == len(points)
    for row in rows:
        point = points[Path(row["file"]).name.rpartition("-")[0]]
        stated = (row["status"], row["iterations"], row["pp"], row["tp"], row["dp"], row["gbs"], row["gpus"])
        assert stated == ("completed", 6, point.pp, 1, 1, point.global_batch_size, point.pp)
        assert row["tflops_per_gpu"] > 0 and row["exact"]["hfu_tflops"] > 0
    # The run directories say the same as the logs.
    folders = json.loads(megactl("parse-logs", *(str(path.parent) for path in tmp_path.glob("**/metrics.jsonl")), "--format", "json"))
    assert sorted((row["pp"], row["gbs"], row["final_loss"]) for row in folders) == sorted(
        (row["pp"], row["gbs"], pytest.approx(row["final_loss"], rel=1e-5)) for row in rows
    )
