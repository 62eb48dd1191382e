"""What a rank is told about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megactl.engine.resilience import Heartbeat, StopFlag


@dataclass(frozen=True)
class RankContext:
    """A rank's place in the run, and its links to whoever started it.

    `is_child`: forked by our launcher (otherwise torchrun or srun started this process).
    `stop`: ask `stop.requested` between steps. `heartbeat`: call `heartbeat.beat(iteration)` every step, and
    `with heartbeat.phase("save")` around a save or an evaluation.
    `listen_fd`: socket already listening on master_port, only in rank 0; `rendezvous.connect_store` uses it.
    `terminal_fd`: where a live progress line may be drawn, only in rank 0 and only if stderr is a terminal.
    `started`: time.monotonic() when the run was launched, for `exit_duration`.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int
    run_dir: Path
    is_child: bool
    stop: StopFlag = field(repr=False)
    heartbeat: Heartbeat = field(repr=False)
    listen_fd: int | None = None
    terminal_fd: int | None = None
    started: float = 0.0

    def environment(self) -> dict[str, str]:
        """The variables torchrun would set, so that libraries which look for them find the same values."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def log_path(run_dir: Path, rank: int) -> Path:
    """File that receives what this rank writes to stderr, and its tracebacks."""
    return run_dir / "logs" / f"rank-{rank}.log"


def error_path(run_dir: Path, rank: int) -> Path:
    """File in which this rank reports the exception that ended it."""
    return run_dir / "logs" / f"rank-{rank}.error.json"
