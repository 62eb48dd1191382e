"""DeepSpeed's engine: its configuration, memory, the pipeline's stages, and the lines of steps where no Megatron prints any."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Any, ClassVar

from megactl.report.logs.anchors import Kind
from megactl.report.logs.arguments import JsonBlock, dump_row, flattened, spelled
from megactl.report.logs.parser import CONFIGURATION, DECIMAL, OpenRun, Parser, raised

_PIPE_STEP = re.compile(rf"steps: ([0-9]{{1,15}}) loss: (\S{{1,40}}) .{{0,500}}?iter time \(s\): ({DECIMAL}) samples/sec: ({DECIMAL})")
_STEP = re.compile(r"step=([0-9]{1,15}), skipped=([0-9]{1,15}), lr=\[+([0-9.eE+-]{1,30})")
_STAMP = re.compile(r"\[([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}),([0-9]{3})\]")
_RATE = re.compile(rf"(?:global_step=([0-9]{{1,15}}), RunningAvg|RunningAvg|, )SamplesPerSec=({DECIMAL})")
_CURRENT = re.compile(rf"CurrSamplesPerSec=({DECIMAL})")
_SEE = re.compile(rf"\bMA ({DECIMAL}) GB\s+Max_MA ({DECIMAL}) GB\s+CA ({DECIMAL}) GB\s+Max_CA ({DECIMAL}) GB")
_HOST = re.compile(rf"CPU Virtual Memory:\s+used = ({DECIMAL}) GB")
_MAX_ALLOCATED = re.compile(rf"MaxMemAllocated=({DECIMAL})GB")
_UNIQUE = re.compile(r"UNIQUE_PARAMS=([0-9]{1,18})")
_DATA_PARALLEL = re.compile(r"data_parallel_size: ([0-9]{1,9})")
_SWITCHES = re.compile(r"-(Partition Activations|CPU CHECKPOINTING|contiguous Memory Checkpointing) (True|False)")
_CPU_SWITCH = re.compile(r"CPU CHECKPOINTING (True|False)")
_SAVE = re.compile(rf"Checkpoint Save GB: ({DECIMAL}), GB/Sec: ({DECIMAL})")


class DeepSpeed(Parser):
    """Its lines beside Megatron's or alone."""

    kinds: ClassVar[int] = (
        Kind.DEEPSPEED
        | Kind.DEEPSPEED_CONFIG
        | Kind.DEEPSPEED_STEP
        | Kind.MEMORY
        | Kind.PARAMETERS
        | Kind.ACTIVATIONS
        | Kind.SUMMARY
        | Kind.DEGREES
    )

    def __init__(self, open_run: OpenRun) -> None:
        super().__init__(open_run)
        self._json: JsonBlock | None = None
        self._before: tuple[int, datetime] | None = None
        self._skipped = 0

    def note(self, kinds: int, line: int, text: str) -> None:
        """Read one line."""
        if kinds & (Kind.DEEPSPEED_CONFIG | Kind.BLOCK):
            self._configuration(kinds, text)
        if kinds & Kind.DEEPSPEED_STEP:
            self._step(line, text)
        if kinds & (Kind.MEMORY | Kind.DEEPSPEED_STEP):
            self._memory(text)
        if kinds & Kind.PARAMETERS and (match := _UNIQUE.search(text)):
            # The only line that states the exact number: a tied embedding counts once.
            self.run.model_parameters = int(match[1])
        if kinds & Kind.ACTIVATIONS:
            self._switches(text)
        if kinds & Kind.DEGREES and (match := _DATA_PARALLEL.search(text)):
            self.open.set("data_parallel_size", match[1], CONFIGURATION)
        if kinds & Kind.SUMMARY and (match := _SAVE.search(text)):
            self.run.summary |= {"checkpoint_gb": float(match[1]), "checkpoint_gb_per_s": float(match[2])}

    def _configuration(self, kinds: int, text: str) -> None:
        if kinds & Kind.DEEPSPEED_CONFIG:
            _, json_follows, start = text.partition(" json = {")
            if json_follows:
                self._json = JsonBlock("{" + start)
                return
            row = dump_row(text.partition(":print]")[2])
            if row is not None:
                self.open.set(*row, CONFIGURATION)
        elif self._json is not None:
            found = self._json.add(text)
            if found is not None:
                self._json = None
                for name, value in flattened(found):
                    self.open.set(name, value, CONFIGURATION)

    def _step(self, line: int, text: str) -> None:
        pipe = _PIPE_STEP.search(text)
        if pipe:
            self._row(int(pipe[1]), line, seconds=_number(pipe[3]), samples_per_second=_number(pipe[4]), loss=_number(pipe[2]))
        for match in _STEP.finditer(text):
            self._engine_step(match, line, text)
        rate = _RATE.search(text)
        if rate:
            current = _CURRENT.search(text) or rate
            value = _number(current[current.lastindex or 1])
            if rate[1]:
                self._row(int(rate[1]), line, samples_per_second=value)
            elif len(self.rows):
                self.rows.samples_per_second[-1] = value

    def _engine_step(self, match: re.Match[str], line: int, text: str) -> None:
        step, skipped, seconds = int(match[1]), int(match[2]), math.nan
        if step == 0:
            return  # what the engine prints when it is made
        stamp = _STAMP.search(text)
        now = _moment(stamp) if stamp else None
        if now is not None:
            if self._before is not None and step > self._before[0]:
                # The engine prints no time of a step; the times of its lines are to the millisecond.
                seconds = (now - self._before[1]).total_seconds() / (step - self._before[0])
            self._before = (step, now)
        # DeepSpeed counts the skipped steps of the whole run.
        since, self._skipped = max(0, skipped - self._skipped), skipped
        self._row(step, line, seconds=seconds, learning_rate=_number(match[3]), skipped=float(since))

    def _row(self, step: int, line: int, *, loss: float = math.nan, **values: float) -> None:
        rows = self.rows
        if len(rows) and step < rows.iteration[-1]:
            return
        if not len(rows) or step > rows.iteration[-1]:
            rows.append(step, line=line, losses={} if math.isnan(loss) else {"loss": loss}, **values)
            return
        for name, value in values.items():
            column: Any = getattr(rows, name)
            if math.isnan(column[-1]):
                column[-1] = value
        if not math.isnan(loss) and "loss" in rows.losses and math.isnan(rows.losses["loss"][-1]):
            rows.losses["loss"][-1] = loss

    def _memory(self, text: str) -> None:
        memory = self.run.memory
        for match in _SEE.finditer(text):
            now, peak, cached, most_cached = (float(value) for value in match.groups())
            memory.allocated = raised(memory.allocated, max(now, peak))
            # Max_CA is printed as a whole number: it says more than CA only where it is not CA rounded.
            memory.reserved = raised(memory.reserved, cached if round(cached) >= most_cached else most_cached)
        for match in _HOST.finditer(text):
            memory.host = raised(memory.host, float(match[1]))
        for match in _MAX_ALLOCATED.finditer(text):
            memory.allocated = raised(memory.allocated, float(match[1]))

    def _switches(self, text: str) -> None:
        names = {"Partition Activations": "partition_activations", "contiguous Memory Checkpointing": "contiguous_checkpointing"}
        for match in _SWITCHES.finditer(text):
            if match[1] in names:
                self.open.set(spelled(names[match[1]]), match[2], CONFIGURATION)
        cpu = _CPU_SWITCH.search(text)
        if cpu:
            self.open.set("checkpoint_in_cpu", cpu[1], CONFIGURATION)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _moment(stamp: re.Match[str]) -> datetime | None:
    try:
        return datetime.fromisoformat(f"{stamp[1]}.{stamp[2]}")
    except ValueError:
        return None
