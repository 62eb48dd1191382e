"""A checked job: cluster settings and a resolved run that fit each other, with everything a script needs and every mistake said at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megactl.cluster.check import cluster_problems, run_text_problems
from megactl.cluster.load import LoadedCluster
from megactl.config.checks import machine_independent
from megactl.config.load import Loaded
from megactl.config.prepare import Problems
from megactl.config.schema import Run
from megactl.config.validate import Resolved, resolve
from megactl.config.vocabulary import Vocabulary, find_vocabulary
from megactl.errors import ConfigError, Problem

# How a file that is not on this machine is worded; data of the other model is there, and a mistake.
_ABSENT = re.compile(r"^there is no .+\.idx|does not exist")


@dataclass(frozen=True)
class Job:
    """What one script runs. `ranks_per_node` is the GPUs of a node, or on CPUs its tasks. `points`: those of a sweep, else empty.

    `resolved` is the run at this number of ranks (of a sweep: its first point). `notes`: what could not be checked here.
    """

    cluster: LoadedCluster
    loaded: Loaded
    resolved: Resolved
    name: str
    nodes: int
    ranks_per_node: int
    points: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    about: tuple[str, ...] = field(default=())

    @property
    def ranks(self) -> int:
        """All ranks of the job."""
        return self.nodes * self.ranks_per_node

    @property
    def on_gpus(self) -> bool:
        """Whether the ranks have GPUs."""
        return bool(self.cluster.slurm.gpus_per_node)


@dataclass(frozen=True)
class Point:
    """One task of a sweep: a label for its folder, and the settings it changes (dotted name -> text)."""

    label: str
    values: Mapping[str, str]


def job_of(loaded: Loaded, cluster: LoadedCluster, *, points: Sequence[tuple[Point, Loaded]] = (), about: Sequence[str] = ()) -> Job:
    """Check everything and return the job. `points`: a sweep, each with the run it makes. Raises ConfigError holding every mistake."""
    problems = Problems(cluster_problems(cluster))
    runs = [(point.label, run) for point, run in points] or [("", loaded)]
    problems.found += run_text_problems(loaded)
    problems.found += _rules_of_both(loaded, cluster, sweep=bool(points))
    nodes, ranks_per_node = _shape(loaded.run, cluster, problems)
    resolved, notes = [], []
    for label, run in runs:
        found, note = _resolve(run, nodes, ranks_per_node, cluster, problems, label)
        resolved += [found] if found else []
        notes += [text for text in note if text not in notes]
    problems.raise_all()
    return Job(
        cluster=cluster,
        loaded=loaded,
        resolved=resolved[0],
        name=cluster.slurm.job_name or default_name(loaded.run),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        points=tuple(point for point, _ in points),
        notes=tuple(notes),
        about=tuple(about),
    )


def default_name(run: Run) -> str:
    """The job's name where none is given: the preset's or the model's, as train names a run directory."""
    return run.preset or run.model.architecture


def _rules_of_both(loaded: Loaded, cluster: LoadedCluster, *, sweep: bool) -> list[Problem]:
    """Rules between the run and the way it is started."""
    run, slurm, found = loaded.run, cluster.slurm, []
    if run.training.nproc is not None:
        found.append(Problem(f"--nproc {run.training.nproc}", "the job's tasks are the ranks", "use --gpus-per-node and --nodes"))
    if slurm.requeue and run.checkpoint.resume == "never":
        rule = "a requeued job goes on from its own checkpoint"
        found.append(Problem("--resume never with --requeue", rule, "leave --resume out, or use --no-requeue"))
    if slurm.array is not None and sweep:
        rule = "a chain goes on with one run, a sweep has many"
        found.append(Problem(f"{cluster.show('array')} with --sweep", rule, "leave --array out"))
    if slurm.array_limit is not None and not sweep:
        found.append(Problem(cluster.show("array_limit"), "there is no sweep to limit", "give --sweep, or leave it out"))
    wanted = "cuda" if slurm.gpus_per_node else "cpu"
    if slurm.gpus_per_node is not None and run.training.device not in ("auto", wanted):
        rule = "asks for no GPUs" if wanted == "cpu" else "asks for GPUs that the run would not use"
        instead = "give --gpus-per-node" if wanted == "cpu" else "use --gpus-per-node 0 with --ntasks-per-node"
        found.append(Problem(f"{cluster.show('gpus_per_node')} with --device {run.training.device}", rule, instead))
    return found


def _shape(run: Run, cluster: LoadedCluster, problems: Problems) -> tuple[int, int]:
    """(nodes, ranks a node); (0, 0) where they are not known, which is then among the problems."""
    slurm = cluster.slurm
    ranks_per_node = slurm.gpus_per_node or slurm.ntasks_per_node
    if slurm.gpus_per_node is None and (run.training.device == "cuda" or (run.training.device == "auto" and ranks_per_node is None)):
        problems.found.append(Problem("--gpus-per-node", "is not set", "give the GPUs of a node, such as --gpus-per-node 8"))
        return 0, 0
    if ranks_per_node is None:
        problems.found.append(Problem("--ntasks-per-node", "is not set, and there are no GPUs", "give the ranks of a node"))
        return 0, 0
    if min(ranks_per_node, slurm.nodes or 1) < 1:
        return 0, 0
    if slurm.nodes is not None:
        return slurm.nodes, ranks_per_node
    parallel = run.parallel
    if parallel.data_parallel is None:
        problems.found.append(Problem("--nodes", "is not set, and --dp is not either", "give one of them"))
        return 0, 0
    ranks = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel * parallel.data_parallel
    if ranks < 1 or (ranks % ranks_per_node and ranks > ranks_per_node):
        rule = f"tp x pp x cp x dp = {ranks} ranks do not fill nodes of {ranks_per_node}"
        problems.found.append(Problem("--nodes", rule, "change a degree, or the ranks of a node"))
        return 0, 0
    if ranks < ranks_per_node:
        rule = f"tp x pp x cp x dp = {ranks} ranks, and a node has {ranks_per_node}"
        flag = "--gpus-per-node" if slurm.gpus_per_node else "--ntasks-per-node"
        problems.found.append(Problem("--nodes", rule, f"use {flag} {ranks}"))
        return 0, 0
    return ranks // ranks_per_node, ranks_per_node


def _resolve(
    loaded: Loaded, nodes: int, ranks_per_node: int, cluster: LoadedCluster, problems: Problems, label: str
) -> tuple[Resolved | None, list[str]]:
    """The run at this number of ranks, with the rules that train itself has; and what could not be checked on this machine."""
    run, slurm = loaded.run, cluster.slurm
    known = _named(label, problems, lambda: _vocabulary(loaded, cluster))
    vocabulary, notes = known or (Vocabulary(), [])
    if not nodes:
        _named(label, problems, lambda: _raise(machine_independent(run, loaded.origins)))
        return None, notes
    facts: dict[str, Any] = {
        "world_size": nodes * ranks_per_node,
        "local_world_size": ranks_per_node,
        "per_node": ranks_per_node,
        "gpus": slurm.gpus_per_node or 0,
        "spawns": False,
        "vocab_size": vocabulary.size,
        "vocab_source": vocabulary.source,
        "vocab_hint": vocabulary.hint,
        "eod": vocabulary.eod,
        "tokenizer": vocabulary.tokenizer,
    }
    if notes or known is None:
        # Not known on this machine, or a mistake that is noted already: a stand-in keeps it from being reported as a mistake beside it.
        facts |= {"vocab_size": run.model.vocab_size or 2, "eod": 0}
    return _named(label, problems, lambda: resolve(run, origins=loaded.origins, **facts)), notes


def _vocabulary(loaded: Loaded, cluster: LoadedCluster) -> tuple[Vocabulary, list[str]]:
    """The vocabulary as the data here says it; with a note in its place where the data is not on this machine."""
    data = loaded.run.data
    if cluster.slurm.container_image is not None and (data.data or data.tokenizer):
        return Vocabulary(), ["the data and the tokenizer are those inside the container, and were not looked at"]
    try:
        return find_vocabulary(loaded.run), []
    except ConfigError as error:
        # A script may be made where the cluster's disks are not; everything else about the data is a mistake wherever it is seen.
        if all(_ABSENT.search(problem.rule) and "is for --model" not in problem.rule for problem in error.problems):
            return Vocabulary(), [f"{problem}: not on this machine, so it was not looked at" for problem in _short(error)]
        raise


def _short(error: ConfigError) -> list[str]:
    return [f"{problem.where}: {problem.rule}" if problem.where else problem.rule for problem in error.problems]


def _named(label: str, problems: Problems, step: Any) -> Any:
    """The result of `step`; its problems are kept, with the point of the sweep that has them."""
    before = len(problems.found)
    found = problems.catch(step)
    if label:
        problems.found[before:] = [
            Problem(f"point {label}: {problem.where}", problem.rule, problem.instead) for problem in problems.found[before:]
        ]
    return found


def _raise(found: list[Problem]) -> None:
    if found:
        raise ConfigError(found)
