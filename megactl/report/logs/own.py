"""megactl's own logs: metrics.jsonl, and what its console adds to Megatron-LM's lines."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, ClassVar

from megactl.report.logs.anchors import Kind
from megactl.report.logs.parser import DECIMAL, Parser
from megactl.report.logs.records import Evaluation
from megactl.report.records import parse_line

_SAVED = re.compile(rf"/checkpoints/step-[0-9]+ in ({DECIMAL}) s")
# Keys of metrics.jsonl and the columns they are.
_COLUMNS = {
    "seconds": "seconds",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "loss_scale": "loss_scale",
    "global_batch_size": "global_batch",
    "consumed_samples": "consumed_samples",
    "model_tflops_per_gpu": "tflops_logged",
}
_PARTS = {"lm_loss": "lm loss", "sentence_loss": "sop loss"}
_MOST_EVALUATIONS = 10_000


class Own(Parser):
    """A line an iteration of metrics.jsonl, and the time of a save."""

    kinds: ClassVar[int] = Kind.METRICS_LINE | Kind.CHECKPOINT

    def note(self, kinds: int, line: int, text: str) -> None:
        """Read one line."""
        match = _SAVED.search(text) if kinds & Kind.CHECKPOINT else None
        if match:
            self.open.timer("save-checkpoint", float(match[1]) * 1000)
        record = _parsed(text) if kinds & Kind.METRICS_LINE else None
        if record is None:
            return
        if record.get("kind") == "eval":
            self._evaluation(line, record)
        elif not len(self.rows) or record["iteration"] > self.rows.iteration[-1]:
            self._iteration(line, record)

    def _iteration(self, line: int, record: dict[str, Any]) -> None:
        values = {column: float(record[key]) for key, column in _COLUMNS.items() if _is_number(record.get(key))}
        values["skipped"], values["nan"] = float(bool(record.get("skipped"))), float(bool(record.get("nan")))
        losses = {name: float(record[key]) for key, name in _PARTS.items() if _is_number(record.get(key))}
        if not losses and _is_number(record.get("loss")):
            losses = {"lm loss": float(record["loss"])}
        if abs(record["iteration"]) < 1 << 62:
            self.rows.append(record["iteration"], line=line, losses=losses, **values)
        if _is_number(record.get("time")):
            self._date(float(record["time"]))

    def _date(self, seconds: float) -> None:
        try:
            now = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat(timespec="seconds")
        except (OverflowError, ValueError, OSError):
            return
        self.run.started_at = self.run.started_at or now
        self.run.ended_at = now

    def _evaluation(self, line: int, record: dict[str, Any]) -> None:
        if _is_number(record.get("loss")) and len(self.run.evaluations) < _MOST_EVALUATIONS:
            losses = {"lm loss": float(record["loss"])}
            self.run.evaluations.append(Evaluation(str(record.get("name", "validation")), record["iteration"], losses, line))


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return parse_line(text.encode("utf-8", "replace"))
    except RecursionError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
