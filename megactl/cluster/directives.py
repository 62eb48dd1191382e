"""What a job asks Slurm for: the options of its #SBATCH lines, or of salloc, in one order, each with its reason where it needs one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megactl.cluster.formats import clock, seconds_of
from megactl.cluster.job import Job
from megactl.cluster.quoting import Safe, directive, quote


@dataclass(frozen=True)
class Directive:
    """One option, and the comment lines above it. `batch`: only a batch script has it, salloc does not."""

    text: Safe
    comment: tuple[Safe, ...] = ()
    batch: bool = False


# Setting -> option of sbatch, for those that go in as they are.
_PLAIN = {
    "account": "account", "partition": "partition", "qos": "qos", "reservation": "reservation", "constraint": "constraint",
    "nodelist": "nodelist", "exclude": "exclude", "time": "time", "memory": "mem", "hint": "hint",
}  # fmt: skip


def directives(job: Job) -> list[Directive]:
    """Every option of the job."""
    return [*_names(job), *_shape(job), *_plain(job), *_end(job), *_pass_through(job)]


def tasks_per_node(job: Job) -> int:
    """Tasks that srun starts on a node: a rank each, or one torchrun."""
    return 1 if job.cluster.slurm.launcher == "torchrun" else job.ranks_per_node


def cpus_per_task(job: Job) -> int | None:
    """CPUs of a task: torchrun has those of all its ranks."""
    each = job.cluster.slurm.cpus_per_task
    return None if each is None else each * (job.ranks_per_node // tasks_per_node(job))


def log_pattern(job: Job) -> str:
    """Where the output goes, in sbatch's words: %x is the job's name, %j its number, %A and %a those of an array and its task."""
    folder = job.cluster.slurm.log_dir
    name = "%x-%A_%a.out" if job.points or job.cluster.slurm.array else "%x-%j.out"
    return f"{folder.rstrip('/')}/{name}" if folder else name


def _note(*lines: str) -> tuple[Safe, ...]:
    return tuple(quote(line, "comment", name="a comment") for line in lines)


def _names(job: Job) -> Iterator[Directive]:
    slurm = job.cluster.slurm
    yield Directive(directive("job-name", job.name))
    if job.points:
        limit = f"%{slurm.array_limit}" if slurm.array_limit else ""
        yield Directive(directive("array", f"0-{len(job.points) - 1}{limit}"), batch=True)
    if slurm.array:
        yield Directive(directive("array", slurm.array), _note("A chain: each job goes on where the one before it stopped."), batch=True)
    yield Directive(directive("output", log_pattern(job)), batch=True)
    if slurm.requeue:
        yield Directive(directive("open-mode", "append"), _note("A requeued job writes on, it does not start the log anew."), batch=True)
    if slurm.chdir:
        yield Directive(directive("chdir", slurm.chdir))


def _shape(job: Job) -> Iterator[Directive]:
    slurm = job.cluster.slurm
    yield Directive(directive("nodes", job.nodes))
    many = "torchrun starts the ranks of its node" if slurm.launcher == "torchrun" else "one task a rank"
    yield Directive(directive("ntasks-per-node", tasks_per_node(job)), _note(f"Tasks: {many}."))
    cpus = cpus_per_task(job)
    if cpus is not None:
        yield Directive(directive("cpus-per-task", cpus))
    if job.on_gpus and slurm.gpu_request != "none":
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        why = "Every task of a node sees all its GPUs and takes its own: bound to one each, NCCL could not use NVLink on some systems."
        name = "gres" if slurm.gpu_request == "gres" else "gpus-per-node"
        value = f"gpu:{kind}{job.ranks_per_node}" if name == "gres" else f"{kind}{job.ranks_per_node}"
        yield Directive(directive(name, value), _note(why))
    if slurm.exclusive:
        yield Directive(directive("exclusive"))


def _plain(job: Job) -> Iterator[Directive]:
    for key, option in _PLAIN.items():
        value = getattr(job.cluster.slurm, key)
        if value is not None:
            yield Directive(directive(option, clock(seconds_of(value)) if key == "time" else value))


def _end(job: Job) -> Iterator[Directive]:
    slurm = job.cluster.slurm
    if slurm.signal != "none" and slurm.launcher == "srun":
        lines = (
            "Before the time is up every rank gets this signal, saves and exits 75. Without B: it goes to the tasks of srun and not to",
            "this shell. Slurm may send it up to a minute early.",
        )
        yield Directive(directive("signal", slurm.signal), _note(*lines))
    if slurm.requeue and not slurm.array:
        yield Directive(directive("requeue"), _note("Also after a node has failed."), batch=True)
    else:
        yield Directive(directive("no-requeue"), batch=True)
    if slurm.mail_type:
        yield Directive(directive("mail-type", slurm.mail_type))
    if slurm.mail_user:
        yield Directive(directive("mail-user", slurm.mail_user))


def _pass_through(job: Job) -> Iterator[Directive]:
    for entry in job.cluster.slurm.sbatch:
        name, equals, value = entry.partition("=")
        yield Directive(directive(name, value if equals else None))
