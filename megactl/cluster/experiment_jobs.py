"""From a point of an experiment to a job: its settings over the user's, and what a point does without, said in its script."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megactl.cluster.experiments import COMMON, GPUS_PER_NODE, Experiment, Row
from megactl.cluster.job import Job, job_of
from megactl.cluster.load import LoadedCluster
from megactl.cluster.settings import SECTION, slurm_settings
from megactl.config.load import Loaded
from megactl.config.names import nearest
from megactl.config.settings import all_settings, names_by_alias, replace
from megactl.errors import ConfigError, Problem

# What --without may name.
TECHNIQUES = ("recompute", "vpp", "scatter_gather")


@dataclass(frozen=True)
class Prepared:
    """A point and its job. `without`: techniques of the paper's run that the user gave up."""

    row: Row
    job: Job
    without: tuple[str, ...]


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
            found.append(Prepared(row, _job(experiment, row, given_up, loaded, cluster), given_up))
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


def _fixed(experiment: Experiment, loaded: Loaded, cluster: LoadedCluster, without: Sequence[str]) -> Iterator[Problem]:
    """The user may change what all points have in common, but not what makes them points."""
    rule, instead = f"is what {experiment.name} sets", "leave it out"
    own = {name for row in experiment.rows for name in row.settings()}
    own |= {names_by_alias()[name] for row in experiment.rows for name in row.techniques() if name not in without}
    for name in all_settings():
        if name in own and loaded.is_set(name):
            yield Problem(f"{all_settings()[name].flag} ({loaded.origins[name]})", rule, instead)
    if loaded.run.preset is not None:
        yield Problem(f"--preset {loaded.run.preset}", rule, instead)
    if loaded.run.logging.run_dir is not None:
        yield Problem(f"--run-dir {loaded.run.logging.run_dir}", "every point has its own", instead)
    for key in ("nodes", "job_name", "array", "array_limit"):
        if cluster.origins[key] != "default":
            yield Problem(cluster.show(key), rule, instead)
    gpus = cluster.slurm.gpus_per_node
    if gpus and any(row.gpus % gpus for row in experiment.rows):
        yield Problem(cluster.show("gpus_per_node"), "must divide the GPUs of every point", f"use {GPUS_PER_NODE}")
    if gpus == 0:
        flag = slurm_settings()[f"{SECTION}.gpus_per_node"].flag
        yield Problem(f"{flag} 0", "the experiments run on GPUs", f"use {flag} {GPUS_PER_NODE}")


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


def _job(experiment: Experiment, row: Row, given_up: Sequence[str], loaded: Loaded, cluster: LoadedCluster) -> Job:
    values = {name: value for name, value in COMMON.items() if not loaded.is_set(name)} | row.settings()
    values |= {names_by_alias()[name]: value for name, value in row.techniques().items() if name not in given_up}
    origins = {**loaded.origins, **{name: _origin(experiment, row) for name in values}}
    slurm = dataclasses.replace(
        cluster.slurm, nodes=row.gpus // (cluster.slurm.gpus_per_node or GPUS_PER_NODE), job_name=job_name(experiment, row)
    )
    about = [f"Point {row.point} of {experiment.name} in Narayanan et al., SC21, arXiv:2104.04473: {experiment.title}."]
    about += [f"The paper's run had {name.replace('_', '-')}; this one goes without." for name in given_up]
    run = Loaded(replace(loaded.run, values), origins)
    return job_of(run, dataclasses.replace(cluster, slurm=slurm), about=about)


def job_name(experiment: Experiment, row: Row) -> str:
    """The name of a point's job, script and log, by which its results are found again."""
    return f"{experiment.name}-{row.point}"
