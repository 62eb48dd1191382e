"""Stopping a run on purpose and by accident: signals, killed ranks, a killed parent, a rank that hangs; and going on afterwards."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from train_harness import assert_same_tensors, checkpoint, evaluations, gone, losses, records, steps, summary, wait_for

ENDLESS = ("--iterations", "100000", "--dp", "2")


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGUSR2", pytest.param("SIGUSR1", marks=pytest.mark.nightly), pytest.param("SIGHUP", marks=pytest.mark.nightly)]
)
def test_a_signal_saves_and_exits_75(train, tmp_path, name):
    command = train.begin("run", *ENDLESS)
    command.iterations(2)
    command.signal(getattr(signal, name))
    command.wait().must(75, f"{name} received", "run the same command again to continue")
    done = losses(tmp_path / "run")
    assert steps(tmp_path / "run") == [done[-1][0]] and done[-1][0] >= 2
    assert summary(tmp_path / "run")["status"] == "saved"
    assert summary(tmp_path / "run")["iterations"] == done[-1][0]


def test_ctrl_c_saves_and_the_same_command_completes(train, tmp_path):
    flags = ("--iterations", "50", "--dp", "2")
    train("whole", *flags).must(0)
    command = train.begin("run", *flags)
    command.iterations(2)
    # The terminal sends Ctrl-C to every process of the group, ranks included.
    os.killpg(command.pid, signal.SIGINT)
    command.wait().must(75, "press Ctrl-C again")
    stopped = steps(tmp_path / "run")
    assert len(stopped) == 1 and 2 <= stopped[0] < 50
    train("run", *flags).must(0, f"at iteration {stopped[0]}")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_tensors(checkpoint(tmp_path / "run", 50), checkpoint(tmp_path / "whole", 50))


def test_a_signal_to_one_rank_stops_all_at_the_same_iteration(train, tmp_path):
    command = train.begin("run", *ENDLESS)
    ranks = command.ranks(2)
    command.iterations(1)
    os.kill(ranks[1], signal.SIGUSR1)
    command.wait().must(75)
    assert steps(tmp_path / "run") == [losses(tmp_path / "run")[-1][0]]


def test_a_second_ctrl_c_ends_at_once(train, tmp_path):
    command = train.begin("run", *ENDLESS)
    ranks = command.ranks(2)
    command.iterations(1)
    # A stopped rank keeps the run from reaching the end of its iteration, so the first Ctrl-C cannot have its way.
    os.kill(ranks[1], signal.SIGSTOP)
    os.killpg(command.pid, signal.SIGINT)
    wait_for(lambda: "press Ctrl-C again" in command.err)
    os.killpg(command.pid, signal.SIGINT)
    command.wait(10).must(130, "ended without saving")
    assert all(gone(pid) for pid in ranks.values())
    assert steps(tmp_path / "run") == []
    assert summary(tmp_path / "run")["status"] == "interrupted"


def test_exit_duration(train, tmp_path):
    started = time.monotonic()
    train("run", *ENDLESS, "--exit-duration", "0.02").must(75)
    assert 1.2 <= time.monotonic() - started < 30
    assert steps(tmp_path / "run") == [losses(tmp_path / "run")[-1][0]]


@pytest.mark.parametrize(
    "layout", [("--dp", "2"), *(pytest.param(flags, marks=pytest.mark.nightly) for flags in (("--tp", "2"), ("--pp", "2")))], ids=" ".join
)
def test_a_killed_rank_ends_the_run_and_the_same_command_resumes(train, tmp_path, layout):
    flags = (*layout, "--iterations", "40", "--save-interval", "5")
    command = train.begin("run", *flags)
    ranks = command.ranks(2)
    wait_for(lambda: "step-00000005 in" in command.err)
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    command.wait().must(1, f"rank 1 (pid {ranks[1]}) was killed by signal 9 (SIGKILL)")
    assert time.monotonic() - killed < 8
    assert all(gone(pid) for pid in ranks.values())
    failed = summary(tmp_path / "run")
    assert failed["status"] == "failed" and "rank 1" in failed["error"]
    last = steps(tmp_path / "run")[-1]
    train("run", *flags).must(0, f"at iteration {last}")
    assert [iteration for iteration, _ in losses(tmp_path / "run")] == list(range(1, 41))


def test_killing_the_parent_leaves_no_process(train):
    command = train.begin("run", *ENDLESS)
    ranks = command.ranks(2)
    command.iterations(1)
    command.signal(signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    wait_for(lambda: all(gone(pid) for pid in ranks.values()), limit=10)


def test_a_rank_that_hangs_is_named(train):
    command = train.begin("run", *ENDLESS, MEGACTL_HANG_TIMEOUT="2")
    ranks = command.ranks(2)
    command.iterations(4)
    os.kill(ranks[1], signal.SIGSTOP)
    done = command.wait(40).must(1, f"rank 1 (pid {ranks[1]}) made no progress", "stopped by a signal (SIGSTOP)")
    assert "MEGACTL_HANG_TIMEOUT" in done.err
    assert all(gone(pid) for pid in ranks.values())


def test_a_rank_that_is_stopped_while_it_starts_is_named(train):
    command = train.begin("run", *ENDLESS, MEGACTL_START_TIMEOUT="4")
    ranks = command.ranks(2)
    os.kill(ranks[1], signal.SIGSTOP)
    done = command.wait(40).must(1, f"error: rank 1 (pid {ranks[1]}) made no progress", "stopped by a signal (SIGSTOP)")
    assert "before its first iteration was done (start; limit 4 s)" in done.err and "MEGACTL_START_TIMEOUT" in done.err
    assert all(gone(pid) for pid in ranks.values())


EVALUATED = ("--dp", "2", "--iterations", "12", "--eval-interval", "1")


def test_a_stop_saves_before_it_evaluates_and_no_point_is_lost(train, tmp_path):
    train("whole", *EVALUATED, "--eval-iterations", "2").must(0)
    command = train.begin("run", *EVALUATED, "--eval-iterations", "2")
    command.iterations(2)
    command.signal(signal.SIGTERM)
    command.wait().must(75)
    (stopped,) = steps(tmp_path / "run")
    # Every iteration is to be evaluated; the one it stopped at has been left to the next start.
    assert [iteration for iteration, _ in evaluations(tmp_path / "run")] == list(range(1, stopped))
    train("run", *EVALUATED, "--eval-iterations", "2").must(0)
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole") and len(evaluations(tmp_path / "run")) == 12
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    before = records(tmp_path / "run")
    train("run", *EVALUATED, "--eval-iterations", "2").must(0, "nothing to do")
    assert records(tmp_path / "run") == before


def test_a_kill_in_an_evaluation_costs_neither_the_save_nor_the_point(train, tmp_path):
    slow = ("--dp", "2", "--iterations", "12", "--eval-interval", "4", "--eval-iterations", "2000")
    command = train.begin("run", *slow, "--save-interval", "4")
    wait_for(lambda: "step-00000004 in" in command.err, command.alive)
    os.killpg(command.pid, signal.SIGKILL)
    command.wait()
    assert steps(tmp_path / "run") == [4] and evaluations(tmp_path / "run") == []
    quick = ("--dp", "2", "--iterations", "12", "--eval-interval", "4", "--eval-iterations", "2")
    train("run", *quick).must(0, "at iteration 4")
    assert [iteration for iteration, _ in evaluations(tmp_path / "run")] == [4, 8, 12]
    train("whole", *quick).must(0)
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_signals_at_random_moments(train, tmp_path):
    """The run is stopped twenty times at any moment from the birth of its ranks on; what comes out is the unbroken run."""
    flags = ("--iterations", "60", "--dp", "2", "--save-interval", "7", "--hidden-dropout", "0.1")
    train("whole", *flags).must(0)
    chance = random.Random(0)
    for _ in range(20):
        command = train.begin("run", *flags)
        command.ranks(2)
        time.sleep(chance.uniform(0, 1.5))
        number = chance.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL])
        if command.alive():
            (os.killpg if number == signal.SIGINT else os.kill)(command.pid, number)
        done = command.wait()
        assert done.code in (0, 75, -signal.SIGKILL), done.err
    train("run", *flags).must(0)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert_same_tensors(checkpoint(tmp_path / "run", 60), checkpoint(tmp_path / "whole", 60))
