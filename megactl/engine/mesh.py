"""Degrees to process groups. A `Mesh` is passed to whoever needs it; no group lives in a global.

Axes, innermost first: tp, cp, dp, pp. Rank = tp + TP * (cp + CP * (dp + DP * pp)), so that the ranks of one tensor-parallel
group, which talk most, are neighbours on one host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megactl.config.schema import Parallel
from megactl.costmodel import parameters
from megactl.engine.collectives import Group, all_reduce, exchange

AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True)
class Axis:
    """One axis seen from this rank: how many ranks, which of them, their group (None when alone), their global ranks in order."""

    size: int = 1
    rank: int = 0
    group: Group | None = None
    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Mesh:
    """This rank's place among all ranks, and the groups it talks to."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    tp: Axis = field(default_factory=Axis)
    cp: Axis = field(default_factory=Axis)
    dp: Axis = field(default_factory=Axis)
    pp: Axis = field(default_factory=Axis)
    # All ranks that hold the same weights (cp within dp): they sum their gradients and share the optimizer's state.
    replicas: Axis = field(default_factory=Axis)
    # The ranks of this column that hold the first and the last stage, the two holders of a tied embedding. None unless this rank is
    # one of two; a schedule that folds the stages has both on one.
    embedding: Axis | None = None
    # The whole world over gloo, for objects (checkpoint entries, agreement): None when alone.
    objects: Group | None = None

    def coordinates(self) -> dict[str, int]:
        """This rank's index on each axis."""
        return {name: getattr(self, name).rank for name in AXES}


def coordinates_of(rank: int, sizes: dict[str, int]) -> dict[str, int]:
    """Index of `rank` on each axis."""
    place = {}
    for name in AXES:
        rank, place[name] = divmod(rank, sizes[name])
    return place


def axis_ranks(names: Sequence[str], place: dict[str, int], sizes: dict[str, int]) -> list[int]:
    """Global ranks, in order, of the axis through `place` that `names` (innermost first) span together."""
    inner_last = [range(sizes[name]) for name in reversed(names)]
    return [rank_of({**place, **dict(zip(reversed(names), indices, strict=True))}, sizes) for indices in itertools.product(*inner_last)]


def rank_of(place: dict[str, int], sizes: dict[str, int]) -> int:
    """Global rank of a place."""
    rank = 0
    for name in reversed(AXES):
        rank = rank * sizes[name] + place[name]
    return rank


def degrees(parallel: Parallel) -> dict[str, int]:
    """Sizes of the axes of a resolved `Parallel`."""
    return {
        "tp": parallel.tensor_parallel,
        "cp": parallel.context_parallel,
        "dp": parallel.data_parallel or 1,
        "pp": parallel.pipeline_parallel,
    }


def stage_ranks(parallel: Parallel) -> tuple[int, ...]:
    """The pipeline rank that holds each virtual stage of a run, in the order of the model."""
    return parameters.stage_ranks(parallel.pipeline_parallel, parallel.schedule, parallel.virtual_pipeline)


def build_mesh(parallel: Parallel, device: torch.device) -> Mesh:
    """Make the groups of every axis; every rank of the default process group must call this together.

    Raises ValueError when the degrees do not multiply to the world size (the configuration checks that before).
    """
    sizes = degrees(parallel)
    world = sizes["tp"] * sizes["cp"] * sizes["dp"] * sizes["pp"]
    if world == 1 and not dist.is_initialized():
        return Mesh(device=device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world != world_size:
        raise ValueError(f"tp {sizes['tp']} x cp {sizes['cp']} x dp {sizes['dp']} x pp {sizes['pp']} = {world} ranks, but {world_size} run")
    axes = {name: _build_axis((name,), rank, sizes) for name in AXES}
    # A second communicator for the same ranks would cost memory and a connection for nothing.
    axes["replicas"] = axes["dp"] if sizes["cp"] == 1 else _build_axis(("cp", "dp"), rank, sizes)
    stages = stage_ranks(parallel)
    embedding = _embedding_axis(rank, sizes, (stages[0], stages[-1]))
    objects = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo")
    if device.type == "cuda":
        groups = {id(axis.group): axis.group for axis in (*axes.values(), embedding) if axis is not None and axis.group is not None}
        _connect(list(groups.values()), (axes["pp"], axes["cp"]), device)
    return Mesh(device=device, rank=rank, world_size=world_size, **axes, embedding=embedding, objects=objects)


def _connect(groups: list[Group], rings: Sequence[Axis], device: torch.device) -> None:
    """Make NCCL's communicators and the connections between neighbours of `rings` now, each by a small transfer.

    NCCL makes both at first use, on the host, waiting there for the other side. In the first step that can be for ever: a stage waits
    for its neighbour to connect for a gradient, with an activation behind it in the same exchange; the neighbour loads the kernels of
    its first backward, which waits for all kernels under way, and one of them is the receive of that activation.
    """
    for group in (None, *groups):
        all_reduce(torch.zeros(1, device=device), group)
    for axis in rings:
        if axis.size == 1:
            continue
        after, before = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[(axis.rank - 1) % axis.size]
        sent, received = torch.zeros(2, device=device), torch.zeros(2, device=device)
        for target, source in ((after, before), (before, after)):
            for work in exchange([(sent, target)], [(received, source)], axis.group)[1]:
                work.wait()
    torch.cuda.synchronize(device)


def _build_axis(names: Sequence[str], rank: int, sizes: dict[str, int]) -> Axis:
    mine = axis_ranks(names, coordinates_of(rank, sizes), sizes)
    if len(mine) == 1:
        return Axis(ranks=(rank,))
    groups = sorted({tuple(axis_ranks(names, coordinates_of(r, sizes), sizes)) for r in range(dist.get_world_size())})
    # new_group is collective: every rank makes every group, in one order, and keeps its own.
    group = None
    for ranks in groups:
        made = dist.new_group(list(ranks))
        if list(ranks) == mine:
            group = made
    return Axis(len(mine), mine.index(rank), group, tuple(mine))


def _embedding_axis(rank: int, sizes: dict[str, int], holders: tuple[int, int]) -> Axis | None:
    """`holders`: the pipeline ranks of the first and the last stage."""
    if holders[0] == holders[1]:
        return None
    found = None
    columns = sorted({tuple(axis_ranks(("pp",), coordinates_of(r, sizes), sizes)) for r in range(dist.get_world_size())})
    for column in columns:
        ends = (column[holders[0]], column[holders[1]])
        made = dist.new_group(list(ends))
        if rank in ends:
            found = Axis(2, ends.index(rank), made, ends)
    return found
