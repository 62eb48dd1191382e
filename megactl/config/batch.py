"""The global batch over the run: constant, or ramped up as in Megatron-LM; and the iterations of warm-up."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple


class Rampup(NamedTuple):
    """Grow the global batch from `start` by `increment`, in equal shares of the first `samples` samples."""

    start: int
    increment: int
    samples: int


def parse_rampup(text: str) -> Rampup:
    """'START INCREMENT SAMPLES' (spaces or commas). Raises ValueError with the rule that is broken."""
    parts = text.replace(",", " ").split()
    if len(parts) != 3 or not all(re.fullmatch(r"[0-9]+(_[0-9]+)*", part) for part in parts):
        raise ValueError("must be three whole numbers 'START INCREMENT SAMPLES', such as '16 16 100000'")
    rampup = Rampup(*(int(part) for part in parts))
    if min(rampup) < 1:
        raise ValueError("START, INCREMENT and SAMPLES must be at least 1")
    return rampup


def parse_warmup(text: str, iterations: int) -> int:
    """Iterations of warm-up from 'N' or 'P%' of `iterations` (rounded up). Raises ValueError with the rule that is broken."""
    share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text.strip())
    if share:
        return math.ceil(iterations * float(share[1]) / 100 - 1e-9)
    if not re.fullmatch(r"[0-9]+(_[0-9]+)*", text.strip()):
        raise ValueError("must be a number of iterations or a share such as 1%")
    return int(text)


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch size (sequences in one optimizer step) as a function of the samples consumed so far.

    With `rampup` the size follows Megatron-LM: start + increment x floor(consumed / (samples / steps)), where
    steps = (global - start) / increment.
    Every size is a multiple of micro_batch_size x data_parallel; `validate` refuses a run where it is not.
    """

    global_batch_size: int
    rampup: Rampup | None
    micro_batch_size: int
    data_parallel: int

    @property
    def _steps(self) -> int:
        return (self.global_batch_size - self.rampup.start) // self.rampup.increment if self.rampup else 0

    def at(self, consumed: int) -> int:
        """Sequences in the step that begins after `consumed` samples."""
        if self.rampup is None or consumed >= self.rampup.samples:
            return self.global_batch_size
        # In integers: samples / steps is seldom whole, and a float there moves the change of size by a step on long ramps.
        return self.rampup.start + self.rampup.increment * (consumed * self._steps // self.rampup.samples)

    def micro_batches(self, consumed: int) -> int:
        """Micro-batches that each replica runs in the step that begins after `consumed` samples."""
        return self.at(consumed) // (self.micro_batch_size * self.data_parallel)

    def consumed_after(self, iterations: int) -> int:
        """Samples consumed by the first `iterations` steps; walks the levels of the ramp, not the iterations."""
        consumed, left = 0, iterations
        while left and self.rampup is not None and consumed < self.rampup.samples:
            size = self.at(consumed)
            count = min(left, -(-(self._level_end(consumed) - consumed) // size))
            consumed, left = consumed + count * size, left - count
        return consumed + left * self.global_batch_size

    def iterations_for(self, samples: int) -> int:
        """The smallest number of steps that consumes at least `samples` samples."""
        low, high = 0, max(1, samples)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.consumed_after(middle) >= samples else (middle + 1, high)
        return low

    def _level_end(self, consumed: int) -> int:
        """The first number of consumed samples at which the batch is larger than at `consumed`, or the end of the ramp."""
        assert self.rampup is not None
        level = consumed * self._steps // self.rampup.samples + 1
        if level >= self._steps:
            return self.rampup.samples
        return -(-level * self.rampup.samples // self._steps)
