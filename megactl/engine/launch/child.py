"""One rank, from the moment after the fork (or, under torchrun and srun, in this very process) to its exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import IO, Any, NoReturn

from megactl.engine.launch.context import RankContext, log_path
from megactl.engine.launch.failures import LOG_HEADER, Report, report_of, write_report
from megactl.engine.launch.host import ParentDeath, thread_share
from megactl.engine.resilience import STOP_SIGNALS, enable_stack_dumps

Worker = Callable[[Any, Any, RankContext], int]


def run_child(work: Callable[[], int], context: RankContext, death: ParentDeath, stderr_pipe: int | None) -> NoReturn:
    """The whole life of a forked rank. Never returns: os._exit, because the parent's exit handlers and buffers are not this process's.

    `stderr_pipe`: rank 0's stderr goes through it to the parent, which shows it and logs it; other ranks write to their log alone.
    """
    code = 1
    try:
        death.arm()
        context.stop.install(own_interrupts=False)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        log = open_log(context)
        _redirect(context, log, stderr_pipe)
        enable_stack_dumps(log)
        os.environ.update(context.environment())
        limit_threads(context)
        code, _ = run_worker(work, context, log)
    except BaseException:
        # Only the lines above can fail here (a full disk, say); the log may not exist yet, so stderr is the place.
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


def run_worker(work: Callable[[], int], context: RankContext, log: IO[str]) -> tuple[int, Report | None]:
    """Call the worker and turn its end into an exit code; an exception becomes a report for the launcher and a traceback in `log`."""
    try:
        code = work()
        if not isinstance(code, int):
            raise TypeError(f"the worker returned {code!r}, not an exit code")
        return code, None
    except KeyboardInterrupt:
        return 130, None
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0, None
        error: BaseException = RuntimeError(str(exit_.code))
    except BaseException as caught:
        error = caught
    report = report_of(error)
    log.write(report.traceback)
    log.flush()
    write_report(context.run_dir, context.rank, report)
    return report.exit_code, report


def open_log(context: RankContext) -> IO[str]:
    """This rank's log, opened to append: a resumed run continues it below a header line."""
    log = log_path(context.run_dir, context.rank).open("a", buffering=1)
    log.write(f"{LOG_HEADER} {context.rank}, pid {os.getpid()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    return log


def _redirect(context: RankContext, log: IO[str], stderr_pipe: int | None) -> None:
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.close(devnull)
    if stderr_pipe is not None:
        os.dup2(stderr_pipe, 2)
        os.close(stderr_pipe)
        return
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)


def limit_threads(context: RankContext) -> None:
    """Give torch its share of the cores. Under an own launch as under torchrun, which sets OMP_NUM_THREADS to 1."""
    # The variables alone come too late here: the libraries read them when the parent loaded them.
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(thread_share(context.local_world_size))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # Nobody reads any more; the exit code still tells how the rank ended.
            continue
