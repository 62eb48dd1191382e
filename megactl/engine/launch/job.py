"""One launch: what it runs, where, and the summary it leaves behind."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megactl.engine.launch.child import Worker
from megactl.engine.launch.context import RankContext, error_path
from megactl.engine.metrics import read_summary, write_summary
from megactl.engine.resilience import Limits

if TYPE_CHECKING:
    from megactl.config.schema import Run
    from megactl.config.start import StartInfo

EXIT_SAVED = 75
EXIT_ABORTED = 130


@dataclass(frozen=True)
class Job:
    """A run about to start in this process.

    `started`: time.monotonic(); `limits`: of ranks without progress; `stopping`: what the worker does when it is asked to stop.
    """

    run: Run
    resolved: Any
    start: StartInfo
    run_dir: Path
    worker: Worker
    started: float
    limits: Limits
    stopping: str

    def work(self, context: RankContext) -> int:
        """Call the worker of one rank."""
        return self.worker(self.run, self.resolved, context)

    def forget_last_attempt(self, ranks: range) -> None:
        """Remove what an earlier attempt in this directory said about its end."""
        for rank in ranks:
            error_path(self.run_dir, rank).unlink(missing_ok=True)
        if 0 in ranks:
            (self.run_dir / "summary.json").unlink(missing_ok=True)

    def finish(self, status: str, code: int, error: str | None = None, *, secondary: bool = False) -> int:
        """Leave a summary and return `code`. A good end keeps the summary rank 0 wrote; a rank that only lost its connection
        does not overwrite the error that another node has written."""
        existing = read_summary(self.run_dir)
        if error is None:
            wanted = self.start.rank == 0 and existing is None
        else:
            wanted = existing is None or not (secondary and existing.get("error"))
        if wanted:
            # A full disk may be the very failure being reported; the exit code and the message must still get out.
            with suppress(OSError):
                write_summary(self.run_dir, self.resolved.run, status=status, world_size=self.start.world_size, error=error)
        return code
