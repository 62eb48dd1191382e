"""Reading `metrics.jsonl` back: a line an iteration, evaluation lines of their own, and whatever a crash left of the last line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


@dataclass
class Records:
    """The lines of one metrics file by kind, in file order; `damaged` counts lines that are not what was written (a cut last line)."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0


def parse_line(line: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl as a dict with an integer `iteration`, or None if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("iteration"), int) else None


def iterate_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line as written and parsed. A last line without its newline counts as damaged: the write was cut there."""
    with path.open("rb") as lines:
        for line in lines:
            yield line, parse_line(line) if line.endswith(b"\n") else None


def read_records(path: Path) -> Records:
    """All records of a metrics file. Raises OSError if it cannot be read."""
    records = Records()
    for _, record in iterate_lines(path):
        if record is None:
            records.damaged += 1
        elif record.get("kind") == "eval":
            records.evaluations.append(record)
        else:
            records.steps.append(record)
    return records


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """`summary.json` as a dict, None if it is missing or damaged."""
    try:
        summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def median_of(steps: list[dict[str, Any]], key: str) -> float | None:
    """Median of the values present under `key`, None if there are none."""
    values = [step[key] for step in steps if isinstance(step.get(key), int | float)]
    return statistics.median(values) if values else None


def final_loss(steps: list[dict[str, Any]]) -> float | None:
    """Loss of the last iteration, None if there is none or it is not a number."""
    return steps[-1].get("loss") if steps else None
