"""Schedules that no generator makes yet: interleaved, folded with split backward, and random ones."""

from __future__ import annotations

import random

from megactl.schedules import Schedule, build


def interleaved(num_ranks: int, num_microbatches: int, chunks: int) -> Schedule:
    """Megatron's interleaved 1F1B; micro-batches must be a multiple of ranks."""
    p, total = num_ranks, num_microbatches * chunks

    def unit(index: int, backward: bool) -> tuple[int, int]:
        chunk = index % (p * chunks) // p
        return (chunks - 1 - chunk if backward else chunk), index // (p * chunks) * p + index % p

    orders = []
    for rank in range(p):
        forwards = [("F", unit(i, False)[0] * p + rank, unit(i, False)[1]) for i in range(total)]
        backwards = [("B", unit(i, True)[0] * p + rank, unit(i, True)[1]) for i in range(total)]
        warmup = min(total, 2 * (p - rank - 1) + (chunks - 1) * p)
        order = forwards[:warmup]
        for i in range(total - warmup):
            order += [forwards[warmup + i], backwards[i]]
        orders.append(order + backwards[total - warmup :])
    return build("interleaved", orders, num_microbatches=num_microbatches, stage_to_rank=[stage % p for stage in range(p * chunks)])


def greedy(num_microbatches: int, stage_to_rank: list[int], *, split: bool, seed: int | None = None) -> Schedule:
    """Orders from a list scheduler with unit times: input gradients first, then forwards, then weight gradients.

    With a seed every choice is random instead, so any order that respects the dependencies can come out.
    """
    chooser = random.Random(seed)
    num_stages, num_ranks = len(stage_to_rank), max(stage_to_rank) + 1
    kinds = ("F", "I", "W") if split else ("F", "B")
    todo = [(kind, stage, mb) for mb in range(num_microbatches) for stage in range(num_stages) for kind in kinds]
    done: set[tuple[str, int, int]] = set()
    orders: list[list[tuple[str, int, int]]] = [[] for _ in range(num_ranks)]

    def ready(kind: str, stage: int, mb: int) -> bool:
        if kind == "F":
            return stage == 0 or ("F", stage - 1, mb) in done
        if kind == "W":
            return ("I", stage, mb) in done
        return ("F", stage, mb) in done and (stage == num_stages - 1 or (kind, stage + 1, mb) in done)

    while todo:
        chosen = []
        for rank in range(num_ranks):
            options = [unit for unit in todo if stage_to_rank[unit[1]] == rank and ready(*unit)]
            if options and seed is None:
                chosen.append(min(options, key=lambda unit: ("IBFW".index(unit[0]), unit[2], unit[1])))
            elif options and chooser.random() < 0.7:
                chosen.append(chooser.choice(options))
        for unit in chosen:
            todo.remove(unit)
            done.add(unit)
            orders[stage_to_rank[unit[1]]].append(unit)
    return build("handmade", orders, num_microbatches=num_microbatches, stage_to_rank=stage_to_rank)


def fold(num_ranks: int) -> list[int]:
    """The V-shaped placement: stages go down the ranks and back up, so the last stage is on rank 0."""
    return [*range(num_ranks), *reversed(range(num_ranks))]
