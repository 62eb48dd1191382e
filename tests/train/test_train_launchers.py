"""The same run under torchrun and srun as launched by megactl itself: equal weights, and an end when a rank dies or a signal comes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from train_harness import (
    ROOT,
    TINY,
    assert_same_tensors,
    checkpoint,
    children,
    clean_environment,
    gone,
    losses,
    merged,
    steps,
    summary,
    wait_for,
)

# Four interpreters that import torch at once on two busy cores; below the limit of pytest-timeout.
PATIENCE = 280.0


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def srun(train, name, *flags, tasks, nodes=1):
    """The tasks that `srun` would start, each with the variables Slurm would set."""
    port, each = str(free_port()), tasks // nodes
    common = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_NNODES": str(nodes), "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})", "SLURM_STEP_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    own = ({"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % each), "SLURM_NODEID": str(i // each)} for i in range(tasks))
    return [train.begin(name, *flags, **common, **more) for more in own]


def test_one_task_a_rank(train, tmp_path):
    flags = ("--tp", "2", "--pp", "2")
    train("own", *flags).must(0)
    done = [task.wait().must(0) for task in srun(train, "srun", *flags, tasks=4)]
    assert losses(tmp_path / "srun") == losses(tmp_path / "own")
    assert_same_tensors(checkpoint(tmp_path / "srun", 6), checkpoint(tmp_path / "own", 6))
    # Rank 0 alone prints iterations; every rank keeps a log.
    assert [task.out.count("consumed samples") for task in done] == [6, 0, 0, 0]
    assert len(list((tmp_path / "srun" / "logs").glob("rank-*.log"))) == 4


def test_one_task_a_node(train, tmp_path):
    flags = ("--tp", "2", "--dp", "2", "--zero", "1")
    train("own", *flags).must(0)
    for task in srun(train, "srun", *flags, "--nproc", "2", tasks=2, nodes=2):
        task.wait().must(0)
    assert losses(tmp_path / "srun") == losses(tmp_path / "own")
    assert_same_tensors(checkpoint(tmp_path / "srun", 6), checkpoint(tmp_path / "own", 6))
    assert summary(tmp_path / "srun")["world_size"] == 4


def test_a_signal_to_every_task_saves(train, tmp_path):
    # `scancel --signal` and a job's time limit reach every task of the step.
    flags = ("--dp", "2", "--iterations", "50")
    train("own", *flags).must(0)
    tasks = srun(train, "srun", *flags, tasks=2)
    tasks[0].iterations(2)
    for task in tasks:
        task.signal(signal.SIGTERM)
    for task in tasks:
        task.wait().must(75)
    assert steps(tmp_path / "srun") == [losses(tmp_path / "srun")[-1][0]]
    for task in srun(train, "srun", *flags, tasks=2):
        task.wait().must(0)
    assert_same_tensors(checkpoint(tmp_path / "srun", 50), checkpoint(tmp_path / "own", 50))


def test_a_killed_task_ends_the_others(train, tmp_path):
    tasks = srun(train, "srun", "--dp", "2", "--iterations", "100000", tasks=2)
    tasks[0].iterations(2)
    tasks[1].signal(signal.SIGKILL)
    assert tasks[1].wait().code == -signal.SIGKILL
    done = tasks[0].wait(20)
    assert done.code == 1 and "error: rank 0" in done.err
    assert summary(tmp_path / "srun")["status"] == "failed"


def test_ranks_with_other_settings_are_refused(train, tmp_path):
    port = str(free_port())
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [train.begin("run", "--dp", "2", "--lr", f"1e-{rank + 2}", RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    for rank in ranks:
        done = rank.wait()
        assert done.code == 1 and "configuration hash differs between ranks: rank 1" in done.err


def torchrun(tmp_path, name, *flags, ranks):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"]
    command += ["-m", "megactl", "train", *merged(TINY, flags), "--run-dir", str(tmp_path / name)]
    return subprocess.Popen(command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, limit=PATIENCE):
    try:
        out, err = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_torchrun_and_a_plain_interpreter_give_the_same_weights(tmp_path, ranks):
    flags = ("--tp", "2", "--pp", str(ranks // 2))
    command = [sys.executable, "-m", "megactl", "train", *merged(TINY, flags), "--run-dir", str(tmp_path / "own")]
    own = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert own.returncode == 0, own.stderr
    code, out, err = finish(torchrun(tmp_path, "torchrun", *flags, ranks=ranks))
    assert code == 0, err
    assert out.count("consumed samples") == 6
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "own")
    assert_same_tensors(checkpoint(tmp_path / "torchrun", 6), checkpoint(tmp_path / "own", 6))


@pytest.mark.nightly
def test_a_killed_rank_ends_torchrun(tmp_path):
    process = torchrun(tmp_path, "run", "--dp", "2", "--iterations", "100000", ranks=2)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, lambda: process.poll() is None, 120)
        ranks = children(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
    finally:
        code, _, err = finish(process)
    assert code != 0 and "SIGKILL" in err
    assert time.monotonic() - killed < 40
    assert all(gone(pid) for pid in ranks)


@pytest.mark.nightly
def test_a_real_slurm_runs_it(tmp_path, real_slurm):
    """One srun task a rank, started without a script."""
    command = ["srun", "-N1", "-n2", "--chdir", str(tmp_path), sys.executable, "-m", "megactl", "train", *merged(TINY, ("--dp", "2"))]
    done = real_slurm.call(*command, "--run-dir", str(tmp_path / "srun"), cwd=ROOT, limit=180, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert [iteration for iteration, _ in losses(tmp_path / "srun")] == list(range(1, 7))
    assert summary(tmp_path / "srun")["world_size"] == 2
