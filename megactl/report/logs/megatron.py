"""Megatron-LM from 2019 on and what descends from it; its iteration lines and timers are read by the scanner."""

from __future__ import annotations

import re
from typing import ClassVar

from megactl.report.logs.anchors import Kind
from megactl.report.logs.arguments import dump_row, shell_settings, sizes
from megactl.report.logs.parser import DECIMAL, DUMP, TRACE, OpenRun, Parser, raised
from megactl.report.logs.records import Evaluation

_MEMORY = re.compile(rf"\b(allocated|reserved): ({DECIMAL})")
_LOSS_AT = re.compile(r"([\w-]+) loss at (?:iteration\s+([0-9]{1,18})|the end of training)(?: (?:for|on) (\w+) (?:data|set))?")
_LOSS_VALUE = re.compile(r"([\w -]{1,64}?) value: (\S{1,64})")
_RANK_PARAMETERS = re.compile(r"number of parameters on [^:|]{0,100}rank (\([^()]{0,64}\)|[0-9]+): ([0-9]{1,18})")
_TOTAL = re.compile(rf"total parameters ({DECIMAL}) B\b")
_VOCABULARY = re.compile(r"padded vocab \(size: ([0-9]{1,18})\).{0,100}?new size: ([0-9]{1,18})")
_EFFECTIVE = re.compile(rf"Effective Tera Flops per GPU: ({DECIMAL})")
_MOST_RANKS = 1 << 16
_MOST_EVALUATIONS = 10_000


class Megatron(Parser):
    """Arguments, degrees, memory, evaluations and parameters."""

    kinds: ClassVar[int] = (
        Kind.ARGUMENTS | Kind.WORLD | Kind.PARAMETERS | Kind.MEMORY | Kind.EVALUATION | Kind.TRACE | Kind.VOCABULARY | Kind.SUMMARY
    )

    def __init__(self, open_run: OpenRun) -> None:
        super().__init__(open_run)
        self._parameters: dict[str, int] = {}
        self._effective: list[float] = [0.0, 0.0]

    def note(self, kinds: int, line: int, text: str) -> None:
        """Read one line."""
        if kinds & Kind.BLOCK:
            row = dump_row(text)
            if row is not None:
                self.open.set(*row, DUMP)
        if kinds & Kind.WORLD:
            self._degrees(text)
        if kinds & Kind.PARAMETERS:
            self._count(text)
        if kinds & Kind.MEMORY:
            self._memory(text)
        if kinds & Kind.EVALUATION:
            self._evaluation(line, text)
        if kinds & Kind.TRACE:
            for name, value in shell_settings(text):
                self.open.set(name, value, TRACE)
        if kinds & Kind.VOCABULARY and (match := _VOCABULARY.search(text)):
            self.open.set("vocab_size", match[1], DUMP)
            self.open.set("padded_vocab_size", match[2], DUMP)
        if kinds & Kind.SUMMARY and (match := _EFFECTIVE.search(text)):
            self._effective = [self._effective[0] + float(match[1]), self._effective[1] + 1]

    def finish(self) -> None:
        """Figures that need all lines."""
        summed = sum(self._parameters.values())
        if summed:
            # Counts layer norms and a tied embedding on every rank that has them, so it is above the model's own number.
            self.run.summary["parameters_summed_over_ranks"] = summed
        if self._effective[1]:
            self.run.summary["effective_tflops"] = self._effective[0] / self._effective[1]

    def _degrees(self, text: str) -> None:
        for name, value in sizes(text):
            if name == "world_size":
                self.run.world_size = int(value)
            self.open.set(name, value, DUMP)

    def _count(self, text: str) -> None:
        for match in _RANK_PARAMETERS.finditer(text):
            if len(self._parameters) < _MOST_RANKS:
                self._parameters[match[1]] = int(match[2])
        total = _TOTAL.search(text)
        if total and self.run.model_parameters is None:
            self.run.model_parameters = round(float(total[1]) * 1e9)

    def _memory(self, text: str) -> None:
        # MB is MiB here. Ranks write into each other's lines, so every pair of the line counts.
        if "memory (MB)" not in text:
            return
        memory = self.run.memory
        for match in _MEMORY.finditer(text):
            gib = float(match[2]) / 1024
            if match[1] == "allocated":
                memory.allocated = raised(memory.allocated, gib)
            else:
                memory.reserved = raised(memory.reserved, gib)

    def _evaluation(self, line: int, text: str) -> None:
        match = _LOSS_AT.search(text)
        if match is None or len(self.run.evaluations) >= _MOST_EVALUATIONS:
            return
        losses: dict[str, float] = {}
        for part in text[match.end() :].split("|"):
            value = _LOSS_VALUE.search(part)
            try:
                losses |= {value[1].strip(): float(value[2])} if value else {}
            except ValueError:
                continue
        if losses:
            name = {"val": "validation"}.get(match[3], match[3]) or match[1]
            self.run.evaluations.append(Evaluation(name, int(match[2]) if match[2] else None, losses, line))
