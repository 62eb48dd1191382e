"""What a rule is and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from megactl.cluster.lint.batch import Batch

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Hit:
    """One place where a rule is broken: the line, what stands there, why that is wrong, what to write instead."""

    line: int
    value: str
    message: str
    cure: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `summary` is its line in the table of rules; `check` yields the places where a script breaks it."""

    id: str
    severity: Severity
    summary: str
    check: Callable[[Batch], Iterable[Hit]]


@dataclass(frozen=True, slots=True)
class Finding:
    """A hit with the rule that made it."""

    line: int
    rule: str
    severity: Severity
    value: str
    message: str
    cure: str

    def __str__(self) -> str:
        return f"{self.value}: {self.message}; {self.cure}"
