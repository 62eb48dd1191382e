"""From a point of an experiment to a job: its settings over the user's, and a plain word about what this version cannot run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megactl.cluster.experiments import COMMON, GPUS_PER_NODE, Experiment, Row, experiments
from megactl.cluster.job import Job, job_of
from megactl.cluster.load import LoadedCluster
from megactl.cluster.settings import SECTION, slurm_settings
from megactl.config.load import Loaded
from megactl.config.settings import all_settings, names_by_alias, nearest, replace
from megactl.errors import ConfigError, Problem

# Fields of a row whose setting train may not have, and how the setting is called. A field of None or False needs nothing.
_OPTIONAL = {"recompute": "recompute", "vpp": "vpp", "scatter_gather": "scatter_gather"}


@dataclass(frozen=True)
class Need:
    """A setting that a point needs. `available`: this version has it. `varied`: the experiment is about it."""

    name: str
    value: Any
    available: bool
    varied: bool

    @property
    def text(self) -> str:
        """As train would spell it."""
        return f"--{self.name.replace('_', '-')}" + ("" if self.value is True else f" {self.value}")


@dataclass(frozen=True)
class Prepared:
    """A point: its job, or what it needs and this version has not. `without`: needs that the user gave up."""

    row: Row
    job: Job | None
    missing: tuple[Need, ...]
    without: tuple[str, ...]


def needs(experiment: Experiment, row: Row) -> list[Need]:
    """The settings beyond the plain ones that a point has."""
    values = {"recompute": row.recompute and "full", "vpp": row.vpp > 1 and row.vpp, "scatter_gather": row.scatter_gather}
    return [Need(name, value, name in names_by_alias(), name in experiment.varied) for name, value in values.items() if value]


def find_experiment(name: str) -> Experiment:
    """The experiment called `name`. Raises ConfigError with the nearest name."""
    found = experiments().get(name)
    if found is None:
        close = nearest(name, experiments())
        instead = f"did you mean {close}?" if close else f"use one of {', '.join(experiments())}"
        raise ConfigError([Problem(f"--experiment {name}", "no such experiment", instead)])
    return found


def prepare_points(experiment: Experiment, loaded: Loaded, cluster: LoadedCluster, *, without: Sequence[str] = ()) -> list[Prepared]:
    """Every point of an experiment, checked. Raises ConfigError holding every mistake, one that all points share once."""
    rules = [*_fixed(experiment, loaded, cluster), *_without_problems(experiment, without)]
    if rules:
        raise ConfigError(rules)
    found: list[Prepared] = []
    mistakes: dict[Problem, list[str]] = {}
    tried = 0
    for row in experiment.rows:
        wanted = [need for need in needs(experiment, row) if need.name not in without or need.varied]
        missing = tuple(need for need in wanted if not need.available)
        given_up = tuple(need.name for need in needs(experiment, row) if need not in wanted)
        if missing:
            found.append(Prepared(row, None, missing, given_up))
            continue
        tried += 1
        try:
            found.append(Prepared(row, _job(experiment, row, wanted, given_up, loaded, cluster), (), given_up))
        except ConfigError as error:
            for problem in error.problems:
                mistakes.setdefault(problem, []).append(row.point)
    if mistakes:
        raise ConfigError([_of_points(problem, points, tried) for problem, points in mistakes.items()])
    return found


def _of_points(problem: Problem, points: list[str], tried: int) -> Problem:
    if len(points) == tried:
        return problem
    return Problem(f"{', '.join(points)}: {problem.where}", problem.rule, problem.instead)


def _fixed(experiment: Experiment, loaded: Loaded, cluster: LoadedCluster) -> Iterator[Problem]:
    """The user may change what all points have in common, but not what makes them points."""
    rule, instead = f"is what {experiment.name} sets", "leave it out"
    own = {name for row in experiment.rows for name in row.settings()}
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
        if name not in _OPTIONAL:
            close = nearest(name, _OPTIONAL)
            yield Problem(f"--without {name}", "no such part", f"did you mean {close}?" if close else f"use one of {', '.join(_OPTIONAL)}")
        elif name in experiment.varied:
            rule = f"is what {experiment.name} compares, so a point without it would be another point"
            yield Problem(f"--without {name}", rule, "leave it out: the points that do without are rendered")


def _job(
    experiment: Experiment, row: Row, wanted: Collection[Need], given_up: Sequence[str], loaded: Loaded, cluster: LoadedCluster
) -> Job:
    values = {name: value for name, value in COMMON.items() if not loaded.is_set(name)}
    values |= row.settings() | {names_by_alias()[need.name]: need.value for need in wanted}
    origins = {**loaded.origins, **{name: f"{experiment.name} {row.point}" for name in values}}
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
