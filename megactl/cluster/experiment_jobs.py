"""From a point of an experiment to a job: its settings over the user's, and in its script what is not as the paper's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megactl.cluster.experiments import COMMON, GPUS_PER_NODE, Experiment, Row
from megactl.cluster.job import Job, job_of
from megactl.cluster.load import LoadedCluster
from megactl.cluster.settings import Slurm
from megactl.config.load import Loaded
from megactl.config.names import nearest
from megactl.config.settings import all_settings, names_by_alias, replace
from megactl.errors import ConfigError, Problem

# What --without may name.
TECHNIQUES = ("recompute", "vpp", "scatter_gather")


@dataclass(frozen=True)
class Prepared:
    """A point and its job. `without`: techniques of the paper's run that the user gave up; `changed`: what else is not the paper's."""

    row: Row
    job: Job
    without: tuple[str, ...]
    changed: dict[str, Any]


def prepare_points(experiment: Experiment, loaded: Loaded, cluster: LoadedCluster, *, without: Sequence[str] = ()) -> list[Prepared]:
    """Every point of an experiment, checked. Raises ConfigError holding every mistake, one that all points share once."""
    rules = [*_fixed(experiment, loaded, cluster, without), *_without_problems(experiment, without)]
    if rules:
        raise ConfigError(rules)
    found: list[Prepared] = []
    mistakes: dict[Problem, list[str]] = {}
    for row in experiment.rows:
        given_up = tuple(name for name in row.techniques() if name in without)
        try:
            found.append(Prepared(row, _job(experiment, row, given_up, loaded, cluster), given_up, changed(row, loaded)))
        except ConfigError as error:
            for problem in error.problems:
                # The origin of a value names its point, which would keep a mistake that all points share from being one.
                shared = dataclasses.replace(problem, where=problem.where.replace(_origin(experiment, row), experiment.name))
                mistakes.setdefault(shared, []).append(row.point)
    if mistakes:
        raise ConfigError([_of_points(problem, points, len(experiment.rows)) for problem, points in mistakes.items()])
    return found


def _of_points(problem: Problem, points: list[str], all_points: int) -> Problem:
    if len(points) == all_points:
        return problem
    return Problem(f"{', '.join(points)}: {problem.where}", problem.rule, problem.instead)


def varied_settings(experiment: Experiment) -> set[str]:
    """The settings (dotted names) that the points differ in: what makes them points."""
    by_alias = names_by_alias()
    points = [row.settings() | {by_alias[name]: value for name, value in row.techniques().items()} for row in experiment.rows]
    return {name for point in points for name in point if len({other.get(name) for other in points}) > 1}


def _fixed(experiment: Experiment, loaded: Loaded, cluster: LoadedCluster, without: Sequence[str]) -> Iterator[Problem]:
    """The user may change what all points have in common, but not what makes them points."""
    rule, instead = f"is what {experiment.name} sets", "leave it out"
    techniques = {names_by_alias()[name] for row in experiment.rows for name in row.techniques() if name not in without}
    for name in all_settings():
        if name in varied_settings(experiment) | techniques and loaded.is_set(name):
            yield Problem(f"{all_settings()[name].flag} ({loaded.origins[name]})", rule, instead)
    if loaded.run.preset is not None:
        yield Problem(f"--preset {loaded.run.preset}", rule, instead)
    if loaded.run.logging.run_dir is not None:
        yield Problem(f"--run-dir {loaded.run.logging.run_dir}", "every point has its own", instead)
    for key in ("nodes", "job_name", "array", "array_limit"):
        if cluster.origins[key] != "default":
            yield Problem(cluster.show(key), rule, instead)
    key = "gpus_per_node" if cluster.slurm.gpus_per_node else "ntasks_per_node"
    each = getattr(cluster.slurm, key)
    if each and any(_ranks(row, loaded) > each and _ranks(row, loaded) % each for row in experiment.rows):
        yield Problem(cluster.show(key), "must divide the ranks of every point", f"use {GPUS_PER_NODE} or another power of 2")


def _without_problems(experiment: Experiment, without: Sequence[str]) -> Iterator[Problem]:
    for name in without:
        if name not in TECHNIQUES:
            close = nearest(name, TECHNIQUES)
            yield Problem(f"--without {name}", "no such part", f"did you mean {close}?" if close else f"use one of {', '.join(TECHNIQUES)}")
        elif name in experiment.varied:
            rule = f"is what {experiment.name} compares, so a point without it would be another point"
            yield Problem(f"--without {name}", rule, "leave it out: the points that do without are rendered")


def _origin(experiment: Experiment, row: Row) -> str:
    return f"{experiment.name} {row.point}"


def changed(row: Row, loaded: Loaded) -> dict[str, Any]:
    """The parameters of a point that the user set to another value than the paper's, by their dotted names."""
    settings = all_settings()
    given = {name: settings[name].read(loaded.run) for name in row.settings() if loaded.is_set(name)}
    return {name: value for name, value in given.items() if value != row.settings()[name]}


def _ranks(row: Row, loaded: Loaded) -> int:
    values = row.settings() | changed(row, loaded)
    return math.prod(values[f"parallel.{axis}_parallel"] or 1 for axis in ("tensor", "pipeline", "data"))


def _job(experiment: Experiment, row: Row, given_up: Sequence[str], loaded: Loaded, cluster: LoadedCluster) -> Job:
    own = {name: value for name, value in (COMMON | row.settings()).items() if not loaded.is_set(name)}
    own |= {names_by_alias()[name]: value for name, value in row.techniques().items() if name not in given_up}
    origins = {**loaded.origins, **{name: _origin(experiment, row) for name in own}}
    about = [f"Point {row.point} of {experiment.name} in Narayanan et al., SC21, arXiv:2104.04473: {experiment.title}."]
    about += [f"The paper's run had {name.replace('_', '-')}; this one goes without." for name in given_up]
    for name, value in changed(row, loaded).items():
        about.append(f"The paper's run had {all_settings()[name].flag} {row.settings()[name]}; this one has {value}.")
    run = Loaded(replace(loaded.run, own), origins)
    slurm = _on_nodes(dataclasses.replace(cluster.slurm, job_name=job_name(experiment, row)), _ranks(row, loaded))
    return job_of(run, dataclasses.replace(cluster, slurm=slurm), about=about)


def _on_nodes(slurm: Slurm, ranks: int) -> Slurm:
    """Full nodes for the ranks of a point; a point of fewer ranks has a part of one."""
    key = "gpus_per_node" if slurm.gpus_per_node else "ntasks_per_node"
    each = min(getattr(slurm, key) or ranks, ranks)
    return dataclasses.replace(slurm, nodes=ranks // each, **{key: each})


def job_name(experiment: Experiment, row: Row) -> str:
    """The name of a point's job, script and log, by which its results are found again."""
    return f"{experiment.name}-{row.point}"
