"""Is one rank's program right, and can it wait for ever? What a rank checks when it starts, of its own program alone.

Why that is enough. The orders of all ranks are simulated (`Dates`), so computations that wait in a circle are refused. Communication could
still stop where every rank waits for a batch that another one has not posted. Take, of all transfers that are not complete, the
first one in the common order: one of its ends is not posted, so the rank there waits for a batch in front of it. That batch has a
transfer that is not complete and stands earlier in the common order, as a rank posts in that order; but there is none. It is the
same whether batches block or complete in the background. All ranks make the common order alike from the same settings and the
same source, which a run compares at its start. `validate_lowered` looks at all programs instead, and needs no such argument.
"""

from __future__ import annotations

from megactl.schedules.actions import (
    COMPUTE,
    FORWARD,
    INPUT_GRADIENT,
    NONE,
    RECV,
    SEND,
    WEIGHT_GRADIENT,
    Action,
    Exchange,
    Kind,
    LoweredSchedule,
    RankProgram,
    Schedule,
    Transfer,
)
from megactl.schedules.lowering import Dates, lower_rank
from megactl.schedules.validation import broken, check_computations, check_shape


def checked_program(schedule: Schedule, rank: int) -> RankProgram:
    """What a rank runs: its part of the lowered schedule. Every rank must call it with an equal schedule, and then none can deadlock.

    Raises ScheduleError where computations of any rank deadlock or this rank's program breaks a rule of `validate_lowered`.
    """
    check_shape(schedule)
    dates = Dates(schedule)
    program = lower_rank(dates, rank)
    check_rank(program, dates)
    return program


def check_rank(program: RankProgram, dates: Dates) -> None:
    """Raise ScheduleError at the first broken rule of one rank's program, which was made of the schedule that was dated.

    Checked: it computes what was dated, in that order; all that `validate` and `validate_lowered` ask of one rank; and it posts its
    transfers in the common order.
    """
    if program.computations != dates.schedule.programs[program.rank]:
        raise broken(program.rank, None, "its computations are not those that were dated")
    check_computations(dates.schedule, program.rank)
    RankCheck(program).run()
    _check_common_order(program, dates)


def _check_common_order(program: RankProgram, dates: Dates) -> None:
    posted = [(position, action) for position, item in enumerate(program.items) if isinstance(item, Exchange) for action in item.actions]
    # As many as there are: that each is posted once was checked.
    for (position, action), (_, _, expected) in zip(posted, dates.transfers(program.rank), strict=True):
        if action != expected:
            raise broken(program.rank, position, f"{action} is posted where the order of all ranks has {expected}")


class Numbers:
    """Transfers as numbers, since a long schedule has millions: the tensor that a stage produces for a micro-batch.

    An end of a transfer is twice that, plus one at the receiver, so that the two ends differ in the last bit.
    """

    def __init__(self, lowered: LoweredSchedule | RankProgram) -> None:
        self.count, self.gradients = lowered.num_microbatches, lowered.num_stages * lowered.num_microbatches
        self.ends = 4 * self.gradients

    def end(self, action: Action) -> int:
        """That of a SEND or RECV whose stage and micro-batch exist, at its own side."""
        kind, stage, microbatch, _, payload, _ = action
        forward = payload == "activation"
        if kind is RECV:
            return 2 * ((stage - 1 if forward else stage + 1) * self.count + microbatch + (0 if forward else self.gradients)) + 1
        return 2 * (stage * self.count + microbatch + (0 if forward else self.gradients))

    def transfer(self, number: int) -> Transfer:
        """The transfer in words."""
        backward, rest = divmod(number, self.gradients)
        stage, microbatch = divmod(rest, self.count)
        return Transfer("gradient", stage, stage - 1, microbatch) if backward else Transfer("activation", stage, stage + 1, microbatch)


class RankCheck:
    """Walks one rank's program and keeps what is in hand: outputs to send, inputs received, slot owners, unsharded stages.

    The computations are taken to be right: `check_computations`.
    """

    def __init__(self, program: RankProgram) -> None:
        self.program, self.rank, self.numbers = program, program.rank, Numbers(program)
        self.slots = {(a.virtual_stage, a.microbatch): a.slot for a in program.computations}
        self.to_send: set[int] = set()
        self.received: set[int] = set()
        self.owners: dict[tuple[int, int], int] = {}
        self.gradients_left = {stage: program.num_microbatches for stage in program.stages_of(program.rank)}
        self.reduced: set[int] = set()
        self.sharded = {a.virtual_stage for a in program.items if isinstance(a, Action) and a.kind in (Kind.UNSHARD, Kind.RESHARD)}
        self.gathered: set[int] = set()

    def run(self) -> None:
        """Raise ScheduleError at the first broken rule."""
        for position, item in enumerate(self.program.items):
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
        if action.kind not in (SEND, RECV) or action.payload not in ("activation", "gradient"):
            raise broken(self.rank, position, f"{action} in an exchange; only SEND and RECV of an activation or gradient belong there")
        ahead = (action.kind is SEND) == (action.payload == "activation")
        other = action.virtual_stage + (1 if ahead else -1)
        if action.virtual_stage not in self.gradients_left or not 0 <= other < self.program.num_stages or other in self.gradients_left:
            raise broken(self.rank, position, f"{action} does not move a tensor between a stage of this rank and one of another")
        owner = self.program.stage_to_rank[other]
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
        if kind is FORWARD:
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
        if 0 <= source < self.program.num_stages and source not in self.gradients_left and needed not in self.received:
            raise broken(self.rank, position, f"{action} runs before the {self.numbers.transfer(needed)} is received")
        if 0 <= target < self.program.num_stages and target not in self.gradients_left:
            self.to_send.add(made)

    def _whole_stage(self, position: int, action: Action) -> None:
        stage = action.virtual_stage
        if action.kind in (SEND, RECV):
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
