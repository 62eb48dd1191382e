"""Zero-bubble schedules: backward in two parts, so that weight gradients, for which nobody waits, fill the gaps.

I (input gradient) is on the pipeline's critical path; W (weight gradient) may come any time after it. ZB-H1 and ZB-H2: Qi et al. 2023,
arXiv:2401.10241, section 2 (its figure 3). ZB-V: Qi et al. 2024, arXiv:2405.15362, V-ZB. All three are built for equal times of
F, I and W.
"""

from __future__ import annotations

from megactl.schedules.actions import Kind, Order


def _handcrafted(rank: int, num_ranks: int, num_microbatches: int, factor: int) -> Order:
    """`factor` (p - 1 - rank) warm-up forwards, then F and I in turn, with W behind its I by `factor` x rank micro-batches.

    The lead in forwards shrinks along the ranks as much as the lag of the weight gradients grows: each rank holds factor (p - 1) + 1.
    """
    lead, lag = factor * (num_ranks - 1 - rank), factor * rank
    order: list[tuple[Kind | str, int, int]] = [(Kind.F, rank, microbatch) for microbatch in range(min(lead, num_microbatches))]
    for microbatch in range(num_microbatches):
        if microbatch + lead < num_microbatches:
            order.append((Kind.F, rank, microbatch + lead))
        order.append((Kind.I, rank, microbatch))
        if microbatch >= lag:
            order.append((Kind.W, rank, microbatch - lag))
    done = max(0, num_microbatches - lag)
    return order + [(Kind.W, rank, microbatch) for microbatch in range(done, num_microbatches)]


def zb_h1_order(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> Order:
    """1F1B's forwards; its backward gap is filled with W, in 1F1B's memory."""
    del chunks
    return _handcrafted(rank, num_ranks, num_microbatches, 1)


def zb_h2_order(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> Order:
    """Twice the warm-up: the gap before the first backward is filled with forwards as well."""
    del chunks
    return _handcrafted(rank, num_ranks, num_microbatches, 2)


def handcrafted_max_live(num_ranks: int, num_microbatches: int, factor: int) -> int:
    """Micro-batches every stage of ZB-H1 (factor 1: p) and ZB-H2 (factor 2: 2p - 1) holds at once (arXiv:2401.10241, table 1)."""
    return min(num_microbatches, factor * (num_ranks - 1) + 1)


def v_place(stage: int, num_ranks: int, chunks: int) -> int:
    """Down the ranks with the first p stages and up again with the rest: the first and the last stage share rank 0."""
    del chunks
    return stage if stage < num_ranks else 2 * num_ranks - 1 - stage


def zb_v_order(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> Order:
    """Both chunks of a rank in turn, F I W each; warm-up and end are cut so that every rank is busy from its first F to its last W.

    The pattern needs 2p - 1 micro-batches. With fewer it is made for so many, and those that do not exist are left out: what a
    micro-batch waits for is its own, so an order stays right when others go.
    """
    del chunks
    full = _ZbV(rank, num_ranks, max(num_microbatches, 2 * num_ranks - 1)).order()
    return [action for action in full if action[2] < num_microbatches]


class _ZbV:
    """Writes one rank's order; each kind and chunk counts its own micro-batches, which come in order."""

    def __init__(self, rank: int, num_ranks: int, num_microbatches: int) -> None:
        self.rank, self.num_ranks, self.num_microbatches = rank, num_ranks, num_microbatches
        self.stages = (rank, 2 * num_ranks - 1 - rank)
        self.written: list[tuple[Kind | str, int, int]] = []
        self.count = {(kind, chunk): 0 for kind in (Kind.F, Kind.I, Kind.W) for chunk in (0, 1)}

    def order(self) -> Order:
        down, up, ranks = 0, 1, self.num_ranks
        # Until the first micro-batch is back from the last rank of the V.
        for _ in range(2 * (ranks - self.rank) - 1):
            self._next(down, Kind.F)
        for _ in range(self.rank):
            self._next(up, Kind.F)
            self._next(down, Kind.F)
        # Until the first gradient is back from there.
        for _ in range(ranks - self.rank):
            self._next(up, Kind.F, Kind.I, Kind.W)
        while self.count[Kind.F, up] < self.num_microbatches:
            forward = (Kind.F,) if self.count[Kind.F, down] < self.num_microbatches else ()
            self._next(down, *forward, Kind.I, Kind.W)
            self._next(up, Kind.F, Kind.I, Kind.W)
        # The neighbours wait for these input gradients; the weight gradients come behind.
        for _ in range(self.rank):
            self._next(down, Kind.I)
            self._next(up, Kind.I)
        for _ in range(ranks - self.rank):
            self._next(down, Kind.I, Kind.W)
        for chunk in (up, down):
            while self.count[Kind.W, chunk] < self.num_microbatches:
                self._next(chunk, Kind.W)
        return self.written

    def _next(self, chunk: int, *kinds: Kind) -> None:
        for kind in kinds:
            self.written.append((kind, self.stages[chunk], self.count[kind, chunk]))
            self.count[kind, chunk] += 1


def zb_v_max_live(stage: int, num_ranks: int, num_microbatches: int, chunks: int) -> int:
    """Micro-batches one stage of ZB-V holds at once: 2p - rank on the way down, rank + 1 on the way up."""
    rank = v_place(stage, num_ranks, chunks)
    return min(num_microbatches, 2 * num_ranks - rank if stage < num_ranks else rank + 1)


def zb_v_rank_live(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> int:
    """Micro-batches both chunks of a rank hold at once: 2p half stages on every rank, which is 1F1B's p whole ones on rank 0."""
    del rank, chunks
    return min(2 * num_microbatches, 2 * num_ranks)
