"""`megactl slurm render`: a run's settings and a cluster's -> a script."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.cluster.settings import SECTION, slurm_settings
from megactl.commands.common import columns, emit_json, say, size
from megactl.commands.schema_options import dressed, flag_annotation, parameter, setting_parameters, unknown_options
from megactl.config.flags import Flag, flags_of, given
from megactl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megactl.cluster.job import Job
    from megactl.cluster.load import LoadedCluster
    from megactl.config.load import Loaded

_HELP = "\n\n".join(
    (
        "Write a Slurm script that runs `megactl train` with these settings.",
        "It takes the options of train (see below, and megactl train --help) and what to ask Slurm for. Everything is checked now: the "
        "layout against the nodes and GPUs, the data where it can be seen, and every value that goes into the script. Each cluster "
        "setting is also a key of section slurm in the file of --config or --cluster, --set slurm.KEY=VALUE, and MEGACTL_SLURM_KEY.",
        "The script saves before its time is up, requeues itself and goes on where it stopped.",
    )
)
_EPILOG = """Examples:

megactl slurm render --preset gpt-7.5b --tp 8 --pp 4 --dp 2 --data corpus_text_document --gpus-per-node 8 --time 24:00:00 > train.sh

megactl slurm render --config run.toml --cluster cluster.toml --run-dir runs/a --output train.sh

megactl slurm render --config run.toml --nodes 2 --gpus-per-node 8 --sweep lr=1e-4,3e-4 --sweep seed=1,2 --output sweep.sh

megactl slurm render --config run.toml --nodes 1 --gpus-per-node 8 --interactive --output try.sh

megactl slurm render --experiment figure_13 --without recompute --cluster cluster.toml --data corpus_text_document"""

_ASKED = "Slurm: what to ask for"
_STARTED = "Slurm: how it is started"
_HOW = ("modules", "venv", "command", "environment", "container_image", "container_mounts", "container_workdir", "launcher", "srun",
        "signal", "requeue", "max_requeues", "array", "array_limit", "log_dir", "chdir")  # fmt: skip


def _cluster_flags() -> list[Flag]:
    return list(flags_of(slurm_settings().values()))


def _options() -> list[inspect.Parameter]:
    """The command's own options, then the cluster's, then those of train."""
    texts = {
        "preset": ("--preset", "NAME", "Start from a named model, such as gpt-345m"),
        "config": ("--config", "FILE.toml", "Settings of the run from a TOML file, with its section slurm"),
        "cluster": ("--cluster", "FILE.toml", "Settings of the cluster alone, below those of --config"),
        "sweep_file": ("--sweep-file", "FILE.csv", "An array with a task a row; the header names settings"),
        "output": ("--output -o", "FILE", "Write the script there (default: stdout)"),
        "experiment": ("--experiment", "NAME", "A script a point of an SC21 experiment, see megactl slurm experiments"),
        "output_dir": ("--output-dir", "FOLDER", "With --experiment: where to write (default: its name)"),
    }
    lists = {
        "assignments": ("--set", "SECTION.KEY=VALUE", "Any one setting, slurm.KEY included; repeatable"),
        "sweep": ("--sweep", "SETTING=V,V,...", "An array with a task a value; repeatable: every combination"),
        "without": ("--without", "PART", "With --experiment: do without recompute, vpp or scatter_gather; repeatable"),
    }
    switches = {
        "interactive": ("--interactive", "A script to run, which asks for the nodes with salloc, in place of one for sbatch"),
        "overwrite": ("--overwrite", "Replace a file that exists"),
        "cluster_template": ("--cluster-template", "Print a cluster file to fill in, for --cluster"),
        "as_json": ("--json", "One JSON document on stdout: the script and what it asks for"),
    }
    found = [parameter("ctx", typer.Context, inspect.Parameter.empty)]
    found += [parameter(n, Annotated[str | None, typer.Option(*f.split(), metavar=m, help=h)], None) for n, (f, m, h) in texts.items()]
    found += [parameter(n, Annotated[list[str] | None, typer.Option(f, metavar=m, help=h)], None) for n, (f, m, h) in lists.items()]
    found += [parameter(n, Annotated[bool, typer.Option(f, help=h)], False) for n, (f, h) in switches.items()]
    for flag in _cluster_flags():
        found.append(parameter(flag.parameter, flag_annotation(flag, _STARTED if flag.setting.key in _HOW else _ASKED), None))
    return [*found, *setting_parameters()]


@dressed(_options(), help=_HELP, epilog=_EPILOG)
def render(**options: Any) -> int:
    """Run the command; the help text is `_HELP`, the options are made from the schema and the cluster's settings."""
    from megactl.cluster.render import template_folder

    if options["cluster_template"]:
        sys.stdout.write((template_folder() / "cluster.toml").read_text(encoding="utf-8"))
        return 0
    from megactl.config.prepare import Problems

    problems = Problems(_contradictions(options))
    both = problems.catch(lambda: load_both(options))
    problems.raise_all()
    assert both is not None
    if options["experiment"]:
        from megactl.commands.slurm_experiments import render_experiment

        return render_experiment(options, *both)
    return _render_one(options, *both)


def _render_one(options: Mapping[str, Any], loaded: Loaded, cluster: LoadedCluster) -> int:
    from megactl.cluster.job import job_of
    from megactl.cluster.render import render as script_of
    from megactl.cluster.sweep import sweep_points
    from megactl.config.prepare import Problems

    swept = bool(options["sweep"] or options["sweep_file"])
    problems = Problems()
    points = (problems.catch(lambda: sweep_points(loaded, options["sweep"] or (), options["sweep_file"])) or []) if swept else []
    job = problems.catch(lambda: job_of(loaded, cluster, points=points))
    problems.raise_all()
    assert job is not None
    text = script_of(job, interactive=options["interactive"])
    for note in job.notes:
        say(note, label="note")
    _deliver(job, text, options)
    return 0


def _contradictions(options: Mapping[str, Any]) -> list[Problem]:
    found = []
    if options["interactive"] and (options["sweep"] or options["sweep_file"]):
        found.append(Problem("--interactive with --sweep", "an allocation runs one run", "leave one out"))
    if options["output"] is not None and "%" in options["output"]:
        found.append(Problem(f"--output {options['output']}", "is the script, not its log", "use --log-dir for the log's folder"))
    if options["experiment"]:
        given_too = [f"--{name.replace('_', '-')}" for name in ("sweep", "sweep_file", "interactive", "output") if options[name]]
        found += [Problem(f"{name} with --experiment", "an experiment is a folder of scripts", "leave one out") for name in given_too]
    else:
        needless = [f"--{name.replace('_', '-')}" for name in ("output_dir", "without") if options[name]]
        found += [Problem(name, "belongs to --experiment, which is not given", "leave it out, or name one") for name in needless]
    return found


def load_both(options: Mapping[str, Any]) -> tuple[Loaded, LoadedCluster]:
    """The run and the cluster settings as the user set them; every mistake of both at once."""
    from megactl.cluster.experiments import CLUSTER
    from megactl.cluster.load import load_cluster
    from megactl.config.load import load
    from megactl.config.prepare import Problems

    problems = Problems(unknown_options(options["ctx"], "slurm render"))
    run_flags = problems.catch(lambda: given(options)) or {}
    cluster_flags = problems.catch(lambda: given(options, _cluster_flags())) or {}
    assignments = options["assignments"] or []
    own = [text for text in assignments if text.strip().startswith(f"{SECTION}.")]
    sources = {"preset": options["preset"], "config": options["config"], "assignments": [text for text in assignments if text not in own]}
    loaded = problems.catch(lambda: load(**sources, flags=run_flags, environ=os.environ))
    keys = {name.partition(".")[2]: value for name, value in cluster_flags.items()}
    files = {"cluster": options["cluster"], "config": options["config"]}
    lowest = CLUSTER if options["experiment"] else {}
    cluster = problems.catch(lambda: load_cluster(**files, assignments=own, flags=keys, environ=os.environ, layer_defaults=lowest))
    problems.raise_all()
    assert loaded is not None and cluster is not None
    return loaded, cluster


def _deliver(job: Job, text: str, options: Mapping[str, Any]) -> None:
    """The script to its file or to stdout, and what to do with it on stderr."""
    path = options["output"]
    if path is not None:
        write_script(Path(path), text, overwrite=options["overwrite"])
    if options["as_json"]:
        emit_json({"script": path, "text": text, **describe(job, interactive=options["interactive"])})
        return
    if path is None:
        sys.stdout.write(text)
        return
    for line in columns([(f"{label}:", value) for label, value in _facts(job, path, interactive=options["interactive"])]):
        print(line)


def write_script(path: Path, text: str, *, overwrite: bool) -> None:
    """Write an executable file, whole or not at all. Raises ConfigError where it exists and may not be replaced."""
    from megactl.storage.durable import replace_file

    if path.exists() and not overwrite:
        raise ConfigError([Problem(f"--output {path}", "exists", "choose another name, or add --overwrite")])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode(), f"render-{os.getpid()}")
    path.chmod(0o755)


def describe(job: Job, *, interactive: bool) -> dict[str, Any]:
    """What the script asks for and runs, for --json."""
    from megactl.cluster.directives import directives, log_pattern
    from megactl.config.layout import degrees

    return {
        "name": job.name,
        "nodes": job.nodes,
        "ranks_per_node": job.ranks_per_node,
        "world_size": job.ranks,
        "layout": degrees(job.resolved.run, job.ranks),
        "launcher": job.cluster.slurm.launcher,
        "sbatch": [str(item.text) for item in directives(job) if not (interactive and item.batch)],
        "log": None if interactive else log_pattern(job),
        "run_dir": job.loaded.run.logging.run_dir,
        "points": [{"label": point.label, "settings": dict(point.values)} for point in job.points],
        "memory_bytes": _memory(job),
        "notes": list(job.notes),
    }


def _memory(job: Job) -> int | None:
    """Predicted bytes of the fullest rank; None where the vocabulary is not known here."""
    from megactl.commands.train import memory_of

    return None if job.notes else memory_of(job.resolved)["largest_rank_bytes"]


def _facts(job: Job, path: str, *, interactive: bool) -> Iterator[tuple[str, str]]:
    document = describe(job, interactive=interactive)
    layout = " x ".join(f"{axis} {degree}" for axis, degree in document["layout"].items())
    yield "script", path
    yield "ranks", f"{job.ranks} = {layout}, on {job.nodes} x {job.ranks_per_node}"
    if document["memory_bytes"] is not None:
        yield "memory", f"{size(document['memory_bytes'])} on the fullest rank, predicted"
    if job.points:
        yield "points", f"{len(job.points)}: {', '.join(point.label for point in job.points[:4])}{', ...' if len(job.points) > 4 else ''}"
    log_dir = job.cluster.slurm.log_dir
    first = f"mkdir -p {log_dir} && " if log_dir and not interactive else ""
    yield "next", f"bash {path}" if interactive else f"{first}sbatch {path}"
