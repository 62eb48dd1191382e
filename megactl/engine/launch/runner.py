"""`launch`: from a resolved run to an exit code."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megactl.engine.launch.child import Worker
from megactl.engine.launch.forked import run_forked
from megactl.engine.launch.host import thread_environment
from megactl.engine.launch.inplace import run_inplace
from megactl.engine.launch.job import Job
from megactl.engine.metrics import check_loggers
from megactl.engine.resilience import Limits
from megactl.errors import MegactlError

if TYPE_CHECKING:
    from megactl.config.schema import Run
    from megactl.config.start import StartInfo


SAVES = "the run saves at the end of this iteration and exits with code 75"


def launch(run: Run, resolved: Any, start: StartInfo, *, worker: Worker | None = None, stopping: str = SAVES) -> int:
    """Run `worker(run, resolved, context)` on every rank this process answers for, and return the exit code.

    0 done; 75 saved, run again; 130 ended by a second Ctrl-C; otherwise the code of the rank that failed first (2 for a user's
    mistake, 1 for anything else), whose error is printed. Default worker: `megactl.engine.trainer.run_rank`. `stopping` tells the
    user what a worker does once a signal has asked it to stop.
    Raises MegactlError for what is wrong before a rank starts (no torch, port taken). The caller holds the run directory
    (`config.store.claim`); the ranks share that lock, so it lasts until the last of them is gone.
    """
    started = time.monotonic()
    limits = Limits.from_environment()
    check_loggers(resolved.run)
    os.environ.update(thread_environment(start.local_world_size))
    run_dir = _run_directory(resolved.run, start)
    job = Job(run, resolved, start, run_dir, worker or _default_worker(), started, limits, stopping)
    return run_forked(job) if start.spawns else run_inplace(job)


def _default_worker() -> Worker:
    # Imported before the fork: torch takes seconds to import, and children share the parent's pages.
    try:
        from megactl.engine.trainer import run_rank
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise MegactlError("training needs torch, which is not installed", 'pip install "megactl[train]"') from error
        raise
    return run_rank


def _run_directory(run: Run, start: StartInfo) -> Path:
    if run.logging.run_dir is None and start.kind != "self":
        # Every process would take its own clock's name, and the ranks would write into different folders.
        message = "run_dir is not set: ranks started by torchrun or srun need one folder that all of them know"
        raise MegactlError(message, "give --run-dir DIR")
    name = f"{run.preset or run.model.architecture}-{datetime.now():%Y%m%d-%H%M%S}"
    run_dir = Path(run.logging.run_dir) if run.logging.run_dir is not None else Path("runs") / name
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"run_dir {run_dir}: cannot be created: {error.strerror}"
        raise MegactlError(message, "choose a folder you may write to with --run-dir") from error
    return run_dir
