"""Heartbeats, the hang watch and the stop flag, without processes and without waiting."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megactl.engine import resilience
from megactl.engine.resilience import Board, HangWatch, Heartbeat, Limits, StopFlag, exit_duration_reached
from megactl.errors import MegactlError


class Clock:
    """A clock the tests turn by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(resilience.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def run_steps(clock: Clock, hearts: list[Heartbeat], steps: range, seconds: float) -> None:
    for iteration in steps:
        for heart in hearts:
            heart.beat(iteration)
        clock.now += seconds


def watch_until(clock: Clock, watch: HangWatch, seconds: float, alive=(0, 1)) -> list:
    """Check once a second for `seconds`; the first finding."""
    for _ in range(int(seconds)):
        clock.now += 1.0
        if found := watch.check(alive):
            return found
    return []


def test_silent_rank_is_found_after_its_limit(clock):
    board = Board(2)
    hearts = [Heartbeat(board, rank) for rank in range(2)]
    watch = HangWatch(board, Limits())
    run_steps(clock, hearts, range(1, 6), 1.0)
    silent_since = clock.now
    for _ in range(100):
        hearts[0].beat(6)
        assert watch_until(clock, watch, 1) == []
    (found,) = watch_until(clock, watch, 60)[:1]
    assert found.index == 1
    assert clock.now - silent_since == pytest.approx(120, abs=2)
    assert found.pulse.iteration == 5


def test_slow_steps_have_a_longer_limit(clock):
    board = Board(1)
    run_steps(clock, [Heartbeat(board, 0)], range(1, 6), 30.0)
    watch = HangWatch(board, Limits())
    assert watch.limit(board.pulse(0)) == pytest.approx(600)
    assert watch_until(clock, watch, 560, alive=(0,)) == []


def test_the_start_has_a_limit_of_its_own(clock):
    """Before the second step ends, silence is measured from the last sign of life; before any, from the birth of the watch."""
    board = Board(1)
    heart, watch = Heartbeat(board, 0), HangWatch(board, Limits(1.0, 300.0))
    assert watch_until(clock, watch, 299, alive=(0,)) == []
    (found,) = watch_until(clock, watch, 5, alive=(0,))
    assert str(found) == "made no progress for 301 s before its first iteration was done (start; limit 300 s)"
    assert found.hint.startswith("MEGACTL_START_TIMEOUT=SECONDS")
    heart.beat()
    assert watch_until(clock, watch, 299, alive=(0,)) == []
    heart.beat(1)
    assert watch_until(clock, watch, 299, alive=(0,)) == []
    heart.beat(2)
    # From here on there is a step to go by.
    (found,) = watch_until(clock, watch, 5, alive=(0,))
    assert found.limit == 1.0 and found.hint.startswith("MEGACTL_HANG_TIMEOUT=SECONDS")


def test_loading_may_take_twice_as_long_as_another_part_of_the_start(clock):
    board = Board(1)
    heart, watch = Heartbeat(board, 0), HangWatch(board, Limits(start=300.0))
    with heart.phase("save"):
        assert watch_until(clock, watch, 599, alive=(0,)) == []
        assert watch_until(clock, watch, 5, alive=(0,))


def test_by_default_a_start_may_take_a_quarter_of_an_hour(clock):
    watch = HangWatch(Board(1), Limits())
    assert watch_until(clock, watch, 899, alive=(0,)) == []
    assert watch_until(clock, watch, 5, alive=(0,))


@pytest.mark.parametrize("limits", [Limits(start=0.0), Limits(0.0), Limits(0.0, 5.0)])
def test_the_watch_of_the_start_can_be_switched_off(clock, limits):
    assert watch_until(clock, HangWatch(Board(1), limits), 5000, alive=(0,)) == []


def test_a_collective_waits_longer_than_any_limit_of_the_watch(clock):
    for limits in (Limits(), Limits(10.0), Limits(3000.0), Limits(start=4000.0), Limits(start=0.0)):
        board = Board(1)
        heart, watch = Heartbeat(board, 0), HangWatch(board, limits)
        limit = [watch.limit(board.pulse(0))]
        with heart.phase("save"):
            limit.append(watch.limit(board.pulse(0)))
        run_steps(clock, [heart], range(1, 4), 1.0)
        for name in ("evaluate", "save", "end"):
            with heart.phase(name):
                limit.append(watch.limit(board.pulse(0)))
        assert limits.collective > max(item for item in limit if item < float("inf")), limits
    assert Limits(0.0).collective == 600.0


def test_saving_and_evaluating_have_a_longer_limit(clock):
    board = Board(1)
    heart, watch = Heartbeat(board, 0), HangWatch(board, Limits(10.0))
    run_steps(clock, [heart], range(1, 4), 0.5)
    for name in ("save", "evaluate"):
        with heart.phase(name):
            assert watch_until(clock, watch, 140, alive=(0,)) == []
            assert board.pulse(0).phase == name
        assert board.pulse(0).phase == "step"
        heart.beat(4)
    # The save did not count as a step, so the limit of a step is what it was.
    assert board.pulse(0).median == pytest.approx(0.5)
    with heart.phase("end"):
        assert watch_until(clock, watch, 500, alive=(0,)) == []


def test_a_watcher_that_was_stopped_itself_blames_nobody(clock):
    board = Board(1)
    watch = HangWatch(board, Limits(60.0))
    run_steps(clock, [Heartbeat(board, 0)], range(1, 4), 1.0)
    assert watch.check((0,)) == []
    clock.now += 3600.0
    assert watch_until(clock, watch, 55, alive=(0,)) == []
    assert watch_until(clock, watch, 10, alive=(0,))


def test_zero_switches_the_watch_off(clock):
    board = Board(1)
    run_steps(clock, [Heartbeat(board, 0)], range(1, 4), 1.0)
    assert watch_until(clock, HangWatch(board, Limits(0.0)), 5000, alive=(0,)) == []


def test_ended_ranks_are_not_watched(clock):
    board = Board(2)
    hearts = [Heartbeat(board, rank) for rank in range(2)]
    run_steps(clock, hearts, range(1, 4), 1.0)
    watch = HangWatch(board, Limits(5.0))
    for _ in range(30):
        hearts[0].beat(4)
        assert watch_until(clock, watch, 1, alive=(0,)) == []


@pytest.mark.parametrize(("text", "value"), [("", None), (" ", None), ("0", 0.0), ("1.5", 1.5)])
def test_limits_from_the_environment(monkeypatch, text, value):
    monkeypatch.setenv("MEGACTL_HANG_TIMEOUT", text)
    monkeypatch.delenv("MEGACTL_START_TIMEOUT", raising=False)
    assert Limits.from_environment() == Limits(value, 900.0)
    monkeypatch.setenv("MEGACTL_START_TIMEOUT", text)
    assert Limits.from_environment() == Limits(value, 900.0 if value is None else value)


@pytest.mark.parametrize("name", ["MEGACTL_HANG_TIMEOUT", "MEGACTL_START_TIMEOUT"])
@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_bad_limits_are_refused(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(MegactlError, match=f"{name}={text}"):
        Limits.from_environment()


def test_a_beat_is_cheap():
    heart = Heartbeat(Board(1), 0)
    began = time.perf_counter()
    for iteration in range(1000):
        heart.beat(iteration)
    # Some 5 microseconds each; the bound leaves room for a busy machine.
    assert time.perf_counter() - began < 0.5


def test_board_is_shared_with_a_forked_child():
    # In a process of its own: the tests' process may have threads, and must not fork then.
    code = (
        "import os\nfrom megactl.engine.resilience import Board, Heartbeat\nboard = Board(2)\npid = os.fork()\n"
        "if pid == 0:\n    Heartbeat(board, 1).beat(7)\n    os._exit(0)\n"
        "os.waitpid(pid, 0)\nprint(board.pulse(1).iteration, board.pulse(0).beat, board.stop_signal)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout == "7 0.0 0\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT"])
def test_handlers_only_set_the_flag(name):
    flag = StopFlag()
    flag.install(own_interrupts=True)
    try:
        assert flag.requested is None
        signal.raise_signal(getattr(signal, name))
        assert flag.requested == name
        signal.raise_signal(signal.SIGTERM)
        assert flag.requested == name
    finally:
        flag.restore()


def test_second_interrupt_raises_only_where_asked():
    flag = StopFlag()
    flag.install(own_interrupts=True)
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        flag.restore()
    flag = StopFlag()
    flag.install(own_interrupts=False)
    try:
        signal.raise_signal(signal.SIGINT)
        assert flag.requested is None
    finally:
        flag.restore()


def test_interrupt_after_another_stop_still_aborts_only_at_the_second():
    flag = StopFlag()
    flag.install(own_interrupts=True)
    try:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert flag.requested == "SIGTERM"
    finally:
        flag.restore()


def test_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        flag = StopFlag()
        flag.install(own_interrupts=True)
        signal.raise_signal(signal.SIGHUP)
        assert flag.requested is None
        flag.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stop_request_on_the_board_reaches_the_flag():
    board = Board(1)
    flag = StopFlag(board)
    assert flag.requested is None
    board.stop_signal = signal.SIGUSR2
    assert flag.requested == "SIGUSR2"


def test_stop_can_be_asked_for_from_inside():
    flag = StopFlag()
    flag.request("exit duration")
    flag.request("something later")
    assert flag.requested == "exit duration"


def test_exit_duration():
    assert not exit_duration_reached(0, 0.0, now=1e9)
    assert not exit_duration_reached(2, 1000.0, now=1119.0)
    assert exit_duration_reached(2, 1000.0, now=1120.0)
    assert exit_duration_reached(2, 1000.0, now=1100.0, margin=30.0)
