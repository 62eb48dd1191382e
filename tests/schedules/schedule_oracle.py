"""An interpreter of lowered schedules that moves real values, written without the validator's rules.

Messages between two ranks are anonymous and first in, first out; buffers are cells named by (stage, slot) that anything can
overwrite. A schedule is right when every forward and backward saw the values a single process would have computed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque

from megactl.schedules import Action, Exchange, Kind, LoweredSchedule


class WrongResult(Exception):
    """The programs got stuck, or computed something else than one process would."""


def number(*parts: object) -> str:
    return hashlib.md5(repr(parts).encode()).hexdigest()


class Oracle:
    """Runs all ranks of a lowered schedule; `run` raises WrongResult where the outcome is not that of one process."""

    def __init__(self, lowered: LoweredSchedule) -> None:
        self.lowered = lowered
        self.channels: dict[tuple[int, int], deque] = defaultdict(deque)
        self.pending: dict[tuple[int, int], deque] = defaultdict(deque)
        self.inputs: dict[tuple[int, int], object] = {}
        self.gradients_in: dict[tuple[int, int], object] = {}
        self.outputs: dict[tuple[int, int], object] = {}
        self.gradients_out: dict[tuple[int, int], object] = {}
        self.local: dict[tuple[str, int, int], object] = {}
        self.weight_gradients: dict[int, list[object]] = defaultdict(list)
        self.reduced: dict[int, list[list[object]]] = defaultdict(list)

    def run(self) -> None:
        positions = [0] * len(self.lowered.programs)
        progress = True
        while progress:
            progress = False
            for rank, program in enumerate(self.lowered.programs):
                while positions[rank] < len(program) and self._step(rank, program[positions[rank]]):
                    positions[rank] += 1
                    progress = True
        if any(position < len(program) for position, program in zip(positions, self.lowered.programs, strict=True)):
            raise WrongResult(f"stuck at {positions}")
        if any(self.channels.values()) or any(self.pending.values()):
            raise WrongResult("messages or receives left over")
        self._check_gradients()

    def _step(self, rank: int, item: Action | Exchange) -> bool:
        if isinstance(item, Exchange):
            for action in item.actions:
                self._post(rank, action)
            return True
        self._deliver(rank)
        if item.kind is Kind.REDUCE:
            self.reduced[item.virtual_stage].append(list(self.weight_gradients[item.virtual_stage]))
            return True
        return self._forward(rank, item) if item.kind is Kind.F else self._backward(rank, item)

    def _post(self, rank: int, action: Action) -> None:
        cell = (action.virtual_stage, action.slot)
        if action.kind is Kind.SEND:
            cells = self.outputs if action.payload == "activation" else self.gradients_out
            if cell not in cells:
                raise WrongResult(f"{action}: nothing there")
            self.channels[rank, action.peer].append(cells[cell])
        elif action.kind is Kind.RECV:
            cells = self.inputs if action.payload == "activation" else self.gradients_in
            cells[cell] = "in flight"
            self.pending[action.peer, rank].append((cells, cell))
        else:
            raise WrongResult(f"{action} in an exchange")

    def _deliver(self, rank: int) -> None:
        for (source, target), queue in list(self.pending.items()):
            while target == rank and queue and self.channels[source, target]:
                cells, cell = queue.popleft()
                cells[cell] = self.channels[source, target].popleft()

    def _forward(self, rank: int, action: Action) -> bool:
        stage, cell = action.virtual_stage, (action.virtual_stage, action.slot)
        if stage == 0:
            self.inputs[cell] = number("data", action.microbatch)
        elif self.lowered.stage_to_rank[stage - 1] == rank:
            if ("y", stage - 1, action.microbatch) not in self.local:
                return False
            self.inputs[cell] = self.local["y", stage - 1, action.microbatch]
        if self.inputs.get(cell, "in flight") == "in flight":
            return False
        self.outputs[cell] = self.local["y", stage, action.microbatch] = number("F", stage, self.inputs[cell])
        return True

    def _backward(self, rank: int, action: Action) -> bool:
        stage, cell = action.virtual_stage, (action.virtual_stage, action.slot)
        if action.kind in (Kind.B, Kind.I):
            if stage == self.lowered.num_stages - 1:
                self.gradients_in[cell] = number("loss", self.outputs.get(cell))
            elif self.lowered.stage_to_rank[stage + 1] == rank:
                if ("dx", stage + 1, action.microbatch) not in self.local:
                    return False
                self.gradients_in[cell] = self.local["dx", stage + 1, action.microbatch]
            if self.gradients_in.get(cell, "in flight") == "in flight":
                return False
            dx = number("dx", stage, self.inputs.get(cell), self.gradients_in[cell])
            self.gradients_out[cell] = self.local["dx", stage, action.microbatch] = dx
        if action.kind in (Kind.B, Kind.W):
            self.weight_gradients[stage].append(number("dw", stage, self.inputs.get(cell), self.gradients_in.get(cell)))
            # The buffers are the next micro-batch's from here on.
            self.inputs[cell] = self.gradients_in[cell] = "in flight"
        return True

    def _check_gradients(self) -> None:
        expected = single_process(self.lowered.num_stages, self.lowered.num_microbatches)
        for stage in range(self.lowered.num_stages):
            if [sorted(gradients) for gradients in self.reduced[stage]] != [sorted(expected[stage])]:
                raise WrongResult(f"stage {stage} reduced other gradients than one process computes")


def single_process(num_stages: int, num_microbatches: int) -> list[list[str]]:
    """Weight gradients per stage of the same chain computed one micro-batch at a time."""
    gradients: list[list[str]] = [[] for _ in range(num_stages)]
    for microbatch in range(num_microbatches):
        inputs = [number("data", microbatch)]
        for stage in range(num_stages):
            inputs.append(number("F", stage, inputs[-1]))
        gradient = number("loss", inputs[-1])
        for stage in reversed(range(num_stages)):
            gradients[stage].append(number("dw", stage, inputs[stage], gradient))
            gradient = number("dx", stage, inputs[stage], gradient)
    return gradients


def is_right(lowered: LoweredSchedule) -> bool:
    try:
        Oracle(lowered).run()
    except WrongResult:
        return False
    return True
