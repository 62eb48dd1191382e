"""Cluster settings: section [slurm] of a TOML file, --set slurm.KEY=VALUE, MEGACTL_SLURM_KEY, or a flag each."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from megactl.config.schema import setting
from megactl.config.settings import Setting, settings_of

SECTION = "slurm"


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What to ask Slurm for, and how the ranks are started. None means "not asked for": the site's own default holds."""

    job_name: str | None = setting(None, "name of the job (default: the preset or model)", flags=("--job-name",))
    account: str | None = setting(None, "account to charge", flags=("--account",))
    partition: str | None = setting(None, "partition, or several with commas", flags=("--partition",))
    qos: str | None = setting(None, "quality of service", flags=("--qos",))
    reservation: str | None = setting(None, "reservation to run in", flags=("--reservation",))
    constraint: str | None = setting(None, "features the nodes must have", flags=("--constraint",))
    nodes: int | None = setting(None, "nodes (default: from the layout, where --dp is given)", flags=("--nodes",))
    gpus_per_node: int | None = setting(None, "GPUs of a node, and so ranks; 0 for a run on CPUs", flags=("--gpus-per-node",))
    gpu_type: str | None = setting(None, "type of the GPUs, as the site calls it", flags=("--gpu-type",))
    gpu_request: str = setting(
        "gpus-per-node", "how GPUs are asked for; none: the partition gives whole nodes", flags=("--gpu-request",),
        choices=("gpus-per-node", "gres", "none"),
    )  # fmt: skip
    ntasks_per_node: int | None = setting(None, "ranks of a node where it has no GPUs", flags=("--ntasks-per-node",))
    cpus_per_task: int | None = setting(
        None, "CPUs of each rank (without it Slurm gives a task one)", flags=("--cpus-per-task", "--cpus-per-gpu")
    )
    memory: str | None = setting(None, "memory of a node, such as 500G; 0 is all of it", flags=("--mem", "--memory"), metavar="SIZE")
    time: str | None = setting(None, "time limit: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS", flags=("--time",))
    signal: str = setting(
        "USR2@180", "sent to the ranks before the time limit, for the last save; none for no signal", flags=("--signal",),
        metavar="NAME@SECONDS",
    )  # fmt: skip
    requeue: bool = setting(True, "requeue the job where the trainer saved and asked for more time", flags=("--requeue/--no-requeue",))
    max_requeues: int = setting(100, "most restarts of one job", flags=("--max-requeues",))
    exclusive: bool = setting(False, "whole nodes", flags=("--exclusive",))
    hint: str | None = setting(
        None, "how tasks use a core", flags=("--hint",), choices=("compute_bound", "memory_bound", "multithread", "nomultithread")
    )
    nodelist: str | None = setting(None, "nodes that must be among those given", flags=("--nodelist",))
    exclude: str | None = setting(None, "nodes to leave out", flags=("--exclude",))
    array: str | None = setting(
        None, "chain of jobs that go on with one run, one at a time, where requeueing is not allowed", flags=("--array",), metavar="0-9%1"
    )
    array_limit: int | None = setting(None, "tasks of a --sweep that may run at once", flags=("--array-limit",))
    mail_user: str | None = setting(None, "address for mail", flags=("--mail-user",))
    mail_type: str | None = setting(None, "when to send mail, such as END,FAIL", flags=("--mail-type",))
    log_dir: str | None = setting(None, "existing folder of the job's output (default: where it is submitted)", flags=("--log-dir",))
    chdir: str | None = setting(None, "folder to work in (default: where it is submitted)", flags=("--chdir",))
    modules: tuple[str, ...] = setting((), "environment module to load; repeatable", flags=("--module",), metavar="NAME")
    venv: str | None = setting(None, "virtual environment to activate, a whole path", flags=("--venv",))
    command: str = setting("megactl", "how megactl is called on the nodes", flags=("--command",), metavar="'python -m megactl'")
    environment: tuple[str, ...] = setting((), "variable for the ranks; repeatable", flags=("--env",), metavar="NAME=VALUE")
    container_image: str | None = setting(None, "container image (pyxis): a path, or a registry's name", flags=("--container-image",))
    container_mounts: tuple[str, ...] = setting((), "mount (pyxis); repeatable", flags=("--container-mount",), metavar="SRC:DST[:FLAGS]")
    container_workdir: str | None = setting(None, "folder to work in inside the container", flags=("--container-workdir",))
    launcher: str = setting(
        "srun", "who starts the ranks: srun, a task a GPU, or torchrun, a task a node", flags=("--launcher",), choices=("srun", "torchrun")
    )
    sbatch: tuple[str, ...] = setting((), "any other option of sbatch; repeatable", flags=("--sbatch",), metavar="KEY=VALUE")
    srun: tuple[str, ...] = setting((), "any other option of srun; repeatable", flags=("--srun",), metavar="KEY=VALUE")


# Settings that hold KEY=VALUE lines: in TOML they may be a table, and a later layer replaces key by key.
PAIRS = ("environment", "sbatch", "srun")


@functools.cache
def slurm_settings() -> dict[str, Setting]:
    """Every cluster setting by its dotted name ("slurm.account")."""
    return {item.name: item for item in settings_of(SECTION, Slurm)}


def is_list(item: Setting) -> bool:
    """True where a setting holds several values."""
    return item.type is tuple


def defaults() -> dict[str, object]:
    """Key -> default."""
    return {item.name: item.default for item in dataclasses.fields(Slurm)}
