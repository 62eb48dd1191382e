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

EXIT_SOME_LEFT_OUT = 1
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

    The last column names what a point needs and this version has not.

    Examples:

      megactl slurm experiments

      megactl slurm experiments figure_13 --json
    """
    from megactl.cluster.experiment_jobs import find_experiment
    from megactl.cluster.experiments import experiments

    chosen = [find_experiment(name) for name in names] if names else list(experiments().values())
    if as_json:
        emit_json([_document(experiment) for experiment in chosen])
        return 0
    for experiment in chosen:
        print(f"{experiment.name}: {experiment.title}")
        show_table([*_COLUMNS, "not here yet"], [_cells(experiment, row) for row in experiment.rows], right=range(1, len(_COLUMNS)))
    return 0


def _document(experiment: Experiment) -> dict[str, Any]:
    from megactl.cluster.experiments import CLUSTER, COMMON

    rows = [{**row.as_dict(), "missing": _missing(experiment, row)} for row in experiment.rows]
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "varied": list(experiment.varied),
        "common": COMMON,
        "slurm": CLUSTER,
        "rows": rows,
    }


def _cells(experiment: Experiment, row: Row) -> list[str | None]:
    values = row.as_dict()
    return [*(str(values[field]) for field in _COLUMNS.values()), ", ".join(_missing(experiment, row)) or None]


def _missing(experiment: Experiment, row: Row) -> list[str]:
    from megactl.cluster.experiment_jobs import needs

    return [need.text for need in needs(experiment, row) if not need.available]


def render_experiment(options: Mapping[str, Any], loaded: Loaded, cluster: LoadedCluster) -> int:
    """Write one script a point, submit-all.sh, index.json and the folder of logs. Exit code 1 where some points could not be written."""
    from megactl.cluster.experiment_jobs import find_experiment, prepare_points

    experiment = find_experiment(options["experiment"])
    without = [name for text in options["without"] or () for name in text.split(",")]
    folder = Path(options["output_dir"] or experiment.name)
    _check_folder(folder, overwrite=options["overwrite"])
    prepared = prepare_points(experiment, loaded, cluster, without=without)
    written = [item for item in prepared if item.job is not None]
    left_out = [item for item in prepared if item.job is None]
    if not written:
        raise ConfigError([_nothing_left(experiment, left_out)])
    index = _write(experiment, prepared, folder, cluster)
    for note in dict.fromkeys(note for item in written if item.job for note in item.job.notes):
        say(note, label="note")
    if left_out:
        say(f"{_left_out_text(experiment, left_out)}: {', '.join(item.row.point for item in left_out)}", label="warning")
    if options["as_json"]:
        emit_json(index)
    else:
        print(f"{experiment.name}: {len(written)} scripts in {folder}")
        print(f"next: bash {folder}/submit-all.sh --test-only, then without --test-only")
    return EXIT_SOME_LEFT_OUT if left_out else 0


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    from megactl.cluster.quoting import broken_rule

    rule = broken_rule(f"{folder}/{LOGS}/x", "directive")
    if rule is not None:
        raise ConfigError([Problem(f"--output-dir {folder}", rule, "choose another folder: the jobs' logs go there")])
    if folder.exists() and not folder.is_dir():
        raise ConfigError([Problem(f"--output-dir {folder}", "is a file", "choose another folder")])
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError([Problem(f"--output-dir {folder}", "is not empty", "choose another folder, or add --overwrite")])


def _left_out_text(experiment: Experiment, left_out: Sequence[Prepared]) -> str:
    missing = ", ".join(dict.fromkeys(need.text for item in left_out for need in item.missing))
    return f"{len(left_out)} of {len(experiment.rows)} points of {experiment.name} need {missing}, which is not part of this version"


def _nothing_left(experiment: Experiment, left_out: Sequence[Prepared]) -> Problem:
    """All points need what is not here: what to give up, where that leaves points of the experiment."""
    free = list(dict.fromkeys(need.name for item in left_out for need in item.missing if not need.varied))
    stays = all(any(need.varied for need in item.missing) for item in left_out)
    instead = None if stays or not free else f"add --without {','.join(free)}, but speed and memory will not be the paper's"
    return Problem(f"--experiment {experiment.name}", _left_out_text(experiment, left_out), instead)


def _write(experiment: Experiment, prepared: Sequence[Prepared], folder: Path, cluster: LoadedCluster) -> dict[str, Any]:
    import dataclasses
    import json

    from megactl.cluster.render import render
    from megactl.commands.slurm_render import write_script

    log_dir = cluster.slurm.log_dir or f"{folder}/{LOGS}"
    points, left_out = [], []
    for item in prepared:
        if item.job is None:
            left_out.append({"point": item.row.point, "missing": [need.text for need in item.missing]})
            continue
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
        "left_out": left_out,
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
