"""Is a schedule of computations right? Each rule names the rank, the position in its program and what is broken."""

from __future__ import annotations

from collections.abc import Iterator

from megactl.errors import ScheduleError
from megactl.schedules.actions import COMPUTE, FORWARD, WEIGHT_GRADIENT, Action, Kind, Schedule
from megactl.schedules.generators import GENERATORS, max_live_microbatches, max_live_on_rank
from megactl.schedules.simulation import UNIT_TIMES, run_times


def broken(rank: int, position: int | None, rule: str) -> ScheduleError:
    """The error of one broken rule, with its place in front."""
    where = f"rank {rank}" if position is None else f"rank {rank}, position {position}"
    return ScheduleError(f"{where}: {rule}", "fix the generator that made this order; it must not be run")


def validate(schedule: Schedule) -> None:
    """Raise ScheduleError at the first broken rule.

    Checked: stages lie on existing ranks and every rank computes only its own; each micro-batch has, on each virtual stage, one F
    and either one B or one I and one W, in that order; slots are never shared by two live micro-batches and none is left unused;
    live micro-batches stay within the published bound of the named schedule; and the whole runs without deadlock.
    """
    check_shape(schedule)
    for rank in range(schedule.num_ranks):
        check_computations(schedule, rank)
    run_times(schedule, UNIT_TIMES)


def check_computations(schedule: Schedule, rank: int) -> None:
    """The rules of `validate` that are about one rank's program. Raises ScheduleError."""
    program = schedule.programs[rank]
    _check_complete(schedule, rank, _check_program(schedule, rank, program))
    _check_slots(schedule, rank, program)


def check_shape(schedule: Schedule) -> None:
    """The rules of `validate` on numbers and placement. Raises ScheduleError."""
    for label, value in (("num_ranks", schedule.num_ranks), ("num_microbatches", schedule.num_microbatches)):
        if value < 1:
            raise ScheduleError(f"{label} = {value}: a schedule needs at least 1")
    if len(schedule.programs) != schedule.num_ranks:
        raise ScheduleError(f"{len(schedule.programs)} programs for {schedule.num_ranks} ranks: each rank needs one")
    if len(schedule.stage_to_rank) != schedule.num_stages:
        raise ScheduleError(f"stage_to_rank has {len(schedule.stage_to_rank)} entries for {schedule.num_stages} virtual stages")
    for stage, rank in enumerate(schedule.stage_to_rank):
        if not 0 <= rank < schedule.num_ranks:
            raise ScheduleError(f"stage {stage} lies on rank {rank}: ranks are 0 to {schedule.num_ranks - 1}")
    for rank in range(schedule.num_ranks):
        if rank not in schedule.stage_to_rank:
            raise ScheduleError(f"rank {rank} holds no stage: every rank needs one", "use fewer ranks or more stages")


_PARTS: dict[str, dict[Kind, str]] = {"": {Kind.F: "F"}, "F": {Kind.B: "FB", Kind.I: "FI"}, "FI": {Kind.W: "FIW"}}
"""What a micro-batch on a stage has had so far, and what may come next."""


def _check_program(schedule: Schedule, rank: int, program: tuple[Action, ...]) -> dict[tuple[int, int], str]:
    """What can be said of one action on its own, and the order of the parts of one micro-batch. Returns what each has had."""
    had: dict[tuple[int, int], str] = {}
    stages, count = frozenset(schedule.stages_of(rank)), schedule.num_microbatches
    for position, action in enumerate(program):
        kind, stage, microbatch, _, payload, peer = action
        if kind not in COMPUTE:
            raise broken(rank, position, f"{action} is communication; a schedule holds computations only, lower() adds the rest")
        if stage not in stages:
            raise broken(rank, position, f"{action} works on a stage that is not on this rank")
        if not 0 <= microbatch < count:
            raise broken(rank, position, f"{action}: micro-batches are 0 to {count - 1}")
        if payload is not None or peer is not None:
            raise broken(rank, position, f"{action} is a computation and must have neither payload nor peer")
        parts = had.get((stage, microbatch), "")
        after = _PARTS.get(parts, {}).get(kind)
        if after is None:
            raise broken(rank, position, f"{action}: {_part_problem(parts, kind)}")
        had[stage, microbatch] = after
    return had


def _part_problem(parts: str, kind: Kind) -> str:
    """Why `kind` cannot follow `parts`, the earlier parts of the same micro-batch on the same stage."""
    if kind.value in parts:
        return f"{kind.value} was already done for it"
    earlier = ", ".join(parts) or "nothing"
    return f"{kind.value} may not come after {earlier}; the order is F then B, or F, I, W"


def _check_complete(schedule: Schedule, rank: int, had: dict[tuple[int, int], str]) -> None:
    for stage in schedule.stages_of(rank):
        for microbatch in range(schedule.num_microbatches):
            parts = had.get((stage, microbatch), "")
            if parts not in ("FB", "FIW"):
                absent = {"": "F", "F": "B", "FI": "W"}[parts]
                raise broken(rank, None, f"micro-batch {microbatch} has no {absent} on stage {stage}")


def _check_slots(schedule: Schedule, rank: int, program: tuple[Action, ...]) -> None:
    peaks = dict.fromkeys(schedule.stages_of(rank), 0)
    bounds, rank_bound = _bounds(schedule, rank)
    for position, stage, live, on_rank in live_microbatches(rank, program):
        peaks[stage] = max(peaks[stage], live)
        if live > bounds.get(stage, live):
            raise broken(rank, position, f"{live} live micro-batches on stage {stage}; {schedule.name} holds at most {bounds[stage]}")
        if rank_bound is not None and on_rank > rank_bound:
            raise broken(rank, position, f"{on_rank} live micro-batches on all its stages; {schedule.name} holds at most {rank_bound}")
    used: dict[int, set[int]] = {stage: set() for stage in peaks}
    for action in program:
        used[action.virtual_stage].add(action.slot)
    for stage, peak in peaks.items():
        if used[stage] != set(range(peak)):
            rule = f"its peak of {peak} live micro-batches needs exactly slots 0 to {peak - 1}"
            raise broken(rank, None, f"stage {stage} uses slots {sorted(used[stage])}; {rule}")


def live_microbatches(rank: int, program: tuple[Action, ...]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (position, stage, live micro-batches on it, on all stages) after each forward, checking that no slot has two owners.

    `program` is one rank's computations, each micro-batch's parts already known to be complete and in order.
    """
    owners: dict[tuple[int, int], int] = {}
    live: dict[int, int] = {}
    for position, action in enumerate(program):
        kind, stage, microbatch, slot, _, _ = action
        buffer = (stage, slot)
        if kind is FORWARD:
            if buffer in owners:
                raise broken(rank, position, f"{action} takes a slot in which micro-batch {owners[buffer]} is still live")
            owners[buffer] = microbatch
            live[stage] = live.get(stage, 0) + 1
            yield position, stage, live[stage], len(owners)
        elif owners.get(buffer) != microbatch:
            raise broken(rank, position, f"{action} uses a slot that its forward did not take")
        elif kind in WEIGHT_GRADIENT:
            del owners[buffer]
            live[stage] -= 1


def _bounds(schedule: Schedule, rank: int) -> tuple[dict[int, int], int | None]:
    """The published bounds of a rank's stages and of the rank, for schedules in the registry; a hand-made one has none."""
    if schedule.name not in GENERATORS:
        return {}, None
    sizes = {
        "num_ranks": schedule.num_ranks,
        "num_microbatches": schedule.num_microbatches,
        "chunks": schedule.num_stages // schedule.num_ranks,
    }
    stages = {stage: max_live_microbatches(schedule.name, stage=stage, **sizes) for stage in schedule.stages_of(rank)}
    return stages, max_live_on_rank(schedule.name, rank=rank, **sizes)
