"""`megactl slurm experiments`, and `render --experiment`: the SC21 experiments as lists and as folders of scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.common import emit_json, say
from megactl.commands.tables import show_table
from megactl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megactl.cluster.experiment_jobs import Prepared
    from megactl.cluster.experiments import Experiment, Row
    from megactl.cluster.load import LoadedCluster
    from megactl.config.load import Loaded

_COLUMNS = {
    "point": "point", "layers": "layers", "hidden": "hidden", "heads": "heads", "tp": "tp", "pp": "pp", "dp": "dp", "vpp": "vpp",
    "mbs": "micro_batch_size", "gbs": "global_batch_size", "nodes": "nodes", "GPUs": "gpus",
}  # fmt: skip
LOGS = "logs"


def list_experiments(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Such as figure_13 (default: all).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> int:
    """List Table 1 and Figures 11 to 18 of the SC21 paper (arXiv:2104.04473): every point with its exact parameters.

    The last column has the techniques that a point uses; `slurm render --without` leaves them out.

    Examples:

      megactl slurm experiments

      megactl slurm experiments figure_13 --json
    """
    from megactl.cluster.experiments import experiments, find_experiment

    chosen = [find_experiment(name) for name in names] if names else list(experiments().values())
    if as_json:
        emit_json([_document(experiment) for experiment in chosen])
        return 0
    for experiment in chosen:
        print(f"{experiment.name}: {experiment.title}")
        show_table([*_COLUMNS, "with"], [_cells(row) for row in experiment.rows], right=range(1, len(_COLUMNS)))
    return 0


def _document(experiment: Experiment) -> dict[str, Any]:
    from megactl.cluster.experiments import CLUSTER, COMMON

    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "varied": list(experiment.varied),
        "common": COMMON,
        "slurm": CLUSTER,
        "rows": [row.as_dict() for row in experiment.rows],
    }


def _cells(row: Row) -> list[str | None]:
    values = row.as_dict()
    flags = (_flag(name, value) for name, value in row.techniques().items())
    return [*(str(values[field]) for field in _COLUMNS.values()), " ".join(flags) or None]


def _flag(name: str, value: Any) -> str:
    """A technique as train spells it."""
    flag = name.replace("_", "-")
    return f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {value}"


def render_experiment(options: Mapping[str, Any], loaded: Loaded, cluster: LoadedCluster) -> int:
    """Write one script a point, submit-all.sh, index.json and the folder of logs."""
    from megactl.cluster.experiment_jobs import prepare_points
    from megactl.cluster.experiments import find_experiment

    experiment = find_experiment(options["experiment"])
    without = [name for text in options["without"] or () for name in text.split(",")]
    folder = Path(options["output_dir"] or experiment.name)
    _check_folder(folder, overwrite=options["overwrite"])
    prepared = prepare_points(experiment, loaded, cluster, without=without)
    index = _write(experiment, prepared, folder, cluster)
    for note in dict.fromkeys(note for item in prepared for note in item.job.notes):
        say(note, label="note")
    if options["as_json"]:
        emit_json(index)
    else:
        print(f"{experiment.name}: {len(prepared)} scripts in {folder}")
        print(f"next: bash {folder}/submit-all.sh --test-only, then without --test-only")
    return 0


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    from megactl.cluster.quoting import broken_rule

    rule = broken_rule(f"{folder}/{LOGS}/x", "directive")
    if rule is not None:
        raise ConfigError([Problem(f"--output-dir {folder}", rule, "choose another folder: the jobs' logs go there")])
    if folder.exists() and not folder.is_dir():
        raise ConfigError([Problem(f"--output-dir {folder}", "is a file", "choose another folder")])
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError([Problem(f"--output-dir {folder}", "is not empty", "choose another folder, or add --overwrite")])


def _write(experiment: Experiment, prepared: Sequence[Prepared], folder: Path, cluster: LoadedCluster) -> dict[str, Any]:
    import dataclasses
    import json

    from megactl.cluster.render import render
    from megactl.commands.slurm_render import write_script

    log_dir = cluster.slurm.log_dir or f"{folder}/{LOGS}"
    points = []
    for item in prepared:
        own = dataclasses.replace(item.job.cluster, slurm=dataclasses.replace(item.job.cluster.slurm, log_dir=log_dir))
        job = dataclasses.replace(item.job, cluster=own)
        write_script(folder / f"{job.name}.sh", render(job), overwrite=True)
        points.append(_entry(item, job.name, log_dir))
    if cluster.slurm.log_dir is None:
        (folder / LOGS).mkdir(exist_ok=True)
    index = {
        "schema_version": 1,
        "experiment": experiment.name,
        "title": experiment.title,
        "x": experiment.varied[0],
        "series": list(experiment.varied[1:]),
        "points": points,
    }
    write_script(folder / "submit-all.sh", _submit_all(experiment, points, folder, log_dir), overwrite=True)
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


def _entry(item: Prepared, name: str, log_dir: str) -> dict[str, Any]:
    """A point in index.json: where its script and logs are, and its parameters."""
    return {
        "point": item.row.point,
        "job_name": name,
        "script": f"{name}.sh",
        "logs": f"{log_dir}/{name}-*.out",
        "without": list(item.without),
        "changed": item.changed,
        "parameters": item.row.as_dict(),
    }


def _submit_all(experiment: Experiment, points: Sequence[Mapping[str, Any]], folder: Path, log_dir: str) -> str:
    from megactl.cluster.quoting import quote, words
    from megactl.cluster.render import render_template

    values = {
        "count": len(points),
        "experiment": quote(experiment.name, "comment", name="--experiment"),
        "path": quote(f"{folder}/submit-all.sh", "comment", name="--output-dir"),
        "log_dir": words(log_dir),
        "missing": words(f"there is no folder {log_dir} here: run this where it was rendered, or make the folder"),
        "scripts": [words(point["script"]) for point in points],
    }
    return render_template("submit-all.sh.j2", values)
