"""From degrees and a number of ranks to a layout: the rule, and the nearest layout that keeps it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megactl.config.schema import Run
from megactl.config.shown import Names, nearest_multiples
from megactl.errors import Problem

# GPUs of a node where nothing is known of it.
_USUAL_NODE = 8


@dataclass(frozen=True)
class Ranks:
    """How many ranks there are. `visible`: devices of this machine that the run could use; None where a launcher decided the number.

    `nproc`: the number comes from --nproc. `on_cpus`: any number of ranks could be started here. `per_node`: the number is that of a
    job that is not started yet, with so many ranks on each node.
    """

    world_size: int
    visible: int | None = None
    nproc: bool = False
    on_cpus: bool = False
    per_node: int | None = None

    @property
    def text(self) -> str:
        """The number, worded for a message."""
        if self.per_node is not None:
            return f"{self.world_size // self.per_node} x {self.per_node} are asked for"
        if self.visible is None:
            return f"{self.world_size} were started"
        return f"--nproc starts {self.world_size}" if self.nproc else f"this machine has {self.world_size}"


def layout_problem(run: Run, ranks: Ranks, names: Names) -> Problem | None:
    """tp x pp x cp must divide the ranks, and --dp must be the rest. Degrees must be at least 1."""
    parallel = run.parallel
    model_ranks = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
    where = _degrees(names)
    if ranks.world_size % model_ranks:
        return Problem(where, f"needs {_needed(model_ranks, ranks)} ranks, {ranks.text}", _other_layout(run, ranks, model_ranks))
    replicas = ranks.world_size // model_ranks
    if parallel.data_parallel in (None, replicas):
        return None
    wanted = model_ranks * parallel.data_parallel
    if ranks.per_node is not None:
        more = f", or {_nodes(wanted, ranks.per_node)}" if wanted % ranks.per_node == 0 else ""
        return Problem(where, f"needs {wanted} ranks, {ranks.text}", f"use --dp {replicas}{more}")
    other = f", or --nproc {wanted}" if ranks.visible is not None and (wanted <= ranks.visible or ranks.on_cpus) else ""
    rule = f"needs {wanted} ranks, {ranks.text}"
    if wanted > ranks.world_size and not other:
        return Problem(where, rule, f"use --dp {replicas}, or {_on_a_cluster(wanted, ranks)}")
    return Problem(where, rule, f"use --dp {replicas}{other}")


def _degrees(names: Names) -> str:
    """The degrees above 1, as flags; all-ones is worded by the first."""
    parallel = names.run.parallel
    values = {
        "parallel.tensor_parallel": parallel.tensor_parallel,
        "parallel.pipeline_parallel": parallel.pipeline_parallel,
        "parallel.context_parallel": parallel.context_parallel,
        "parallel.data_parallel": parallel.data_parallel or 1,
    }
    return " ".join(names.show(name) for name, value in values.items() if value > 1) or names.show("parallel.tensor_parallel")


def _needed(model_ranks: int, ranks: Ranks) -> str:
    return str(model_ranks) if model_ranks > ranks.world_size else f"a multiple of {model_ranks}"


def _other_layout(run: Run, ranks: Ranks, model_ranks: int) -> str:
    tp, pp, cp = nearest_layout(run, ranks.world_size)
    flags = " ".join([f"--tp {tp}", f"--pp {pp}", *([f"--cp {cp}"] if cp > 1 else [])])
    if ranks.per_node is not None:
        return f"try {flags}, or {_nodes(math.lcm(model_ranks, ranks.per_node), ranks.per_node)}"
    if model_ranks > ranks.world_size:
        other = f"--nproc {model_ranks}" if ranks.nproc and ranks.on_cpus else _on_a_cluster(model_ranks, ranks)
        return f"try {flags}, or {other}"
    if ranks.visible is not None:
        return f"try {flags}, or --nproc {ranks.world_size // model_ranks * model_ranks}"
    return f"try {flags}, or start {nearest_multiples(ranks.world_size, model_ranks)} ranks"


def _nodes(needed: int, per_node: int) -> str:
    return f"--nodes {needed // per_node}"


def _on_a_cluster(needed: int, ranks: Ranks) -> str:
    """The options with which `megactl slurm render` takes this run: nodes like this one, where they can be filled."""
    each = max(number for number in range(1, min(needed, ranks.visible or _USUAL_NODE) + 1) if needed % number == 0)
    per_node = f"--ntasks-per-node {each}" if ranks.on_cpus else f"--gpus-per-node {each}"
    return f"megactl slurm render --nodes {needed // each} {per_node}"


def nearest_layout(run: Run, world_size: int) -> tuple[int, int, int]:
    """(tp, pp, cp) that divides `world_size` and fits the model, no degree above the one asked for: tp kept first, then cp, then pp.

    (1, 1, 1) always fits, so there is always an answer.
    """
    parallel, model = run.parallel, run.model
    fitting = [
        (tp, cp, pp)
        for tp in _divisors(model.key_value_heads, parallel.tensor_parallel)
        for cp in range(1, parallel.context_parallel + 1)
        if run.training.seq_length % sequence_unit(run, cp) == 0
        for pp in _divisors(model.num_layers, parallel.pipeline_parallel)
        if world_size % (tp * cp * pp) == 0
    ]
    tp, cp, pp = max(fitting)
    return tp, pp, cp


def sequence_unit(run: Run, context_parallel: int) -> int:
    """What the sequence length must be a multiple of. Under a causal ring each rank holds two chunks, so that all have the same work."""
    causal_ring = run.parallel.context_method == "ring" and run.model.architecture == "gpt"
    return context_parallel * (2 if causal_ring and context_parallel > 1 else 1)


def _divisors(whole: int, largest: int) -> list[int]:
    return [number for number in range(1, min(whole, largest) + 1) if whole % number == 0]


def degrees(run: Run, world_size: int) -> dict[str, int]:
    """The degrees of a resolved run by their short names, innermost axis first."""
    parallel = run.parallel
    data_parallel = parallel.data_parallel
    assert data_parallel is not None, "the run is not resolved"
    assert parallel.tensor_parallel * parallel.context_parallel * data_parallel * parallel.pipeline_parallel == world_size
    return {"tp": parallel.tensor_parallel, "cp": parallel.context_parallel, "dp": data_parallel, "pp": parallel.pipeline_parallel}
