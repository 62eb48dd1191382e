"""The Hugging Face Trainer: progress bars, dictionaries of figures, and its arguments. Every node prints its own copy of most of it."""

from __future__ import annotations

import math
import re
from typing import ClassVar

from megactl.report.logs.anchors import Kind
from megactl.report.logs.arguments import ReprBlock, overrides, unprefixed
from megactl.report.logs.parser import CONFIGURATION, DECIMAL, DUMP, OpenRun, Parser
from megactl.report.logs.records import Evaluation

_BAR = re.compile(
    r"\s*[0-9]{1,3}%\|[^|]{0,400}\| ([0-9]{1,15})/([0-9]{1,15}) \[(?:([0-9]{1,9}):)?([0-9]{1,2}):([0-9]{2})<[^,\]]{1,40}, +"
    rf"({DECIMAL}|\?)(s/it|it/s)"
)
_PAIR = re.compile(rf"'(\w{{1,64}})': '?(-?{DECIMAL}(?:[eE][+-]?[0-9]{{1,4}})?|nan|-?inf)'?[,}}]")
_METRIC = re.compile(r"(\w+) += +(\S+)")
_INFO = re.compile(
    r"(Total optimization steps|Total train batch size|Instantaneous batch size per device|Accumulation steps)"
    r"[^=]{0,80}= ([0-9][0-9,]{0,19})"
)
_TRAINABLE = re.compile(r"Number of trainable parameters = ([0-9][0-9,]{0,23})")
_NAMES = {
    "Total train batch size": "train_batch_size",
    "Instantaneous batch size per device": "per_device_train_batch_size",
    "Accumulation steps": "gradient_accumulation_steps",
}
# A bar shows whole seconds: over ten of them the error of a time is below a tenth.
_WINDOW_SECONDS = 10
_MOST_EVALUATIONS = 10_000


class HuggingFace(Parser):
    """Its lines; the times of steps come from the bar's clock, and losses from the dictionaries."""

    kinds: ClassVar[int] = Kind.HF_ARGUMENTS | Kind.HF_PROGRESS | Kind.HF_LOG | Kind.HF_METRICS | Kind.HF_INFO | Kind.PARAMETERS

    def __init__(self, open_run: OpenRun) -> None:
        super().__init__(open_run)
        self._repr: ReprBlock | None = None
        self._steps: int | None = None
        self._window: tuple[int, int] | None = None
        self._step = 0
        self._logged = 0
        self._last_log = ""
        self._in_metrics = False

    def note(self, kinds: int, line: int, text: str) -> None:
        """Read one line."""
        if kinds & Kind.HF_ARGUMENTS:
            self._repr = ReprBlock()
        if self._repr is not None and kinds & (Kind.HF_ARGUMENTS | Kind.BLOCK):
            self._arguments(self._repr.add(text))
        if kinds & Kind.HF_METRICS:
            self._in_metrics = True
        elif self._in_metrics and kinds & Kind.BLOCK:
            self._metric(text)
        if kinds & Kind.HF_INFO:
            self._info(text)
        if kinds & Kind.HF_PROGRESS:
            self._bar(line, text)
        if kinds & Kind.HF_LOG:
            self._figures(line, text)
        if kinds & Kind.PARAMETERS and (match := _TRAINABLE.search(text)) and self.run.model_parameters is None:
            self.run.model_parameters = int(match[1].replace(",", ""))

    def _arguments(self, found: list[tuple[str, str]] | None) -> None:
        if found is None:
            return
        self._repr = None
        for name, value in found:
            self.open.set(name, value, DUMP)

    def _metric(self, text: str) -> None:
        match = _METRIC.search(unprefixed(text).rpartition(">>")[2])
        try:
            if match:
                self.run.summary.setdefault(match[1], float(match[2].replace(",", "")))
        except ValueError:
            return  # a duration such as 0:15:19.02, which the dictionary has in seconds

    def _info(self, text: str) -> None:
        match = _INFO.search(text)
        if match:
            value = match[2].replace(",", "")
            if match[1] == "Total optimization steps":
                self._steps = int(value or 0) or None
                self.open.set("max_steps_of_run", value, DUMP)
            else:
                self.open.set(_NAMES[match[1]], value, DUMP)
        _, overriding, text = text.partition("Overriding config: ")
        if overriding:
            for name, value in overrides(text):
                self.open.set(name, value, CONFIGURATION)

    def _bar(self, line: int, text: str) -> None:
        match = _BAR.match(unprefixed(text))
        if match is None:
            return
        step, total = int(match[1]), int(match[2])
        if self._steps is None:
            self._steps = total
        # Evaluation has a bar of its own with another total; every node has one of the same.
        if total != self._steps or (self._window is not None and step <= self._step):
            return
        elapsed = int(match[3] or 0) * 3600 + int(match[4]) * 60 + int(match[5])
        if self._window is None:
            self._window = (step, elapsed) if step == 0 else (0, 0) if step == 1 else (step, elapsed)
        self._step = step
        steps, seconds = step - self._window[0], elapsed - self._window[1]
        if steps <= 0 or (seconds < _WINDOW_SECONDS and step != total):
            return
        self._window = (step, elapsed)
        rate = float(match[6]) if match[6] != "?" else 0.0
        shown = rate if match[7] == "s/it" else 1 / rate if rate else math.nan
        self._row(step, line, seconds / steps if seconds >= 2 else shown)

    def _row(self, step: int, line: int, seconds: float = math.nan) -> None:
        rows = self.rows
        if len(rows) and rows.iteration[-1] == step:
            rows.seconds[-1] = seconds if math.isnan(rows.seconds[-1]) else rows.seconds[-1]
        elif not len(rows) or step > rows.iteration[-1]:
            rows.append(step, total=self._steps or -1, line=line, seconds=seconds)

    def _figures(self, line: int, text: str) -> None:
        for found in re.findall(r"\{[^{}]{1,4000}\}", text):
            values = {name: float(value) for name, value in _PAIR.findall(found)}
            if "train_runtime" in values:
                for name, value in values.items():
                    self.run.summary.setdefault(name, value)
            elif "loss" in values and found != self._last_log:
                self._last_log = found
                self._losses(line, values)
            elif "eval_loss" in values and len(self.run.evaluations) < _MOST_EVALUATIONS:
                evaluation = Evaluation("validation", self._step or None, {"loss": values["eval_loss"]}, line)
                if not self.run.evaluations or self.run.evaluations[-1].losses != evaluation.losses:
                    self.run.evaluations.append(evaluation)

    def _losses(self, line: int, values: dict[str, float]) -> None:
        self._logged += 1
        # Without a bar the step is known from the interval alone.
        step = self._step or self._logged * _whole(self.run.arguments.get("logging_steps"))
        if not len(self.rows) or step > self.rows.iteration[-1]:
            self._row(step, line)
        elif step < self.rows.iteration[-1]:
            return
        rows = self.rows
        rows.losses.setdefault("loss", rows.grad_norm[:0])
        while len(rows.losses["loss"]) < len(rows):
            rows.losses["loss"].append(math.nan)
        rows.losses["loss"][-1] = values["loss"]
        for name in ("learning_rate", "grad_norm"):
            if name in values:
                getattr(rows, name)[-1] = values[name]


def _whole(text: str | None) -> int:
    try:
        return max(1, int(float(text or "1")))
    except (ValueError, OverflowError):
        return 1
