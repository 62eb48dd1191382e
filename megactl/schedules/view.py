"""A schedule as text: one row a rank, time to the right."""

from __future__ import annotations

from megactl.schedules.actions import Action, Schedule
from megactl.schedules.simulation import Timeline, simulate


def text_view(
    schedule: Schedule, forward: float = 1.0, backward: float = 2.0, *, timeline: Timeline | None = None, max_width: int | None = None
) -> str:
    """ASCII timeline of the schedule under the given durations, or `timeline`, with makespan and bubble in the last line.

    `F3` is the forward of micro-batch 3, `B3===` its backward, `I3`/`W3` a split one; with more than one stage a rank the
    virtual stage follows the micro-batch (`F3.5`). Idle time is dots. `max_width` cuts long rows (the cut ends in '>').
    """
    timeline = simulate(schedule, forward, backward) if timeline is None else timeline
    folded = schedule.num_stages > schedule.num_ranks
    columns = _columns_per_unit(timeline, folded)
    margin = len(f"rank {schedule.num_ranks - 1}")
    room = None if max_width is None else max_width - margin - 2
    rows = [f"{f'rank {rank}':<{margin}} |{_row(timeline, rank, columns, folded, room)}" for rank in range(schedule.num_ranks)]
    if max_width is not None:
        rows = [row if len(row) <= max_width else row[: max_width - 1] + ">" for row in rows]
    summary = f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} micro-batches, {schedule.num_stages} stages"
    return "\n".join([*rows, f"{summary}; time {timeline.makespan:g}, bubble {100 * timeline.bubble_fraction:.1f} % of ideal"])


def _label(action: Action, folded: bool) -> str:
    return f"{action.kind.value}{action.microbatch}" + (f".{action.virtual_stage}" if folded else "")


def _columns_per_unit(timeline: Timeline, folded: bool) -> float:
    """The smallest scale at which every label and the blank after it fit in its span."""
    widest: dict[float, int] = {}
    widths: dict[tuple[int, int], int] = {}
    for row in timeline.spans:
        for action, start, end in row:
            named = action[1:3]
            # Not the label of every span: a long schedule has millions, and they differ in a number of digits.
            width = widths.get(named)
            if width is None:
                width = widths[named] = len(_label(action, folded)) + 1
            if width > widest.get(end - start, 0):
                widest[end - start] = width
    return max((width / duration for duration, width in widest.items() if duration > 0), default=1.0)


def _row(timeline: Timeline, rank: int, columns: float, folded: bool, room: int | None) -> str:
    """The row of a rank; where it is longer than `room`, at least that much and one more."""
    parts, at = [], 0
    for action, begin, stop in timeline.spans[rank]:
        start, end = round(begin * columns), round(stop * columns)
        label = _label(action, folded)
        parts += ["." * (start - at), label.ljust(end - start - 1, "=") + " " if end - start > len(label) else label[: end - start]]
        at = end
        if room is not None and at > room:
            break
    return "".join([*parts, "." * (round(timeline.makespan * columns) - at)])
