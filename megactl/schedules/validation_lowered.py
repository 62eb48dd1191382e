"""Is a lowered schedule right? Its computations, its transfers one by one, and the absence of communication deadlock."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from megactl.errors import ScheduleError
from megactl.schedules.actions import FORWARD, INPUT_GRADIENT, Exchange, LoweredSchedule
from megactl.schedules.validation import broken, validate
from megactl.schedules.validation_rank import Numbers, RankCheck


def validate_lowered(lowered: LoweredSchedule) -> None:
    """Raise ScheduleError at the first broken rule.

    Checked, besides `validate` on the computations: every tensor between stages of different ranks is sent once, after it was
    produced, and received once, before it is used, in a free slot (activation) or its own (gradient), between the right ranks;
    sends match receives in the same order on every pair; each stage is reduced once, after its last weight gradient; sharded
    stages compute only between UNSHARD and RESHARD; and no deadlock, neither where a rank waits for a batch only when a
    computation needs one of its receives, nor where every batch blocks until each of its members is matched.
    """
    validate(lowered.computations())
    for rank in range(lowered.num_ranks):
        RankCheck(lowered.rank_program(rank)).run()
    check_exchanges(lowered)


def check_exchanges(lowered: LoweredSchedule) -> None:
    """The rules of `validate_lowered` on how ranks meet, which hold for forwards alone as well. Raises ScheduleError.

    Every rank's own program is taken to be right: complete, and each transfer received before it is used.
    """
    numbers = Numbers(lowered)
    steps = [_steps(lowered, rank, numbers) for rank in range(lowered.num_ranks)]
    _check_pairs(lowered, steps, numbers)
    _Rendezvous(lowered, steps, blocking=False).run()
    _Rendezvous(lowered, steps, blocking=True).run()


class _Step(NamedTuple):
    """What an item means for other ranks: `posts` are the ends it posts, `needs` those of the batch that a computation waits for."""

    position: int
    posts: tuple[int, ...]
    needs: tuple[int, ...]


def _check_pairs(lowered: LoweredSchedule, steps: list[list[_Step]], numbers: Numbers) -> None:
    """On every ordered pair of ranks the k-th send must be the k-th receive: backends match by order, not by name."""
    sent: dict[tuple[int, int], list[int]] = {}
    received: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, program in enumerate(lowered.programs):
        for position, posts, _ in steps[rank]:
            if posts:
                for action, end in zip(program[position].actions, posts, strict=True):
                    if end % 2:
                        received.setdefault((action.peer, rank), []).append((position, end // 2))
                    else:
                        sent.setdefault((rank, action.peer), []).append(end // 2)
    for pair in sorted(sent):
        # Equally many: each end's completeness was checked on its own rank.
        for there, (position, here) in zip(sent[pair], received[pair], strict=True):
            if there != here:
                sends = f"which sends the {numbers.transfer(there)} at that point"
                raise broken(pair[1], position, f"receives the {numbers.transfer(here)} from rank {pair[0]}, {sends}")


def _steps(lowered: LoweredSchedule, rank: int, numbers: Numbers) -> list[_Step]:
    """What of one rank's program other ranks have to do with, in order."""
    steps, batch_of = [], {}
    for position, item in enumerate(lowered.programs[rank]):
        if isinstance(item, Exchange):
            batch = tuple(numbers.end(action) for action in item.actions)
            batch_of.update((end // 2, batch) for end in batch if end % 2)
            steps.append(_Step(position, batch, ()))
        elif item.kind is FORWARD or item.kind in INPUT_GRADIENT:
            stage = item.virtual_stage + (-1 if item.kind is FORWARD else 1)
            needed = stage * numbers.count + item.microbatch + (0 if item.kind is FORWARD else numbers.gradients)
            # Nothing at the ends of the pipeline, nor from a stage of the same rank.
            if needed in batch_of:
                steps.append(_Step(position, (), batch_of[needed]))
    return steps


class _Rendezvous:
    """Runs all programs at once under rendezvous: a batch is complete when each of its members is posted at both ends.

    blocking=False: a rank waits for a batch in front of the computation that reads one of its receives, as with asynchronous
    sends and receives. blocking=True: a rank waits for every batch where it posts it.
    """

    def __init__(self, lowered: LoweredSchedule, steps: list[list[_Step]], *, blocking: bool) -> None:
        self.lowered, self.steps, self.blocking = lowered, steps, blocking
        self.next = [0] * lowered.num_ranks
        self.posted = bytearray(Numbers(lowered).ends)
        self.waiting: dict[int, list[int]] = {}

    def run(self) -> None:
        runnable = deque(range(self.lowered.num_ranks))
        while runnable:
            self._advance(runnable.popleft(), runnable)
        stuck = [self._describe(rank) for rank, steps in enumerate(self.steps) if self.next[rank] < len(steps)]
        if stuck:
            kind = "every batch blocks until complete" if self.blocking else "batches complete in the background"
            stuck.append(f"communication deadlock where {kind}")
            raise ScheduleError("; ".join(stuck), "post transfers in one common order on all ranks")

    def _advance(self, rank: int, runnable: deque[int]) -> None:
        """Run a rank until it waits; it is put back on the queue when the end it waits for is posted."""
        steps, posted, waiting = self.steps[rank], self.posted, self.waiting
        for index in range(self.next[rank], len(steps)):
            _, posts, needs = steps[index]
            for end in posts:
                posted[end] = 1
                if end in waiting:
                    runnable.extend(waiting.pop(end))
            # A wait is over when the far ends are there as well.
            for end in posts if self.blocking else needs:
                if not posted[end ^ 1]:
                    waiting.setdefault(end ^ 1, []).append(rank)
                    self.next[rank] = index
                    return
        self.next[rank] = len(steps)

    def _describe(self, rank: int) -> str:
        position, posts, needs = self.steps[rank][self.next[rank]]
        missing = next(end ^ 1 for end in (posts if self.blocking else needs) if not self.posted[end ^ 1])
        item, transfer = self.lowered.programs[rank][position], Numbers(self.lowered).transfer(missing // 2)
        return f"rank {rank}, position {position}: {item} waits for the {'RECV' if missing % 2 else 'SEND'} of the {transfer}"
