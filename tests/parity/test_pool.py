"""The pool itself: results by rank, failures with rank and reason, and a fresh start after each."""

from __future__ import annotations

import os
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from megactl.config.schema import Parallel
from parity.pool import Pools, Worker, WorkerFailure, WorkerPool


def total(worker: Worker, start: int) -> tuple[int, float]:
    value = torch.tensor(float(start + worker.rank))
    dist.all_reduce(value)
    return worker.rank, value.item()


def fail_on(worker: Worker, rank: int) -> None:
    if worker.rank == rank:
        raise ValueError(f"no such thing on {rank}")
    dist.barrier()


def die_on(worker: Worker, rank: int) -> None:
    if worker.rank == rank:
        os._exit(7)
    dist.barrier()


def sleep_on(worker: Worker, rank: int) -> None:
    if worker.rank == rank:
        time.sleep(60.0)


def threads_after(worker: Worker, layouts: list[Parallel]) -> int:
    """Threads of this process (gloo's too) after the groups of these layouts have come and gone."""
    for layout in layouts:
        mesh = worker.mesh(layout)
        for axis in (mesh.tp, mesh.dp, mesh.pp):
            if axis.group is not None:
                dist.all_reduce(torch.ones(4), group=axis.group)
    worker.forget_mesh()
    return psutil.Process().num_threads()


def environment(worker: Worker) -> tuple[int, int, bool]:
    return os.getpid(), torch.get_num_threads(), "pytest" in threading.current_thread().name


def test_results_come_by_rank(pools: Pools):
    for start in (0, 10):
        assert pools.run(4, total, start) == [(rank, 4 * start + 6.0) for rank in range(4)]


def test_workers_persist_and_have_one_thread_each(pools: Pools):
    first, second = pools.run(2, environment), pools.run(2, environment)
    assert first == second and len({pid for pid, *_ in first}) == 2
    assert all(threads == 1 for _, threads, _ in first)


@pytest.fixture
def pool():
    made = WorkerPool(2, timeout=20.0)
    yield made
    made.close()


def test_an_exception_names_its_rank_and_the_pool_starts_again(pool: WorkerPool):
    before = pool.run(environment)
    with pytest.raises(WorkerFailure, match=r"rank 1 of 2: Traceback[\s\S]*ValueError: no such thing on 1") as caught:
        pool.run(fail_on, 1)
    assert "in fail_on" in str(caught.value)
    assert pool.run(total, 0) == [(0, 1.0), (1, 1.0)]
    assert pool.run(environment) != before


def test_a_dead_worker_names_its_rank(pool: WorkerPool):
    with pytest.raises(WorkerFailure, match="rank 0 of 2: the process ended with exit code 7"):
        pool.run(die_on, 0)
    assert pool.run(total, 0) == [(0, 1.0), (1, 1.0)]


def test_a_hung_worker_names_its_rank_and_where_it_stands(pool: WorkerPool):
    pool.run(total, 0)
    pids, pool.timeout = pool.pids(), 0.5
    with pytest.raises(WorkerFailure, match=r"rank 1 of 2: no answer in 0.5 s[\s\S]*in sleep_on") as caught:
        pool.run(sleep_on, 1)
    assert "rank 0" not in str(caught.value)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
    pool.timeout = 20.0
    assert pool.run(total, 0) == [(0, 1.0), (1, 1.0)]


def test_groups_of_former_layouts_leave_no_threads(pools: Pools):
    layouts = [
        Parallel(tensor_parallel=2, pipeline_parallel=2, data_parallel=1),
        Parallel(tensor_parallel=1, pipeline_parallel=2, data_parallel=2),
    ]
    once = pools.run(4, threads_after, layouts)
    assert pools.run(4, threads_after, layouts * 4) == once
