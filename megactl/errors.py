"""The errors megactl raises on purpose. The command line turns each into one message and an exit code, never a traceback.

A message follows one pattern: the value, the rule it breaks, what to set instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_INTERRUPTED = 130
"""Exit code of what the user has ended with Ctrl-C: 128 and the number of SIGINT, as shells have it."""


class MegactlError(Exception):
    """An expected failure. `hint` says what to do; `exit_code` is the process's exit code (2: the input was wrong)."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration: where (`tensor_parallel = 3`), the rule it breaks, and what to set instead."""

    where: str
    rule: str
    instead: str | None = None

    def __str__(self) -> str:
        text = f"{self.where}: {self.rule}" if self.where else self.rule
        return f"{text}; {self.instead}" if self.instead else text


class ConfigError(MegactlError):
    """One or more mistakes in the configuration, reported together."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems]
        super().__init__(lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems:", *(f"  - {line}" for line in lines)]))


class DataError(MegactlError):
    """A data or tokenizer file is missing, empty, truncated or not what its header says."""


class CheckpointError(MegactlError):
    """A checkpoint is missing, incomplete, damaged, or does not fit the run."""


class ScheduleError(MegactlError):
    """A pipeline schedule breaks one of its own rules."""


class BuildError(MegactlError):
    """A compiled module is missing or was built for another torch, device or source."""


class RunError(MegactlError):
    """The work itself failed: a rank died, a collective broke, a disk filled up."""

    exit_code = 1
