"""A run of several ranks ends as a whole, quickly, with the right exit code and the right rank's own error."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIMIT = 30.0


class Started:
    """A driver process. `end` waits for it and gives its exit code, stdout and stderr."""

    def __init__(self, run_dir: Path, worker: str, ranks: int, kind: str, environment: dict[str, str]) -> None:
        self.run_dir, self.ranks = run_dir, ranks
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "MEGACTL_", "SLURM_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "driver.py"), str(run_dir), worker, str(ranks), kind],
            env=kept | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> list[int]:
        """Wait until every rank has written its pid; returns the pids by rank."""
        wait_for(lambda: all(self._pid(rank) for rank in range(self.ranks)))
        return [self._pid(rank) for rank in range(self.ranks)]

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out, err

    def _pid(self, rank: int) -> int:
        try:
            return int((self.run_dir / f"ready-{rank}").read_text() or 0)
        except OSError:
            return 0

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "condition not met in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    running: list[Started] = []

    def begin(worker: str, ranks: int = 2, kind: str = "self", run_dir: Path | None = None, **environment: str) -> Started:
        running.append(Started(run_dir or tmp_path / "run", worker, ranks, kind, environment))
        return running[-1]

    yield begin
    for started in running:
        started.stop()


def summary_of(started: Started) -> dict:
    return json.loads((started.run_dir / "summary.json").read_text())


def test_good_end(start):
    started = start("fine", 3)
    code, out, err = started.end()
    assert (code, out) == (0, "hello from rank 0\n")
    # Only rank 0 speaks on the console; every rank's noise is in its own log.
    assert err == "noise of rank 0\n"
    for rank in range(3):
        assert f"noise of rank {rank}\n" in (started.run_dir / "logs" / f"rank-{rank}.log").read_text()
    assert summary_of(started)["status"] == "completed"


@pytest.mark.parametrize(
    ("worker", "code", "said"),
    [
        ("killed", 1, r"rank 1 \(pid \d+\) was killed by signal 9 \(SIGKILL\) at iteration ~7"),
        ("segfault", 1, r"rank 1 \(pid \d+\) was killed by signal 11 \(SIGSEGV\)"),
        ("raises", 1, r"rank 1 .*ValueError: the loss fell off a cliff"),
        ("witness_first", 1, r"rank 1 .*ValueError: the cause"),
        ("wrapped_witness", 1, r"rank 1 .*ZeroDivisionError: the cause"),
        ("run_error", 1, r"rank 1 .*the disk is full\n  hint: free some space"),
        ("sys_exit_3", 1, r"rank 1 .*exited with code 3"),
        ("sys_exit_text", 1, r"no more coffee"),
        ("returns_none", 1, r"the worker returned None, not an exit code"),
    ],
)
def test_failure_names_its_cause(start, worker, code, said):
    started = start(worker)
    began = time.monotonic()
    got, out, err = started.end()
    assert got == code
    assert re.search(said, err), err
    assert err.count("error:") == 1
    assert time.monotonic() - began < 10
    assert out == ""
    summary = summary_of(started)
    assert summary["status"] == "failed"
    assert summary["error"] in err


def test_traceback_begins_in_the_worker(start):
    started = start("raises")
    _, _, err = started.end()
    assert "in raises" in err
    assert "megactl/engine/launch" not in err
    assert "ValueError: the loss fell off a cliff" in (started.run_dir / "logs" / "rank-1.log").read_text()


def test_last_words_of_a_killed_rank_are_shown(start):
    _, _, err = start("killed").end()
    assert "last words" in err
    assert "out-of-memory killer" in err


def test_stack_of_a_segfault_is_shown(start):
    _, _, err = start("segfault").end()
    assert "in segfault" in err


def test_user_error_on_all_ranks_is_said_once(start):
    code, _, err = start("user_error", 4).end()
    assert (code, err) == (2, "error: micro_batch_size = 3: must divide the global batch; set 4\n")


@pytest.mark.parametrize(("worker", "code", "status"), [("sys_exit_0", 0, "completed"), ("saved_on_one", 75, "saved")])
def test_exit_codes(start, worker, code, status):
    started = start(worker)
    assert started.end()[0] == code
    assert summary_of(started)["status"] == status


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"])
def test_stop_signal_reaches_every_rank_with_its_name(start, name):
    started = start("loop_and_report_signal", 3)
    started.ready()
    started.process.send_signal(getattr(signal, name))
    code, _, err = started.end()
    assert code == 75
    assert f"{name} received" in err
    assert [(started.run_dir / f"signal-{rank}").read_text() for rank in range(3)] == [name] * 3
    assert summary_of(started)["status"] == "saved"


def test_signal_to_a_rank_alone_is_a_stop_request(start):
    # srun delivers SIGTERM to every process of the step, not only to the launcher.
    started = start("loop_and_report_signal", 1)
    os.kill(started.ready()[0], signal.SIGTERM)
    assert started.end()[0] == 75


def test_saving_run_is_not_killed_by_repeated_signals(start):
    started = start("slow_save")
    started.ready()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        started.process.send_signal(number)
        time.sleep(0.1)
    assert started.end()[0] == 75
    assert all((started.run_dir / f"saved-{rank}").exists() for rank in range(2))


def test_second_interrupt_aborts_at_once(start):
    started = start("never_stops")
    pids = started.ready()
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert started.end()[0] == 130
    assert time.monotonic() - began < 3
    assert all(map(gone, pids))
    assert summary_of(started)["status"] == "interrupted"


def test_ranks_ignore_the_terminals_interrupt(start):
    started = start("loop")
    for pid in started.ready():
        os.kill(pid, signal.SIGINT)
    time.sleep(0.3)
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGTERM)
    assert started.end()[0] == 75


def test_killed_parent_leaves_nobody(start):
    started = start("never_stops", 3)
    pids = started.ready()
    started.process.kill()
    wait_for(lambda: all(map(gone, pids)))


def test_killed_rank_while_others_never_end(start):
    started = start("never_stops", 3)
    pids = started.ready()
    began = time.monotonic()
    os.kill(pids[2], signal.SIGKILL)
    code, _, err = started.end()
    assert code == 1
    assert f"rank 2 (pid {pids[2]}) was killed by signal 9 (SIGKILL)" in err
    assert time.monotonic() - began < 5
    assert all(map(gone, pids))


def test_stopped_rank_is_found_as_the_hung_one(start):
    started = start("loop", 3, MEGACTL_HANG_TIMEOUT="1")
    pids = started.ready()
    time.sleep(0.3)
    os.kill(pids[1], signal.SIGSTOP)
    code, _, err = started.end()
    assert code == 1
    assert re.search(rf"error: rank 1 \(pid {pids[1]}\) made no progress for \d s at iteration \d+ .*SIGSTOP", err), err
    # The others tell where they are, and their logs have the whole stack.
    assert re.search(r"rank 0 \(pid \d+\): iteration \d+, step: .*driver.py:\d+ _steps", err), err
    assert "in loop" in (started.run_dir / "logs" / "rank-2.log").read_text()
    assert all(map(gone, pids))
    assert summary_of(started)["error"].startswith("rank 1")


def test_a_hang_before_the_second_step_ends_the_run(start):
    started = start("first_step_hangs", 3, MEGACTL_START_TIMEOUT="1")
    pids = started.ready()
    code, _, err = started.end()
    assert code == 1
    assert re.search(rf"error: rank \d \(pid ({'|'.join(map(str, pids))})\) made no progress for \d s before its first iteration", err), err
    assert "(start; limit 1 s)" in err and "hint: MEGACTL_START_TIMEOUT=SECONDS sets the limit" in err
    # Where each of them stood: the culprit is told from those that wait.
    assert re.search(rf"rank 1 \(pid {pids[1]}\): iteration 0, start: .*driver.py:\d+ stuck", err), err
    assert re.search(r"rank 2 \(pid \d+\): iteration 0, start: .*waits_in_a_collective", err), err
    assert all(map(gone, pids)) and "before its first iteration" in summary_of(started)["error"]


def test_a_rank_that_is_stopped_early_is_the_headline(start):
    code, _, err = start("stops_early", 3, MEGACTL_START_TIMEOUT="1.5").end()
    assert code == 1
    assert re.search(
        r"error: rank 1 \(pid \d+\) made no progress for \d s before its first iteration.*stopped by a signal \(SIGSTOP\)", err
    ), err


def test_a_stopped_rank_is_named_where_another_only_lost_its_connection(start):
    started = start("witness_of_a_stopped_rank", 2)
    code, _, err = started.end()
    assert code == 1
    assert re.search(
        r"error: rank 1 \(pid \d+\) made no progress for \d s before its first iteration.*stopped by a signal \(SIGSTOP\)", err
    ), err
    assert re.search(r"rank 0 \(pid \d+\): ended with RuntimeError: .*Timed out waiting", err), err
    assert summary_of(started)["error"].startswith("rank 1")


def test_the_watch_of_the_start_can_be_switched_off(start):
    started = start("first_step_hangs", 2, MEGACTL_START_TIMEOUT="0")
    started.ready()
    time.sleep(1.5)
    assert started.process.poll() is None


def test_hang_watch_can_be_switched_off(start):
    started = start("loop", 2, MEGACTL_HANG_TIMEOUT="0")
    pids = started.ready()
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(1.5)
    assert started.process.poll() is None
    os.kill(pids[1], signal.SIGCONT)
    started.process.send_signal(signal.SIGTERM)
    assert started.end()[0] == 75


def test_save_is_no_hang(start):
    # The save takes twice the limit of a step.
    started = start("slow_save", 2, MEGACTL_HANG_TIMEOUT="0.5")
    started.ready()
    started.process.send_signal(signal.SIGTERM)
    assert started.end()[0] == 75


def test_a_slow_start_is_no_hang_for_the_limit_of_a_step(start):
    started = start("never_stops", 1, MEGACTL_HANG_TIMEOUT="0.2")
    started.ready()
    time.sleep(1.0)
    assert started.process.poll() is None


def test_bad_hang_timeout_is_refused(start):
    code, _, err = start("fine", 1, MEGACTL_HANG_TIMEOUT="soon").end()
    assert code == 2
    assert "MEGACTL_HANG_TIMEOUT=soon" in err


def test_lines_of_both_streams_stay_whole(start):
    started = start("many_lines", 2)
    code, out, err = started.end()
    assert code == 0
    assert out.splitlines() == [f"line {number} of rank 0 {'x' * 80} end" for number in range(300)]
    expected = [f"err {number} of rank 0 {'y' * 80} end" for number in range(300)]
    assert err.splitlines() == expected
    assert (started.run_dir / "logs" / "rank-0.log").read_text().splitlines()[1:] == expected


def test_live_line_on_a_terminal_and_none_in_the_logs(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    command = [sys.executable, str(HERE / "driver.py"), str(tmp_path), "live_metrics", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:
        pass  # The terminal's other side has closed: everything was read.
    out, _ = process.communicate(timeout=LIMIT)
    os.close(ours)
    assert process.returncode == 0
    text = shown.decode()
    # Seen on the terminal: the live line, cut to its width, and the warning on a line of its own.
    assert re.search(r"iteration \d+/12  loss 1\.0000", text), text
    assert "\r\x1b[2Ka warning\r\n" in text
    drawn = [re.sub(r"\x1b\[[0-9;]*[a-zA-Z]", "", part).strip() for part in text.split("\r")]
    assert max(map(len, drawn)) <= 59
    # Seen nowhere else.
    assert "\x1b" not in out
    assert "\x1b" not in (tmp_path / "logs" / "rank-0.log").read_text()
    assert [line.split("/")[0].split()[-1] for line in out.splitlines()] == ["1", "10", "12"]


def test_two_runs_side_by_side_take_different_ports(start, tmp_path):
    runs = [start("torch_sum", 2, run_dir=tmp_path / name) for name in ("a", "b")]
    for run in runs:
        code, out, err = run.end()
        assert code == 0, err
        assert "sum 3.0" in out
        assert "env 0/2" in out


@pytest.mark.gpu
def test_ranks_use_their_gpus_after_the_fork(start):
    import torch

    count = torch.cuda.device_count()
    code, out, err = start("torch_cuda", max(1, count)).end()
    assert code == 0, err
    assert f"nccl sum {float(count * (count + 1) / 2)}" in out


def test_lost_peer_is_not_blamed_on_the_one_that_noticed(start):
    code, _, err = start("torch_peer_dies", 3).end()
    assert code == 1
    assert re.search(r"rank 1 .*at iteration ~5: ValueError: the cause", err), err


def test_second_run_in_the_same_directory_is_refused(start):
    first = start("loop")
    first.ready()
    code, _, err = start("fine").end()
    assert code == 2
    assert "is in use by process" in err
    first.process.send_signal(signal.SIGTERM)
    assert first.end()[0] == 75
    # The lock goes with the run.
    assert start("fine").end()[0] == 0


def test_killed_run_frees_its_directory(start):
    first = start("never_stops")
    pids = first.ready()
    first.process.kill()
    first.process.wait()
    wait_for(lambda: all(map(gone, pids)))
    assert start("fine").end()[0] == 0


def test_stale_report_of_an_earlier_attempt_is_not_shown(start):
    assert start("raises").end()[0] == 1
    assert start("fine").end()[0] == 0
    code, _, err = start("killed").end()
    assert code == 1
    assert "cliff" not in err


def test_missing_tensorboard_is_an_error_before_any_rank(start):
    if importlib.util.find_spec("tensorboard") is not None:
        pytest.skip("tensorboard is installed here")
    started = start("fine", TEST_TENSORBOARD="tb")
    code, _, err = started.end()
    assert code == 2
    assert 'pip install "megactl[tensorboard]"' in err
    assert not (started.run_dir / "logs").exists()


# ---- one process a rank, started by others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("worker", "code"), [("fine", 0), ("user_error", 2), ("sys_exit_text", 1), ("sys_exit_0", 0)])
def test_in_place_rank_keeps_its_exit_code(start, worker, code):
    got, _, err = start(worker, 1, "torchrun").end()
    assert got == code
    assert ("error: rank 0" in err) == (code != 0)


def test_in_place_failure_names_the_rank(start):
    code, _, err = start("raises", 1, "srun", TEST_RANK="1", TEST_WORLD="2").end()
    assert code == 1
    assert "error: rank 1: ValueError: the loss fell off a cliff" in err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_in_place_stop(start, name):
    started = start("loop_and_report_signal", 1, "srun")
    started.ready()
    started.process.send_signal(getattr(signal, name))
    assert started.end()[0] == 75
    assert (started.run_dir / "signal-0").read_text() == name


def test_in_place_second_interrupt(start):
    started = start("never_stops", 1, "srun")
    started.ready()
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    started.process.send_signal(signal.SIGINT)
    assert started.end()[0] == 130
    assert summary_of(started)["status"] == "interrupted"


def test_in_place_hang_ends_the_rank(start):
    started = start("beats_then_hangs", 1, "srun", MEGACTL_HANG_TIMEOUT="0.5")
    code, _, err = started.end()
    assert code == 1
    assert "rank 0 made no progress" in err
    assert "in beats_then_hangs" in (started.run_dir / "logs" / "rank-0.log").read_text()


def test_in_place_hang_at_the_start_ends_the_rank(start):
    code, _, err = start("first_step_hangs", 1, "srun", TEST_RANK="1", TEST_WORLD="2", MEGACTL_START_TIMEOUT="0.5").end()
    assert code == 1
    assert "rank 1 made no progress" in err and "before its first iteration" in err and "MEGACTL_START_TIMEOUT" in err


# ---- two nodes, one launcher each -------------------------------------------------------------------------------------------------


def free_port() -> str:
    """A free port below the range from which the kernel takes the ports of outgoing connections, as a cluster's would be."""
    for port in range(20_000 + os.getpid() % 5000, 30_000):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return str(port)
        except OSError:
            continue
    raise AssertionError("no free port")


def test_two_nodes_meet(start, tmp_path):
    port = free_port()
    first = start("torch_sum", 1, "srun-node", TEST_WORLD="2", TEST_PORT=port)
    second = start("torch_sum", 1, "srun-node", TEST_WORLD="2", TEST_PORT=port, TEST_RANK="1")
    ends = [first.end(), second.end()]
    assert [end[0] for end in ends] == [0, 0], ends
    assert "sum 3.0" in ends[0][1]
    assert "sum 3.0" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


def test_taken_port_is_said(start):
    with socket.create_server(("", 0)) as taken:
        code, _, err = start("fine", 1, "srun-node", TEST_PORT=str(taken.getsockname()[1])).end()
    assert code == 1
    assert "cannot listen on port" in err
