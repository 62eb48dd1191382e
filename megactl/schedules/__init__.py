"""Pipeline orders as data: generate, lower, validate, simulate and view them. No torch."""

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
    RankProgram,
    Schedule,
    Transfer,
    assign_slots,
    build,
)
from megactl.schedules.forward import forward_only
from megactl.schedules.generators import (
    GENERATORS,
    Generator,
    generate,
    max_live_microbatches,
    max_live_on_rank,
    num_chunks,
    peak_live,
    peak_of,
    placement,
)
from megactl.schedules.lowering import Dates, lower, lower_rank
from megactl.schedules.published import PublishedBubble, Work, published_bubble
from megactl.schedules.simulation import UNIT_TIMES, Span, Timeline, Times, Totals, durations_of, run_times, simulate
from megactl.schedules.trace import TracedSpan, executed, in_slots, measured, premature
from megactl.schedules.validation import validate
from megactl.schedules.validation_lowered import validate_lowered
from megactl.schedules.validation_rank import check_rank, checked_program
from megactl.schedules.view import text_view

__all__ = [
    "COMPUTE",
    "GENERATORS",
    "INPUT_GRADIENT",
    "NONE",
    "UNIT_TIMES",
    "WEIGHT_GRADIENT",
    "Action",
    "Dates",
    "Exchange",
    "Generator",
    "Item",
    "Kind",
    "LoweredSchedule",
    "PublishedBubble",
    "RankProgram",
    "Schedule",
    "Span",
    "Timeline",
    "Times",
    "Totals",
    "TracedSpan",
    "Transfer",
    "Work",
    "assign_slots",
    "build",
    "check_rank",
    "checked_program",
    "durations_of",
    "executed",
    "forward_only",
    "generate",
    "in_slots",
    "lower",
    "lower_rank",
    "max_live_microbatches",
    "max_live_on_rank",
    "measured",
    "num_chunks",
    "peak_live",
    "peak_of",
    "placement",
    "premature",
    "published_bubble",
    "run_times",
    "simulate",
    "text_view",
    "validate",
    "validate_lowered",
]
