"""When each computation of a step ran on this rank: what a bubble is counted from, and a timeline drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megactl.schedules import Action

Span = tuple[int, Action, float, float]
"""(pipeline rank, computation, start, end), in seconds of this host's monotonic clock: comparable between the ranks of one host."""


class Recorder:
    """Records computations while a `PipelineExecutor` has it; the time a rank waits for a tensor is before the start.

    On CUDA the times are those of the stream, taken by events: recording waits for nothing, `spans` does.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.cuda = rank, device.type == "cuda"
        self._marks: list[tuple[Action, object, object]] = []
        # Events know the time between each other only; one of them is tied to the clock here, where waiting is harmless.
        self._base = self._origin = 0.0
        if self.cuda:
            torch.cuda.synchronize(device)
            self._base, self._origin = self._now(), time.monotonic()

    @contextmanager
    def computation(self, action: Action) -> Iterator[None]:
        """Around the work of one action."""
        start = self._now()
        yield
        self._marks.append((action, start, self._now()))

    def spans(self) -> list[Span]:
        """What was recorded, in the order in which it ran; on CUDA this waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        return [(self.rank, action, self._seconds(start), self._seconds(end)) for action, start, end in self._marks]

    def _now(self) -> object:
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: object) -> float:
        return self._origin + self._base.elapsed_time(mark) / 1000 if self.cuda else mark
