"""One rank in this very process, where torchrun or srun has started one process a rank."""

from __future__ import annotations

import os
import sys
import traceback

from megactl.engine.launch.child import limit_threads, open_log, run_worker
from megactl.engine.launch.context import RankContext, log_path
from megactl.engine.launch.failures import Report
from megactl.engine.launch.job import EXIT_ABORTED, EXIT_SAVED, Job
from megactl.engine.resilience import Board, HangWatch, Heartbeat, LocalWatch, Overdue, StopFlag, disable_stack_dumps, enable_stack_dumps


def run_inplace(job: Job) -> int:
    """Run the worker here, print its failure with its rank, and return the exit code."""
    start = job.start
    job.forget_last_attempt(range(start.rank, start.rank + 1))
    board, stop = Board(1), StopFlag()
    context = RankContext(
        rank=start.rank,
        local_rank=start.local_rank,
        world_size=start.world_size,
        local_world_size=start.local_world_size,
        master_addr=start.master_addr,
        master_port=start.master_port,
        run_dir=job.run_dir,
        is_child=False,
        stop=stop,
        heartbeat=Heartbeat(board, 0),
        terminal_fd=2 if start.rank == 0 and sys.stderr.isatty() else None,
        started=job.started,
    )
    os.environ.update(context.environment())
    stop.install(own_interrupts=True)
    with open_log(context) as log:
        enable_stack_dumps(log)
        watch = LocalWatch(HangWatch(board, job.limits), log=log, on_hang=lambda overdue: _end_hung_rank(job, context, overdue))
        watch.start()
        limit_threads(context)
        try:
            code, report = run_worker(lambda: job.work(context), context, log)
        finally:
            watch.stop()
            stop.restore()
            disable_stack_dumps()
    return _conclude(job, context, code, report)


def _conclude(job: Job, context: RankContext, code: int, report: Report | None) -> int:
    if code in (0, EXIT_SAVED):
        return job.finish("saved" if code else "completed", code)
    if code == EXIT_ABORTED:
        return job.finish("interrupted", code, "interrupted by a second SIGINT")
    # No parent of ours speaks for this rank, so it names itself.
    if report is None:
        text = message = f"exited with code {code}"
    else:
        message = report.message if report.expected else f"{report.type}: {report.message}"
        text = message if report.expected else f"{message}\n{report.traceback.rstrip()}"
    print(f"error: rank {context.rank}: {text}\n  log: {log_path(context.run_dir, context.rank)}", file=sys.stderr, flush=True)
    kept = report.exit_code if report is not None else 1
    return job.finish("failed", kept, f"rank {context.rank}: {message}", secondary=report is not None and report.secondary)


def _end_hung_rank(job: Job, context: RankContext, overdue: Overdue) -> None:
    text = f"rank {context.rank} {overdue}"
    print(f"error: {text}\n  its stacks: {log_path(context.run_dir, context.rank)}\n  hint: {overdue.hint}", file=sys.stderr, flush=True)
    try:
        job.finish("failed", 1, text)
    except Exception:
        traceback.print_exc()
    # The main thread is stuck, perhaps for ever, inside a collective: nothing gentler can end this process.
    os._exit(1)
