"""Handing scripts to sbatch: asked with --test-only first, with time limits, and with Slurm's own message where it refuses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megactl.errors import MegactlError, RunError

# A busy controller answers late, and sbatch itself asks again for a while; beyond this somebody should look.
TEST_SECONDS, SUBMIT_SECONDS, ASK_SECONDS = 60, 120, 20

# What Slurm says -> what to do. The first that fits counts. Messages: src/common/slurm_errno.c and sbatch.
_CURES: tuple[tuple[str, str], ...] = (
    (r"invalid partition|Invalid partition", "`sinfo -s` lists the partitions"),
    (r"account/partition combination|[Ii]nvalid account", "`sacctmgr show assoc user=$USER format=account,partition,qos` lists yours"),
    (r"[Ii]nvalid qos", "`sacctmgr show assoc user=$USER format=account,qos` lists yours"),
    (r"[Ii]nvalid feature|constraint", "`sinfo -o '%P %f'` lists what --constraint may name"),
    (r"time limit is invalid|PartitionTimeLimit", "`sinfo -o '%P %l'` lists the longest --time of each partition"),
    (r"reservation", "`scontrol show reservation` lists them"),
    (r"node configuration|[Nn]ode count|generic resource|gres", "`sinfo -o '%P %D %c %m %G'` lists nodes, CPUs, memory and GPUs"),
    (r"Invalid directive|unrecognized option|ambiguous|not a valid|Invalid --", "`megactl slurm lint FILE` says which line"),
    (r"Unable to contact|refused|configuration (source|file)|ClusterName", "is this a login node of the cluster, and is its Slurm up?"),
    (r"Job violates|QOSMax|AssocMax|limit", "`sacctmgr show qos` and `squeue --me` show limits and what you use"),
)


@dataclass(frozen=True)
class Submission:
    """One script and what became of it. `job_id` is None where nothing was submitted; `log` is the job's output, None if unknown."""

    file: str
    job_id: str | None
    cluster: str | None
    log: str | None
    starts: str | None


def find_sbatch(environ: Mapping[str, str]) -> str:
    """The path of sbatch. Raises MegactlError where there is none."""
    found = shutil.which("sbatch", path=environ.get("PATH"))
    if found is None:
        rule = "sbatch is not on PATH: this machine has no Slurm, or its environment is not loaded"
        raise MegactlError(rule, "run this on a login node of the cluster, or load its module (often `module load slurm`)")
    return found


def overriding(environ: Mapping[str, str]) -> list[str]:
    """Variables that sbatch obeys before any directive, `SBATCH_TIMELIMIT` for one."""
    return sorted(name for name in environ if name.startswith("SBATCH_") and environ[name])


def test(file: str, arguments: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """What `sbatch --test-only` says about when the job would start. Raises RunError with Slurm's message where it refuses."""
    done = _call([find_sbatch(environ), "--test-only", *arguments, _path(file)], TEST_SECONDS, environ)
    if done is None:
        raise RunError(f"{file}: sbatch --test-only did not answer within {TEST_SECONDS} s", "is the controller up? `scontrol ping` says")
    if done.returncode != 0:
        raise _refused(file, done.stderr)
    match = re.search(r"to start at (\S+)", done.stderr)
    return match[1] if match else None


def submit(file: str, arguments: Sequence[str], environ: Mapping[str, str], *, starts: str | None = None) -> Submission:
    """Submit one script. Raises RunError with Slurm's message, or where sbatch does not answer (the job may exist all the same)."""
    done = _call([find_sbatch(environ), "--parsable", *arguments, _path(file)], SUBMIT_SECONDS, environ)
    if done is None:
        rule = f"{file}: sbatch did not answer within {SUBMIT_SECONDS} s, and may have submitted the job all the same"
        raise RunError(rule, "look at `squeue --me` before you try again")
    if done.returncode != 0:
        raise _refused(file, done.stderr)
    job, _, cluster = done.stdout.strip().partition(";")
    if not re.fullmatch(r"\d+", job):
        raise RunError(f"{file}: sbatch printed {done.stdout.strip()!r} in place of a job number", "look at `squeue --me`")
    return Submission(file, job, cluster or None, log_of(job, environ), starts)


def log_of(job: str, environ: Mapping[str, str]) -> str | None:
    """Where Slurm will write the job's output; None where scontrol does not say."""
    scontrol = shutil.which("scontrol", path=environ.get("PATH"))
    done = _call([scontrol, "show", "job", job], ASK_SECONDS, environ) if scontrol else None
    match = re.search(r"^\s*StdOut=(.+)$", done.stdout, re.M) if done is not None and done.returncode == 0 else None
    return match[1].strip() if match else None


def scripts_in(folder: str) -> list[str]:
    """The batch scripts of a folder, by name. Raises MegactlError where it is none or holds none."""
    path = Path(folder)
    if not path.is_dir():
        raise MegactlError(f"{folder}: is no folder", "give the folder that `megactl slurm render` wrote")
    found = [str(item) for item in sorted(path.iterdir()) if item.is_file() and _is_batch(item)]
    if not found:
        raise MegactlError(f"{folder}: holds no batch script", "a batch script begins with #! and has #SBATCH lines")
    return found


def _is_batch(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(65536)
    except OSError:
        return False
    return head.startswith(b"#!") and re.search(rb"^#SBATCH", head, re.M) is not None


def _path(file: str) -> str:
    """sbatch reads a name that begins with a dash as an option, and looks a bare name up on PATH where it is not here."""
    return os.path.join(".", file) if not os.path.isabs(file) else file


def _call(command: Sequence[str], seconds: int, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str] | None:
    """The finished command; None where it did not end in time."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds, env=dict(environ), stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return None


def _refused(file: str, message: str) -> RunError:
    lines = [re.sub(r"^sbatch: (?:error: |fatal: )?", "", line).strip() for line in message.splitlines()]
    text = "; ".join(line for line in lines if line and not line.startswith("Try ")) or "sbatch failed without a message"
    fits = (cure for pattern, cure in _CURES if re.search(pattern, message))
    cure = next(fits, "the message is Slurm's own; `man sbatch` has the option")
    return RunError(f"{file}: Slurm refuses it: {text}", cure.replace("FILE", file))
