"""What papers say a schedule's bubble is: tests hold the simulator to it, and the command shows it beside what it found."""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose


@dataclass(frozen=True)
class Work:
    """Times of one micro-batch on one rank, all its chunks together, in any unit. A whole backward takes both parts."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class PublishedBubble:
    """Idle time of a rank between its own first start and last end (unit: that of the work), and as a share of its computing time.

    `assumes` says what the formula is published for. Transfers are free in all of them.
    """

    formula: str
    idle: float
    fraction: float
    assumes: str
    source: str


def published_bubble(
    name: str, *, num_ranks: int, num_microbatches: int, chunks: int = 1, work: Work | None = None
) -> PublishedBubble | None:
    """The published bubble of a schedule; None where it is not in the registry, or where no formula was published for these numbers."""
    p, m, work = num_ranks, num_microbatches, Work() if work is None else work
    forward, inputs, weights = work.forward, work.input_gradient, work.weight_gradient
    fills = weights <= forward and weights <= inputs
    equal = isclose(forward, inputs) and isclose(forward, weights)
    interleaved = name == "1f1b" and chunks > 1
    formula, idle, assumes, holds, source = {
        "gpipe": ("(p-1)/m", (p - 1) * work.total, "", True, _SC21),
        "1f1b": ("(p-1)/m", (p - 1) * work.total, "", True, _SC21),
        "interleaved": ("(p-1)/(v m)", (p - 1) * work.total / chunks, "m >= p", m >= p, _SC21),
        "zb-h1": ("(p-1)(F+I-W)", (p - 1) * (forward + inputs - weights), "m >= p, W <= F, W <= I", m >= p and fills, _ZB),
        "zb-h2": (
            "(p-1)(F+I-2W)",
            (p - 1) * (forward + inputs - 2 * weights),
            "m >= 2p-1, W <= F, W <= I",
            m >= 2 * p - 1 and fills,
            _ZB,
        ),
        "zb-v": ("0", 0.0, "m >= 2p-1, F = I = W", m >= 2 * p - 1 and equal, "Qi et al. 2024, arXiv:2405.15362"),
    }.get("interleaved" if interleaved else name, ("", 0.0, "", False, ""))
    if not holds:
        return None
    return PublishedBubble(formula, idle, idle / (m * work.total), assumes, source)


_SC21 = "Narayanan et al. 2021, arXiv:2104.04473, sections 2.2.1 and 2.2.2"
_ZB = "Qi et al. 2023, arXiv:2401.10241, section 2.3"
