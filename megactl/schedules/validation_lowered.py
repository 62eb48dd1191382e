"""Is a lowered schedule right? Its computations, its transfers one by one, and the absence of communication deadlock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from megactl.errors import ScheduleError
from megactl.schedules.actions import COMPUTE, NONE, WEIGHT_GRADIENT, Action, Exchange, Item, Kind, LoweredSchedule, Transfer
from megactl.schedules.validation import broken, validate


def validate_lowered(lowered: LoweredSchedule) -> None:
    """Raise ScheduleError at the first broken rule.

    Checked, besides `validate` on the computations: every tensor between stages of different ranks is sent once, after it was
    produced, and received once, before it is used, in a free slot (activation) or its own (gradient), between the right ranks;
    sends match receives in the same order on every pair; each stage is reduced once, after its last weight gradient; sharded
    stages compute only between UNSHARD and RESHARD; and no deadlock, neither where a rank waits for a batch only when a
    computation needs one of its receives, nor where every batch blocks until each of its members is matched.
    """
    validate(lowered.computations())
    for rank, program in enumerate(lowered.programs):
        _RankCheck(lowered, rank).run(program)
    _check_pairs(lowered)
    _Rendezvous(lowered, blocking=False).run()
    _Rendezvous(lowered, blocking=True).run()


def _communications(program: tuple[Item, ...]) -> Iterator[tuple[int, Action]]:
    for position, item in enumerate(program):
        if isinstance(item, Exchange):
            for action in item.actions:
                yield position, action


class _RankCheck:
    """Walks one rank's program and keeps what is in hand: outputs to send, inputs received, slot owners, unsharded stages."""

    def __init__(self, lowered: LoweredSchedule, rank: int) -> None:
        self.lowered, self.rank = lowered, rank
        self.slots = {(a.virtual_stage, a.microbatch): a.slot for a in lowered.compute_program(rank)}
        self.to_send: set[Transfer] = set()
        self.received: set[Transfer] = set()
        self.owners: dict[tuple[int, int], int] = {}
        self.gradients_left = {stage: lowered.num_microbatches for stage in lowered.stages_of(rank)}
        self.reduced: set[int] = set()
        self.sharded = {a.virtual_stage for a in lowered.programs[rank] if isinstance(a, Action) and a.kind in (Kind.UNSHARD, Kind.RESHARD)}
        self.gathered: set[int] = set()

    def run(self, program: tuple[Item, ...]) -> None:
        for position, item in enumerate(program):
            if isinstance(item, Exchange):
                if not item.actions:
                    raise broken(self.rank, position, "an exchange without sends or receives")
                for action in item.actions:
                    self._communicate(position, action)
            elif item.kind in COMPUTE:
                self._compute(position, item)
            else:
                self._whole_stage(position, item)
        self._finish()

    def _communicate(self, position: int, action: Action) -> None:
        if action.kind not in (Kind.SEND, Kind.RECV) or action.payload not in ("activation", "gradient"):
            raise broken(self.rank, position, f"{action} in an exchange; only SEND and RECV of an activation or gradient belong there")
        transfer = action.transfer
        other = transfer.consumer if action.kind is Kind.SEND else transfer.producer
        if action.virtual_stage not in self.gradients_left or not 0 <= other < self.lowered.num_stages or other in self.gradients_left:
            raise broken(self.rank, position, f"{action} does not move a tensor between a stage of this rank and one of another")
        owner = self.lowered.stage_to_rank[other]
        if action.peer != owner:
            raise broken(self.rank, position, f"{action} names rank {action.peer}; stage {other} is on rank {owner}")
        if self.slots.get((action.virtual_stage, action.microbatch)) != action.slot:
            raise broken(self.rank, position, f"{action} names another slot than the micro-batch's computations")
        (self._send if action.kind is Kind.SEND else self._receive)(position, action)

    def _send(self, position: int, action: Action) -> None:
        if action.transfer not in self.to_send:
            raise broken(self.rank, position, f"{action}: nothing to send, it was not produced yet or was sent already")
        self.to_send.remove(action.transfer)

    def _receive(self, position: int, action: Action) -> None:
        if action.transfer in self.received:
            raise broken(self.rank, position, f"{action}: received twice")
        self.received.add(action.transfer)
        buffer = (action.virtual_stage, action.slot)
        if action.payload == "activation":
            if buffer in self.owners:
                raise broken(self.rank, position, f"{action} fills a slot in which micro-batch {self.owners[buffer]} is still live")
            self.owners[buffer] = action.microbatch
        elif self.owners.get(buffer) != action.microbatch:
            raise broken(self.rank, position, f"{action} comes before its micro-batch is live in the slot")

    def _compute(self, position: int, action: Action) -> None:
        needed = self.lowered.received_for(action)
        if needed is not None and needed not in self.received:
            raise broken(self.rank, position, f"{action} runs before the {needed} is received")
        if action.virtual_stage in self.sharded and action.virtual_stage not in self.gathered:
            raise broken(self.rank, position, f"{action} runs while the weights of its stage are sharded")
        buffer = (action.virtual_stage, action.slot)
        if action.kind is Kind.F:
            # That no other micro-batch is live in it is known from `validate`, or from its receive.
            self.owners[buffer] = action.microbatch
        elif action.kind in WEIGHT_GRADIENT:
            self.gradients_left[action.virtual_stage] -= 1
            del self.owners[buffer]
        produced = self.lowered.sent_by(action)
        if produced is not None:
            self.to_send.add(produced)

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
            raise broken(self.rank, None, f"the {min(self.to_send)} is never sent")
        for stage in self.gradients_left:
            if stage not in self.reduced:
                raise broken(self.rank, None, f"stage {stage} is never reduced")
        if self.gathered:
            raise broken(self.rank, None, f"stage {min(self.gathered)} stays unsharded at the end")


def _check_pairs(lowered: LoweredSchedule) -> None:
    """On every ordered pair of ranks the k-th send must be the k-th receive: backends match by order, not by name."""
    ends: dict[tuple[int, int], tuple[list[Transfer], list[tuple[int, Transfer]]]] = {}
    for rank, program in enumerate(lowered.programs):
        for position, action in _communications(program):
            assert action.peer is not None
            if action.kind is Kind.SEND:
                ends.setdefault((rank, action.peer), ([], []))[0].append(action.transfer)
            else:
                ends.setdefault((action.peer, rank), ([], []))[1].append((position, action.transfer))
    for (source, target), (sent, received) in sorted(ends.items()):
        # Equally many: each end's completeness was checked on its own rank.
        for sent_transfer, (position, transfer) in zip(sent, received, strict=True):
            if sent_transfer != transfer:
                raise broken(target, position, f"receives the {transfer} from rank {source}, which sends the {sent_transfer} at that point")


End = tuple[Kind, Transfer]
"""One half of a transfer: (SEND, ...) or (RECV, ...)."""


@dataclass(frozen=True, slots=True)
class _Step:
    """An item as rendezvous sees it: it posts ends, then waits until other ends have been posted by anyone."""

    posts: tuple[End, ...]
    waits: tuple[End, ...]


class _Rendezvous:
    """Runs all programs at once under rendezvous: a batch is complete when each of its members is posted at both ends.

    blocking=False: a rank waits for a batch in front of the computation that reads one of its receives, as with asynchronous
    sends and receives. blocking=True: a rank waits for every batch where it posts it.
    """

    def __init__(self, lowered: LoweredSchedule, *, blocking: bool) -> None:
        self.lowered, self.blocking = lowered, blocking
        self.steps = [self._steps(program) for program in lowered.programs]
        self.positions = [0] * lowered.num_ranks
        self.posted: set[End] = set()
        self.waiting: dict[End, list[int]] = {}

    def _steps(self, program: tuple[Item, ...]) -> list[_Step]:
        steps = []
        batch_of: dict[Transfer, tuple[End, ...]] = {}
        for item in program:
            if isinstance(item, Exchange):
                ends = tuple((action.kind, action.transfer) for action in item.actions)
                far = tuple((Kind.RECV if kind is Kind.SEND else Kind.SEND, transfer) for kind, transfer in ends)
                batch_of.update((transfer, far) for kind, transfer in ends if kind is Kind.RECV)
                steps.append(_Step(ends, far if self.blocking else ()))
            else:
                needed = self.lowered.received_for(item)
                steps.append(_Step((), () if needed is None else batch_of[needed]))
        return steps

    def run(self) -> None:
        runnable = deque(range(self.lowered.num_ranks))
        while runnable:
            self._advance(runnable.popleft(), runnable)
        stuck = [self._describe(rank) for rank, steps in enumerate(self.steps) if self.positions[rank] < len(steps)]
        if stuck:
            kind = "every batch blocks until complete" if self.blocking else "batches complete in the background"
            stuck.append(f"communication deadlock where {kind}")
            raise ScheduleError("; ".join(stuck), "post transfers in one common order on all ranks")

    def _advance(self, rank: int, runnable: deque[int]) -> None:
        """Run a rank until it waits; it is put back on the queue when the end it waits for is posted."""
        steps = self.steps[rank]
        while self.positions[rank] < len(steps):
            step = steps[self.positions[rank]]
            for end in step.posts:
                self.posted.add(end)
                runnable.extend(self.waiting.pop(end, ()))
            missing = self._missing(step)
            if missing is not None:
                self.waiting.setdefault(missing, []).append(rank)
                return
            self.positions[rank] += 1

    def _missing(self, step: _Step) -> End | None:
        return next((end for end in step.waits if end not in self.posted), None)

    def _describe(self, rank: int) -> str:
        position = self.positions[rank]
        missing = self._missing(self.steps[rank][position])
        assert missing is not None
        item = self.lowered.programs[rank][position]
        return f"rank {rank}, position {position}: {item} waits for the {missing[0].value} of the {missing[1]}"
