"""A checked job as the text of a script, through the templates in templates/slurm. Only `Safe` text and numbers can be printed."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megactl.cluster.command import option_words, train_words
from megactl.cluster.directives import cpus_per_task, directives, tasks_per_node
from megactl.cluster.formats import seconds_of, signal_seconds
from megactl.cluster.job import Job
from megactl.cluster.quoting import Safe, quote, words
from megactl.config.coerce import coerce
from megactl.config.layout import degrees
from megactl.config.settings import Setting, all_settings
from megactl.config.slurm import PORT_BASE, PORT_SPAN
from megactl.errors import BuildError

if TYPE_CHECKING:
    from jinja2 import Environment


def render(job: Job, *, interactive: bool = False) -> str:
    """The script of `job`: for sbatch (an array where it has points), or for a shell on the login node with `interactive`."""
    template = "interactive.sh.j2" if interactive else "array.sh.j2" if job.points else "train.sh.j2"
    return render_template(template, context(job))


def render_template(name: str, values: Mapping[str, Any]) -> str:
    """One template of templates/slurm with `values`, which are numbers, `Safe` text, or lists and mappings of them."""
    return environment().get_template(name).render(values)


def template_folder() -> Path:
    """Where the templates are: inside an installed package, beside it in a source tree. Raises BuildError where they are missing."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "templates" / "slurm", package.parent / "templates" / "slurm"):
        if (folder / "train.sh.j2").is_file():
            return folder
    raise BuildError("the Slurm templates are missing from this installation", "install megactl again")


@functools.cache
def environment() -> Environment:
    """Jinja with the one rule of this room: what is printed must have passed `quote`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(template_folder()),
        undefined=StrictUndefined,
        finalize=_only_safe,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _only_safe(value: Any) -> Any:
    assert isinstance(value, (Safe, int)) and not isinstance(value, bool), f"a template prints {value!r}, which has not passed quote()"
    return value


def context(job: Job) -> dict[str, Any]:
    """What the templates print."""
    slurm, run = job.cluster.slurm, job.resolved.run
    asked = directives(job)
    own_run_dir = job.loaded.run.logging.run_dir is None
    return {
        "name": quote(job.name, "directive", name="--job-name"),
        "about": [quote(line, "comment", name="a comment") for line in job.about],
        "layout": Safe(" x ".join(f"{axis} {degree}" for axis, degree in degrees(run, job.ranks).items())),
        "shape": Safe(_shape(job)),
        "ranks": job.ranks,
        "has_chdir": slurm.chdir is not None,
        "directives": asked,
        "salloc_options": Safe(" ".join(words(item.text) for item in asked if not item.batch)),
        "modules": words(*slurm.modules) if slurm.modules else None,
        "venv": quote(slurm.venv.rstrip("/"), "shell", name="--venv") if slurm.venv else None,
        "variables": [_assignment(entry) for entry in slurm.environment],
        "omp_threads": Safe('"${SLURM_CPUS_PER_TASK:-1}"') if slurm.launcher == "srun" else slurm.cpus_per_task or 1,
        "on_gpus": job.on_gpus,
        "own_run_dir": own_run_dir,
        "run_dir": None if own_run_dir else quote(str(job.loaded.run.logging.run_dir), "shell", name="--run-dir"),
        "chain": slurm.array is not None,
        "requeue": slurm.requeue and slurm.array is None,
        "max_requeues": slurm.max_requeues,
        "points": [_point(job, index) for index in range(len(job.points))],
        **_launch(job),
    }


def _shape(job: Job) -> str:
    what = "GPU" if job.on_gpus else "task"
    return f"{job.nodes} node{'s' * (job.nodes != 1)} of {job.ranks_per_node} {what}{'s' * (job.ranks_per_node != 1)}"


def _assignment(entry: str) -> Safe:
    name, _, value = entry.partition("=")
    # The name was checked to be one; only the value needs quotes.
    return Safe(f"{name}={quote(value, 'shell', name=f'--env {name}')}")


def _launch(job: Job) -> dict[str, Any]:
    """Everything about srun, torchrun and the command itself."""
    slurm = job.cluster.slurm
    program = shlex.split(slurm.command)
    torchrun, inner = _torchrun(program) if slurm.launcher == "torchrun" else (None, program)
    return {
        "port_base": PORT_BASE,
        "port_span": PORT_SPAN,
        "nodes": job.nodes,
        "tasks": job.nodes * tasks_per_node(job),
        "tasks_per_node": tasks_per_node(job),
        "ranks_per_node": job.ranks_per_node,
        "cpus_per_task": cpus_per_task(job),
        "srun_options": [words(f"--{entry}") for entry in (*_container(job), *slurm.srun)],
        "torchrun": words(*torchrun) if torchrun else None,
        "torchrun_program": words(*inner) if torchrun else None,
        "train_program": words("train") if torchrun else words(*program, "train"),
        "train_options": [words(*option) for option in _train_options(job)],
    }


def _container(job: Job) -> list[str]:
    """pyxis' options. They stand on srun: the script itself must run outside, where scontrol is."""
    slurm = job.cluster.slurm
    found = [f"container-image={slurm.container_image}"] if slurm.container_image else []
    found += [f"container-mounts={','.join(slurm.container_mounts)}"] if slurm.container_mounts else []
    return found + ([f"container-workdir={slurm.container_workdir}"] if slurm.container_workdir else [])


def _torchrun(program: list[str]) -> tuple[list[str], list[str]]:
    """(torchrun's words, what follows its options) for the program: `python -m megactl` through its Python, a command by its path."""
    if program[-2:] == ["-m", "megactl"]:
        return [*program[:-2], "-m", "torch.distributed.run"], ["-m", "megactl"]
    folder = program[0].rpartition("/")[0]
    return [f"{folder}/torchrun" if folder else "torchrun"], ["--no-python", *program]


def _train_options(job: Job) -> list[list[str]]:
    slurm, run = job.cluster.slurm, job.loaded.run
    # Said outright: where a GPU is broken, auto would train on the CPU without a word.
    more = {"training.device": "cuda" if job.on_gpus else "cpu"}
    if job.ranks_per_node == 1 and slurm.launcher == "srun":
        # One task a node could also mean: start a rank on each GPU that is seen there.
        more["training.nproc"] = "1"
    limit = seconds_of(slurm.time) if slurm.time else None
    if slurm.launcher == "torchrun" and limit is not None and slurm.signal != "none" and not run.training.exit_duration:
        # torchrun dies of the signal before its ranks can save, so they watch the time themselves.
        more["training.exit_duration"] = f"{(limit - signal_seconds(slurm.signal)) / 60:g}"
    swept = {name for point in job.points for name in point.values}
    return train_words(job.loaded, more=more, leave_out={"logging.run_dir", *swept})


def _typed(item: Setting, text: str) -> object:
    """A swept value: numbers as the user wrote them (1e-4), a switch or "none" as what it means."""
    value = coerce(item, text)
    return value if value is None or isinstance(value, bool) else text


def _point(job: Job, index: int) -> dict[str, Any]:
    point = job.points[index]
    options = [option_words(all_settings()[name], _typed(all_settings()[name], text)) for name, text in point.values.items()]
    return {
        "label": quote(point.label, "shell", name="the point's label"),
        "options": words(*(word for option in options for word in option)),
    }
