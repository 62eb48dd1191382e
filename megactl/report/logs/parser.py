"""What the parsers of the systems share: a run that is being read, and how settings from several places in it go together."""

from __future__ import annotations

from array import array
from typing import ClassVar

from megactl.report.logs.events import EventLog
from megactl.report.logs.records import Columns, Run

# Of two places that state a setting the one that the program itself printed last before training rules.
DUMP, CONFIGURATION, TRACE = 3, 2, 1


# A number as a part of other patterns: always one that float() takes, and never longer than what is printed.
DECIMAL = r"[0-9]{1,18}(?:\.[0-9]{1,18})?"


class OpenRun:
    """A run while its lines come in. `seen`: kinds of all its lines so far."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.events = EventLog()
        self.seen = 0
        self._ranks: dict[str, int] = {}

    def set(self, name: str, value: str, rank: int) -> None:
        """State a setting; what a place of a higher rank stated stays."""
        if rank >= self._ranks.get(name, 0):
            self.run.arguments[name], self._ranks[name] = value, rank

    def inherit(self, other: OpenRun) -> None:
        """Take the settings of the run before, which went on from an earlier iteration without printing them again."""
        self.run.arguments, self._ranks = dict(other.run.arguments), dict(other._ranks)
        self.run.world_size, self.run.model_parameters = other.run.world_size, other.run.model_parameters
        self.seen = other.seen

    @property
    def survived(self) -> int:
        """The line of the last iteration line but one: what came before it did not end the run."""
        lines = self.run.iterations.line
        return lines[-2] if len(lines) > 1 else 0

    def timer(self, name: str, milliseconds: float) -> None:
        """Add one time of a named timer."""
        self.run.timers.setdefault(name, array("d")).append(milliseconds)


class Parser:
    """One system's lines. `kinds`: the notes it wants; `rows`: iterations it read itself, used where no iteration lines are there."""

    kinds: ClassVar[int] = 0

    def __init__(self, open_run: OpenRun) -> None:
        self.open, self.run = open_run, open_run.run
        self.rows = Columns()

    def note(self, kinds: int, line: int, text: str) -> None:
        """Read one line. `kinds` has BLOCK where it follows a line of this parser that opened a block."""
        raise NotImplementedError

    def finish(self) -> None:
        """The run is over."""


def raised(old: float | None, value: float) -> float:
    """The larger of a maximum so far and a value."""
    return value if old is None or value > old else old
