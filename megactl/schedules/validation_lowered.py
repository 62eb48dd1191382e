"""Is a lowered schedule right? Its computations, its transfers one by one, and the absence of communication deadlock."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from megactl.errors import ScheduleError
from megactl.schedules.actions import (
    COMPUTE,
    INPUT_GRADIENT,
    NONE,
    WEIGHT_GRADIENT,
    Action,
    Exchange,
    Item,
    Kind,
    LoweredSchedule,
    Transfer,
)
from megactl.schedules.validation import broken, validate


def validate_lowered(lowered: LoweredSchedule) -> None:
    """Raise ScheduleError at the first broken rule.

    Checked, besides `validate` on the computations: every tensor between stages of different ranks is sent once, after it was
    produced, and received once, before it is used, in a free slot (activation) or its own (gradient), between the right ranks;
    sends match receives in the same order on every pair; each stage is reduced once, after its last weight gradient; sharded
    stages compute only between UNSHARD and RESHARD; and no deadlock, neither where a rank waits for a batch only when a
    computation needs one of its receives, nor where every batch blocks until each of its members is matched.
    """
    computations = lowered.computations()
    validate(computations)
    for rank, program in enumerate(lowered.programs):
        _RankCheck(lowered, rank, computations.programs[rank]).run(program)
    check_exchanges(lowered)


def check_exchanges(lowered: LoweredSchedule) -> None:
    """The rules of `validate_lowered` on how ranks meet, which hold for forwards alone as well. Raises ScheduleError.

    Every rank's own program is taken to be right: complete, and each transfer received before it is used.
    """
    _check_pairs(lowered)
    numbers = _Numbers(lowered)
    steps = [_steps(lowered, rank, numbers) for rank in range(lowered.num_ranks)]
    _Rendezvous(lowered, steps, blocking=False).run()
    _Rendezvous(lowered, steps, blocking=True).run()


class _Numbers:
    """Transfers as numbers, since a long schedule has millions: the tensor that a stage produces for a micro-batch.

    An end of a transfer is twice that, plus one at the receiver, so that the two ends differ in the last bit.
    """

    def __init__(self, lowered: LoweredSchedule) -> None:
        self.count, self.gradients = lowered.num_microbatches, lowered.num_stages * lowered.num_microbatches
        self.ends = 4 * self.gradients

    def end(self, action: Action) -> int:
        """That of a SEND or RECV whose stage and micro-batch exist, at its own side."""
        kind, stage, microbatch, _, payload, _ = action
        forward = payload == "activation"
        if kind is Kind.RECV:
            return 2 * ((stage - 1 if forward else stage + 1) * self.count + microbatch + (0 if forward else self.gradients)) + 1
        return 2 * (stage * self.count + microbatch + (0 if forward else self.gradients))

    def transfer(self, number: int) -> Transfer:
        """The transfer in words."""
        backward, rest = divmod(number, self.gradients)
        stage, microbatch = divmod(rest, self.count)
        return Transfer("gradient", stage, stage - 1, microbatch) if backward else Transfer("activation", stage, stage + 1, microbatch)


class _Step(NamedTuple):
    """What an item means for other ranks: `posts` are the ends it posts, `needs` those of the batch that a computation waits for."""

    position: int
    posts: tuple[int, ...]
    needs: tuple[int, ...]


class _RankCheck:
    """Walks one rank's program and keeps what is in hand: outputs to send, inputs received, slot owners, unsharded stages."""

    def __init__(self, lowered: LoweredSchedule, rank: int, computations: tuple[Action, ...]) -> None:
        self.lowered, self.rank, self.numbers = lowered, rank, _Numbers(lowered)
        self.slots = {(a.virtual_stage, a.microbatch): a.slot for a in computations}
        self.to_send: set[int] = set()
        self.received: set[int] = set()
        self.owners: dict[tuple[int, int], int] = {}
        self.gradients_left = {stage: lowered.num_microbatches for stage in lowered.stages_of(rank)}
        self.reduced: set[int] = set()
        self.sharded = {a.virtual_stage for a in lowered.programs[rank] if isinstance(a, Action) and a.kind in (Kind.UNSHARD, Kind.RESHARD)}
        self.gathered: set[int] = set()

    def run(self, program: tuple[Item, ...]) -> None:
        for position, item in enumerate(program):
            if isinstance(item, Exchange):
                self._exchange(position, item.actions)
            elif item.kind in COMPUTE:
                self._compute(position, item)
            else:
                self._whole_stage(position, item)
        self._finish()

    def _exchange(self, position: int, actions: tuple[Action, ...]) -> None:
        if not actions:
            raise broken(self.rank, position, "an exchange without sends or receives")
        for action in actions:
            self._check_ends(position, action)
            end = self.numbers.end(action)
            (self._receive if end % 2 else self._send)(position, action, end // 2)

    def _check_ends(self, position: int, action: Action) -> None:
        if action.kind not in (Kind.SEND, Kind.RECV) or action.payload not in ("activation", "gradient"):
            raise broken(self.rank, position, f"{action} in an exchange; only SEND and RECV of an activation or gradient belong there")
        ahead = (action.kind is Kind.SEND) == (action.payload == "activation")
        other = action.virtual_stage + (1 if ahead else -1)
        if action.virtual_stage not in self.gradients_left or not 0 <= other < self.lowered.num_stages or other in self.gradients_left:
            raise broken(self.rank, position, f"{action} does not move a tensor between a stage of this rank and one of another")
        owner = self.lowered.stage_to_rank[other]
        if action.peer != owner:
            raise broken(self.rank, position, f"{action} names rank {action.peer}; stage {other} is on rank {owner}")
        if self.slots.get((action.virtual_stage, action.microbatch)) != action.slot:
            raise broken(self.rank, position, f"{action} names another slot than the micro-batch's computations")

    def _send(self, position: int, action: Action, transfer: int) -> None:
        if transfer not in self.to_send:
            raise broken(self.rank, position, f"{action}: nothing to send, it was not produced yet or was sent already")
        self.to_send.remove(transfer)

    def _receive(self, position: int, action: Action, transfer: int) -> None:
        if transfer in self.received:
            raise broken(self.rank, position, f"{action}: received twice")
        self.received.add(transfer)
        buffer = (action.virtual_stage, action.slot)
        if action.payload == "activation":
            if buffer in self.owners:
                raise broken(self.rank, position, f"{action} fills a slot in which micro-batch {self.owners[buffer]} is still live")
            self.owners[buffer] = action.microbatch
        elif self.owners.get(buffer) != action.microbatch:
            raise broken(self.rank, position, f"{action} comes before its micro-batch is live in the slot")

    def _compute(self, position: int, action: Action) -> None:
        kind, stage, microbatch, slot, _, _ = action
        number = stage * self.numbers.count + microbatch
        if kind is Kind.F:
            self._move(position, action, stage - 1, number - self.numbers.count, stage + 1, number)
            # That no other micro-batch is live in it is known from `validate`, or from its receive.
            self.owners[stage, slot] = microbatch
        elif kind in INPUT_GRADIENT:
            number += self.numbers.gradients
            self._move(position, action, stage + 1, number + self.numbers.count, stage - 1, number)
        if stage in self.sharded and stage not in self.gathered:
            raise broken(self.rank, position, f"{action} runs while the weights of its stage are sharded")
        if kind in WEIGHT_GRADIENT:
            self.gradients_left[stage] -= 1
            del self.owners[stage, slot]

    def _move(self, position: int, action: Action, source: int, needed: int, target: int, made: int) -> None:
        """A computation that reads transfer `needed` from stage `source` and makes `made` for stage `target`, where they are others'."""
        if 0 <= source < self.lowered.num_stages and source not in self.gradients_left and needed not in self.received:
            raise broken(self.rank, position, f"{action} runs before the {self.numbers.transfer(needed)} is received")
        if 0 <= target < self.lowered.num_stages and target not in self.gradients_left:
            self.to_send.add(made)

    def _whole_stage(self, position: int, action: Action) -> None:
        stage = action.virtual_stage
        if action.kind in (Kind.SEND, Kind.RECV):
            raise broken(self.rank, position, f"{action} stands alone; sends and receives are posted in an exchange")
        if (action.microbatch, action.slot, action.payload, action.peer) != (NONE, NONE, None, None) or stage not in self.gradients_left:
            raise broken(self.rank, position, f"{action} must name a stage of this rank and nothing else")
        if action.kind is Kind.REDUCE:
            if stage in self.reduced or self.gradients_left[stage]:
                state = "is already reduced" if stage in self.reduced else f"still lacks {self.gradients_left[stage]} weight gradients"
                raise broken(self.rank, position, f"{action}: the stage {state}")
            self.reduced.add(stage)
        elif (stage in self.gathered) == (action.kind is Kind.UNSHARD):
            raise broken(self.rank, position, f"{action}: UNSHARD and RESHARD of a stage must alternate")
        else:
            self.gathered ^= {stage}

    def _finish(self) -> None:
        if self.to_send:
            raise broken(self.rank, None, f"the {self.numbers.transfer(min(self.to_send))} is never sent")
        for stage in self.gradients_left:
            if stage not in self.reduced:
                raise broken(self.rank, None, f"stage {stage} is never reduced")
        if self.gathered:
            raise broken(self.rank, None, f"stage {min(self.gathered)} stays unsharded at the end")


def _check_pairs(lowered: LoweredSchedule) -> None:
    """On every ordered pair of ranks the k-th send must be the k-th receive: backends match by order, not by name."""
    numbers = _Numbers(lowered)
    sent: dict[tuple[int, int], list[int]] = {}
    received: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, program in enumerate(lowered.programs):
        for position, item in enumerate(program):
            for action in item.actions if isinstance(item, Exchange) else ():
                assert action.peer is not None
                end = numbers.end(action)
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


def _steps(lowered: LoweredSchedule, rank: int, numbers: _Numbers) -> list[_Step]:
    """What of one rank's program other ranks have to do with, in order."""
    steps, batch_of = [], {}
    for position, item in enumerate(lowered.programs[rank]):
        if isinstance(item, Exchange):
            batch = tuple(numbers.end(action) for action in item.actions)
            batch_of.update((end // 2, batch) for end in batch if end % 2)
            steps.append(_Step(position, batch, ()))
        elif item.kind is Kind.F or item.kind in INPUT_GRADIENT:
            stage = item.virtual_stage + (-1 if item.kind is Kind.F else 1)
            needed = stage * numbers.count + item.microbatch + (0 if item.kind is Kind.F else numbers.gradients)
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
        self.posted = bytearray(_Numbers(lowered).ends)
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
        item, transfer = self.lowered.programs[rank][position], _Numbers(self.lowered).transfer(missing // 2)
        return f"rank {rank}, position {position}: {item} waits for the {'RECV' if missing % 2 else 'SEND'} of the {transfer}"
