"""The order of an evaluation: forwards alone, over any placement of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from megactl.schedules.actions import Kind, Programs, Schedule


def forward_only(stage_to_rank: Sequence[int], num_microbatches: int) -> Schedule:
    """Every micro-batch once through every stage, each rank always at work on the furthest stage that is ready.

    Whatever goes furthest first leaves the pipeline soonest. In slots of one forward, an evaluation takes v m + (p - 1) where stages are
    interleaved, and 2 m + 2 (p - 1) on a V: it is filled and emptied once. Orders are found by running all ranks in such slots.
    """
    num_ranks, last = max(stage_to_rank) + 1, len(stage_to_rank) - 1
    ready: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    ready[stage_to_rank[0]] = [(0, m) for m in range(num_microbatches)]
    heapify(ready[stage_to_rank[0]])
    orders: list[list[tuple[Kind, int, int]]] = [[] for _ in range(num_ranks)]
    while any(ready):
        done = [(rank, *heappop(queue)) for rank, queue in enumerate(ready) if queue]
        for rank, behind, m in done:
            stage = -behind
            orders[rank].append((Kind.F, stage, m))
            if stage < last:
                heappush(ready[stage_to_rank[stage + 1]], (-(stage + 1), m))
    return Schedule("forward", num_ranks, num_microbatches, last + 1, tuple(stage_to_rank), Programs(orders))
