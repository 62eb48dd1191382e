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
from megactl.schedules.simulation import Span, Timeline, simulate
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
    "Schedule",
    "Span",
    "Timeline",
    "Transfer",
    "assign_slots",
    "build",
    "forward_only",
    "generate",
    "lower",
    "max_live_microbatches",
    "max_live_on_rank",
    "num_chunks",
    "peak_live",
    "placement",
    "simulate",
    "text_view",
    "validate",
    "validate_lowered",
]
