"""A real Slurm: what lint says about directives is what sbatch does, and rendered jobs train, are pre-empted, cancelled, and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from test_slurm_lint import DIRECTIVES

from megactl.cluster.lint import lint_text
from megactl.cluster.slurm_options import options

# The limit is for a machine that others use too: a job of seconds may take minutes there.
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--layers", "2", "--hidden", "64", "--heads", "4", "--seq-length", "32", "--mbs", "1", "--gbs", "8", "--mock-data", "--vocab", "64",
    "--device", "cpu", "--log-interval", "1", "--nodes", "2", "--gpus-per-node", "0", "--ntasks-per-node", "2", "--tp", "2",
    "--time", "0:10:00", "--signal", "USR2@60",
)  # fmt: skip


class Run:
    """A rendered job in a folder of its own."""

    def __init__(self, slurm: Any, folder: Path) -> None:
        self.slurm, self.folder, self.number = slurm, folder, ""

    def megactl(self, *arguments: str) -> str:
        """stdout of a command, which must end with 0."""
        done = self.slurm.call(sys.executable, "-m", "megactl", *arguments, cwd=self.folder, limit=120, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *flags: str) -> str:
        """render, lint, submit; returns the job's number."""
        command = f"env PYTHONPATH={ROOT} {sys.executable} -m megactl"
        self.megactl("slurm", "render", *TINY, *flags, "--run-dir", "run", "--command", command, "--output", "job.sh")
        assert self.megactl("slurm", "lint", "--strict", "job.sh") == ""
        (job,) = json.loads(self.megactl("slurm", "submit", "--json", "job.sh"))["jobs"]
        assert job["file"] == "job.sh" and job["log"] == str(self.folder / f"gpt-{job['job_id']}.out")
        self.number = job["job_id"]
        return self.number

    @property
    def log(self) -> str:
        """The job's output so far."""
        path = self.folder / f"gpt-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def iterations(self) -> list[int]:
        """Those of metrics.jsonl, in file order."""
        path = self.folder / "run" / "metrics.jsonl"
        rows = [json.loads(row) for row in path.read_text().splitlines() if row.endswith("}")] if path.exists() else []
        return [row["iteration"] for row in rows if row.get("kind") is None]

    def reach(self, iteration: int) -> None:
        """Wait until that iteration is written."""
        self.slurm.wait(self.number, lambda job: iteration in self.iterations() or self.gone(job))
        assert iteration in self.iterations(), self.log

    @staticmethod
    def gone(job: dict[str, str]) -> bool:
        return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "run" / "summary.json").read_text())

    def finished(self, iterations: int) -> dict[str, str]:
        """The job ended well, and each iteration is recorded once."""
        job = self.slurm.ended(self.number)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.log
        assert self.iterations() == list(range(1, iterations + 1))
        assert self.summary()["status"] == "completed" and self.summary()["world_size"] == 4
        return job


@pytest.fixture
def run(real_slurm, tmp_path):
    found = Run(real_slurm, tmp_path)
    yield found
    if found.number:
        real_slurm.call("scancel", "--quiet", found.number)


def test_two_nodes_of_two_ranks_train(run):
    run.submit("--iterations", "12")
    job = run.finished(12)
    assert job["NumNodes"] == "2" and job["Restarts"] == "0"
    hosts = json.loads((run.folder / "run" / "environment.json").read_text())
    assert {"node1", "node2"} <= set(re.findall(r"node\d", json.dumps(hosts)))


def test_a_preempted_job_goes_on_where_it_was(run, real_slurm):
    number = run.submit("--iterations", "60", "--save-interval", "5")
    run.reach(12)
    assert real_slurm.call("scontrol", "requeue", number).returncode == 0
    job = run.finished(60)
    assert job["Restarts"] == "1"
    assert re.search(r"(resum|loaded|continu)", run.log, re.I), run.log


def test_a_time_limit_signal_saves_requeues_and_finishes(run, real_slurm):
    number = run.submit("--iterations", "400", "--save-interval", "1000")
    run.reach(5)
    # One minute, of which the signal takes sixty seconds: it comes with Slurm's next look at its jobs.
    assert real_slurm.call("scontrol", "update", f"JobId={number}", "TimeLimit=1").returncode == 0
    # The job waits a while before it starts again (cred_expire), so its summary is still that of the first start.
    real_slurm.wait(number, lambda job: job["Restarts"] == "1" or run.gone(job))
    assert run.summary()["status"] == "saved" and 5 <= run.iterations()[-1] == run.summary()["iterations"] < 400, run.log
    # While its first start is being cleared away Slurm calls the job finished and takes no new limit.
    longer = ("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    real_slurm.wait(number, lambda _: real_slurm.call(*longer).returncode == 0, limit=60)
    assert re.search(r"saved after iteration \d+; requeued, start 2 follows", run.log), run.log
    job = run.finished(400)
    assert job["Restarts"] == "1"


def test_a_cancelled_job_does_not_come_back(run, real_slurm):
    number = run.submit("--iterations", "100000")
    run.reach(3)
    assert real_slurm.call("scancel", number).returncode == 0
    job = real_slurm.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), run.log
    real_slurm.wait(number, lambda _: not any(alive(pid) for pid in run_pids(run.folder)), limit=30)


def test_a_dead_rank_ends_the_job_at_once_and_for_good(run, real_slurm):
    number = run.submit("--iterations", "100000")
    run.reach(3)
    os.kill(run_pids(run.folder)[3], signal.SIGKILL)
    job = real_slurm.ended(number, limit=90)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), run.log
    assert job["ExitCode"] != "0:0"
    real_slurm.wait(number, lambda _: not any(alive(pid) for pid in run_pids(run.folder)), limit=30)


def run_pids(folder: Path) -> list[int]:
    """pid of each rank, from the heads of their logs."""
    heads = [(folder / "run" / "logs" / f"rank-{rank}.log").read_text() for rank in range(4)]
    return [int(re.findall(rf"rank {rank}, pid (\d+)", head)[-1]) for rank, head in enumerate(heads)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_submit_says_what_slurm_says(run, real_slurm):
    (run.folder / "job.sh").write_text("#!/bin/bash\n#SBATCH --time=0:01:00 --nodes=5 --output=%j.out\ntrue\n")
    done = real_slurm.call(sys.executable, "-m", "megactl", "slurm", "submit", "job.sh", cwd=run.folder, PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and done.stdout == ""
    assert "job.sh: Slurm refuses it: " in done.stderr and "sinfo" in done.stderr
    assert real_slurm.call("squeue", "-h").stdout == ""


def test_dependencies_and_folders_are_handed_over(run, real_slurm):
    for name in ("a", "b"):
        (run.folder / f"{name}.sh").write_text("#!/bin/bash\n#SBATCH --time=0:01:00 --output=%j.out\ntrue\n")
    (run.folder / "notes.txt").write_text("no script")
    first, second = json.loads(run.megactl("slurm", "submit", "--json", "--experiment", "."))["jobs"]
    assert [Path(job["file"]).name for job in (first, second)] == ["a.sh", "b.sh"]
    (third,) = json.loads(run.megactl("slurm", "submit", "--json", "a.sh", "--dependency", f"afterok:{second['job_id']}"))["jobs"]
    assert real_slurm.ended(third["job_id"])["JobState"] == "COMPLETED"
    said = run.megactl("slurm", "submit", "--dry-run", "a.sh", "b.sh")
    assert said.count("not submitted (--dry-run)") == 2


# -- lint reads directives as sbatch does


@pytest.mark.parametrize(("text", "expected"), DIRECTIVES)
def test_sbatch_reads_the_directives_that_lint_reads(real_slurm, tmp_path, text, expected):
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{text}\ntrue\n")
    done = real_slurm.call("sbatch", "--parsable", "--hold", "job.sh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    job = real_slurm.job(done.stdout.strip())
    real_slurm.call("scancel", done.stdout.strip())
    asked = dict(expected)
    assert job["NumNodes"].partition("-")[0] == asked.get("nodes", "1")
    assert job["JobName"] == asked.get("job-name", "job.sh").partition(" ")[0]


REFUSED = [
    "--nodez=2", "--node=2", "--nodes", "--requeue=1", "nodes=2", "-N=2", "--nodes = 2", "--nodes= 2", "--comment='a", "-job-name=foo",
    "--kill-on-bad-exit=1", "--time=20h", "--mem=1.5G", "--mem=1G --mem-per-cpu=1G", "--signal=B:SAVE@60", "--comment=a b",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_sbatch_refuses_is_an_error_of_lint(real_slurm, tmp_path, text):
    script = f"#!/bin/bash\n#SBATCH {text}\ntrue\n"
    (tmp_path / "job.sh").write_text(script)
    assert real_slurm.call("sbatch", "--test-only", "job.sh", cwd=tmp_path).returncode != 0
    assert [item for item in lint_text(script) if item.severity == "error"]


@pytest.mark.parametrize("text", ["\ufeff#!/bin/bash\ntrue\n", "#!/bin/bash\r\ntrue\r\n", "#SBATCH -N1\ntrue\n", "#!/bin/bash\n\0\n"])
def test_files_that_sbatch_refuses_are_errors_of_lint(real_slurm, tmp_path, text):
    (tmp_path / "job.sh").write_bytes(text.encode())
    assert real_slurm.call("sbatch", "job.sh", cwd=tmp_path).returncode != 0
    assert [item for item in lint_text(text) if item.severity == "error"]


@pytest.mark.parametrize("tool", ["sbatch", "srun"])
def test_every_option_of_this_slurm_is_known(real_slurm, tool):
    shown = real_slurm.call(tool, "--help").stdout
    named = set(re.findall(r"^ +(?:-\w, +)?--([a-z][a-z0-9-]*)", shown, re.M))
    assert len(named) > 60
    assert named - set(options(tool)) == set()
