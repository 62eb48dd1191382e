"""Interleaved 1F1B: every rank holds several short stages (model chunks) instead of one long one, which shortens the bubble.

Source: Narayanan et al. 2021 (arXiv:2104.04473, section 2.2), whose schedule is defined where the ranks divide the micro-batches. Here
any number of them runs: they are taken in groups as equal as possible, none smaller than the number of ranks. A group goes through
a rank's first chunk, then through its second, and so on; a smaller one would come back from the last rank too late for that.
"""

from __future__ import annotations

from megactl.schedules.actions import Kind, Order


def group_sizes(num_ranks: int, num_microbatches: int) -> list[int]:
    """Micro-batches of each group: `num_ranks` each where that divides them, else as equal as possible and at least that many.

    Fewer micro-batches than ranks are one group.
    """
    groups = max(1, num_microbatches // num_ranks)
    size, larger = divmod(num_microbatches, groups)
    return [size + (group < larger) for group in range(groups)]


def warmup_forwards(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> int:
    """Forwards of one micro-batch on one chunk before a rank's first backward: 2 (p - rank - 1) + (v - 1) x group; p - rank - 1 if v = 1.

    With chunks a rank is two steps (one forward and one backward each) ahead of the next rank, one for the way there and one for the
    way back. With one stage a rank that lead would shorten nothing, as every forward waits for the rank before it anyway.
    """
    hop = 1 if chunks == 1 else 2
    group = max(group_sizes(num_ranks, num_microbatches))
    return min(num_microbatches * chunks, hop * (num_ranks - rank - 1) + (chunks - 1) * group)


def interleaved_order(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> Order:
    """Warm-up forwards, then one forward and one backward in turn, then the rest; chunks up in forward, down in backward."""
    forwards: list[tuple[Kind | str, int, int]] = []
    backwards: list[tuple[Kind | str, int, int]] = []
    first = 0
    for size in group_sizes(num_ranks, num_microbatches):
        group = range(first, first + size)
        forwards += [(Kind.F, chunk * num_ranks + rank, microbatch) for chunk in range(chunks) for microbatch in group]
        backwards += [(Kind.B, chunk * num_ranks + rank, microbatch) for chunk in reversed(range(chunks)) for microbatch in group]
        first += size
    warmup = warmup_forwards(rank, num_ranks, num_microbatches, chunks)
    order, pairs = [*forwards, *backwards], len(forwards) - warmup
    order[warmup : warmup + 2 * pairs : 2] = forwards[warmup:]
    order[warmup + 1 : warmup + 2 * pairs : 2] = backwards[:pairs]
    order[warmup + 2 * pairs :] = backwards[pairs:]
    return order


def interleaved_max_live(stage: int, num_ranks: int, num_microbatches: int, chunks: int) -> int:
    """Micro-batches one virtual stage holds at once; without interleaving min(m, p - stage).

    A rank is never more than its warm-up and one forward ahead of its backwards. A stage holds most when a group has just passed
    it: all groups up to this one, less the micro-batches whose backward that lead has let through.
    """
    chunk, rank = divmod(stage, num_ranks)
    sizes = group_sizes(num_ranks, num_microbatches)
    lead = warmup_forwards(rank, num_ranks, num_microbatches, chunks) + 1
    before, most = 0, 0
    for size in sizes:
        forwards = chunks * before + (chunk + 1) * size
        # In backward the chunks come in reverse order.
        through = _passed(forwards - lead, chunks - 1 - chunk, chunks, sizes)
        before += size
        most = max(most, before - through)
    return most


def _passed(units: int, turn: int, chunks: int, sizes: list[int]) -> int:
    """Micro-batches that have passed the chunk whose turn is number `turn` in each group, after `units` of all chunks' work."""
    if units <= 0:
        return 0
    larger = sizes.count(sizes[0])
    whole = min(units // (chunks * sizes[0]), larger)
    rest, group, passed = units - whole * chunks * sizes[0], sizes[0], whole * sizes[0]
    if whole == larger and larger < len(sizes):
        group = sizes[-1]
        more, rest = divmod(rest, chunks * group)
        passed += more * group
    return passed + min(max(rest - turn * group, 0), group)


def interleaved_rank_live(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> int:
    """Micro-batches a rank holds at once, summed over its chunks: its warm-up and one more.

    On rank 0, with p dividing m, that is v p + p - 1 chunks of L / (v p) layers: L (1 + (p - 1) / (v p)) layers (Korthikanti et al.
    2022, arXiv:2205.05198, section 4.2.3).
    """
    return min(num_microbatches * chunks, warmup_forwards(rank, num_ranks, num_microbatches, chunks) + 1)
