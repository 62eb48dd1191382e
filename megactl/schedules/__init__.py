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
    placement,
)
from megactl.schedules.lowering import lower
from megactl.schedules.published import PublishedBubble, Work, published_bubble
from megactl.schedules.simulation import Span, Timeline, simulate
from megactl.schedules.trace import TracedSpan, executed, in_slots, measured, premature
from megactl.schedules.validation import validate
from megactl.schedules.validation_lowered import validate_lowered
from megactl.schedules.view import text_view

__all__ = [
    "COMPUTE",
    "GENERATORS",
    "INPUT_GRADIENT",
    "NONE",
    "WEIGHT_GRADIENT",
    "Action",
    "Exchange",
    "Generator",
    "Item",
    "Kind",
    "LoweredSchedule",
    "PublishedBubble",
    "Schedule",
    "Span",
    "Timeline",
    "TracedSpan",
    "Transfer",
    "Work",
    "assign_slots",
    "build",
    "executed",
    "forward_only",
    "generate",
    "in_slots",
    "lower",
    "max_live_microbatches",
    "max_live_on_rank",
    "measured",
    "num_chunks",
    "peak_live",
    "placement",
    "premature",
    "published_bubble",
    "simulate",
    "text_view",
    "validate",
    "validate_lowered",
]
