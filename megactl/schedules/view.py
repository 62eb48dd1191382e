"""A schedule as text: one row a rank, time to the right."""

from __future__ import annotations

from megactl.schedules.actions import Kind, Schedule
from megactl.schedules.simulation import Times, durations_of, run_times


def text_view(
    schedule: Schedule, forward: float = 1.0, backward: float = 2.0, *, times: Times | None = None, max_width: int | None = None
) -> str:
    """ASCII timeline of the schedule under the given durations, or under `times`, with makespan and bubble in the last line.

    `F3` is the forward of micro-batch 3, `B3===` its backward, `I3`/`W3` a split one; with more than one stage a rank the
    virtual stage follows the micro-batch (`F3.5`). Idle time is dots. `max_width` cuts long rows (the cut ends in '>').
    """
    times = run_times(schedule, durations_of(forward, backward)) if times is None else times
    totals, folded = times.totals(), schedule.num_stages > schedule.num_ranks
    columns = _columns_per_unit(times, folded)
    end, margin = round(totals.makespan * columns), len(f"rank {schedule.num_ranks - 1}")
    room = end if max_width is None else max_width - margin - 2
    rows = [f"{f'rank {rank}':<{margin}} |{_row(times, rank, columns, folded, room, end)}" for rank in range(schedule.num_ranks)]
    if max_width is not None:
        rows = [row if len(row) <= max_width else row[: max_width - 1] + ">" for row in rows]
    summary = f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} micro-batches, {schedule.num_stages} stages"
    return "\n".join([*rows, f"{summary}; time {totals.makespan:g}, bubble {100 * totals.bubble_fraction:.1f} % of ideal"])


def _columns_per_unit(times: Times, folded: bool) -> float:
    """The smallest scale at which every label and the blank after it fit in its span."""
    schedule = times.schedule
    digits = [len(str(number)) for number in range(max(schedule.num_microbatches, schedule.num_stages))]
    widest: dict[Kind, int] = {}
    for rank in range(schedule.num_ranks):
        for kind, stage, microbatch in schedule.order(rank):
            # As long as the label and a blank; a long schedule has half a million labels, so they are not written for this.
            width = digits[microbatch] + (3 + digits[stage] if folded else 2)
            if width > widest.get(kind, 0):
                widest[kind] = width
    return max((width / times.durations[kind] for kind, width in widest.items() if times.durations[kind] > 0), default=1.0)


def _row(times: Times, rank: int, columns: float, folded: bool, room: int, last: int) -> str:
    """The row of a rank up to column `last`; where it is longer than `room`, at least that much and one more."""
    parts, at = [], 0
    names = {kind: (kind.value, times.durations[kind]) for kind in times.durations}
    for (kind, stage, microbatch), stop in zip(times.schedule.order(rank), times.ends[rank], strict=True):
        letter, duration = names[kind]
        start, end = round((stop - duration) * columns), round(stop * columns)
        label = f"{letter}{microbatch}.{stage}" if folded else f"{letter}{microbatch}"
        parts += ["." * (start - at), label.ljust(end - start - 1, "=") + " " if end - start > len(label) else label[: end - start]]
        at = end
        if at > room:
            break
    return "".join([*parts, "." * (last - at)])
