"""environment.json and the fingerprints by which ranks find the odd node."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest

from megactl.config.schema import Optimizer, Run
from megactl.engine import environment
from megactl.engine.launch.failures import Failure, Report, describe, report_of, root_cause
from megactl.engine.launch.host import oom_kills, process_state, thread_environment, thread_share
from megactl.engine.launch.stacks import innermost_frame, waits_for_others
from megactl.errors import ConfigError, Problem, RunError
from megactl.machine import record


def test_environment_is_recorded_with_secrets_redacted(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("CUDA_API_KEY", "do-not-tell")
    monkeypatch.setenv("MEGACTL_STORE", "https://me:hunter2@store.example")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-recorded")
    content = environment.write_environment(tmp_path, hosts=["b", "a", "b"], extra={"note": 1})
    text = (tmp_path / "environment.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(content, default=str))
    assert content["variables"]["NCCL_DEBUG"] == "INFO"
    assert content["variables"]["CUDA_API_KEY"] == "<redacted>"
    assert content["variables"]["MEGACTL_STORE"] == "https://<redacted>@store.example"
    for secret in ("do-not-tell", "hunter2", "never-recorded"):
        assert secret not in text
    assert (content["hosts"], content["note"]) == (["a", "b"], 1)
    for key in ("megactl", "source_hash", "python", "torch", "cuda", "nccl", "driver", "gpus", "compiled", "commit"):
        assert key in content


def test_source_hash_follows_the_sources(tmp_path, monkeypatch):
    package = tmp_path / "megactl"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(record.megactl, "__file__", str(package / "__init__.py"))
    seen = set()
    for text in ("a = 1\n", "a = 2\n"):
        (package / "module.py").write_text(text)
        seen.add(record.source_hash.__wrapped__())
    (package / "module.py").rename(package / "renamed.py")
    seen.add(record.source_hash.__wrapped__())
    assert len(seen) == 3
    (package / "notes.txt").write_text("not a source")
    assert record.source_hash.__wrapped__() in seen


def test_fingerprint_follows_the_configuration():
    run = Run()
    other = dataclasses.replace(run, optimizer=Optimizer(lr=1e-5))
    assert environment.fingerprint(run) == environment.fingerprint(Run())
    assert environment.fingerprint(run)["configuration hash"] != environment.fingerprint(other)["configuration hash"]


def prints(*hashes: str) -> list[dict[str, str]]:
    return [{"host": f"n{rank}", "source hash": value, "torch": "2.13"} for rank, value in enumerate(hashes)]


def test_the_odd_rank_is_named():
    assert environment.compare_fingerprints(prints("a", "a", "a")) is None
    assert environment.compare_fingerprints([]) is None
    said = environment.compare_fingerprints(prints("a", "a", "b", "a"))
    assert said == "source hash differs between ranks: rank 2 on n2 has b; 3 of 4 ranks have a"
    # Where the first rank is the odd one it is the one that is named.
    assert "rank 0 on n0 has b; 3 of 4 ranks have a" in environment.compare_fingerprints(prints("b", "a", "a", "a"))


def test_a_long_list_of_odd_ranks_is_cut():
    said = environment.compare_fingerprints(prints(*["a"] * 30, *["b"] * 20))
    assert "and 12 more ranks" in said


# ---- who failed first ---------------------------------------------------------------------------------------------------------------


def caught(error: BaseException) -> Report:
    try:
        raise error
    except BaseException as raised:
        return report_of(raised)


@pytest.mark.parametrize(
    "message",
    [
        "[pair.cc:553] Connection closed by peer [127.0.0.1]:29847",
        "NCCL error: remote process exited or there was a network error",
        "[Rank 0] Watchdog caught collective operation timeout: ... NCCL watchdog",
        "wait timeout after 300000ms, keys: /0//cpu//0/0",
        "Broken pipe",
    ],
)
def test_lost_connections_are_witnesses(message):
    assert caught(RuntimeError(message)).secondary


def test_other_errors_are_causes():
    for error in (ValueError("Connection closed by peer"), RuntimeError("mat1 and mat2 shapes"), RunError("the disk is full")):
        assert not caught(error).secondary


def test_user_error_keeps_its_code():
    report = caught(ConfigError([Problem("tp = 3", "must divide 16 heads", "set 4")]))
    assert (report.expected, report.exit_code) == (True, 2)


def failure(rank: int, seen: float, **more) -> Failure:
    return Failure(rank=rank, pid=100 + rank, iteration=5, seen=seen, **more)


def test_root_cause_is_the_earliest_that_is_no_witness():
    witness = failure(0, 1.0, code=1, report=dataclasses.replace(caught(RuntimeError("Connection reset by peer")), time=1.0))
    late = failure(1, 3.0, code=1, report=dataclasses.replace(caught(ValueError("x")), time=2.9))
    killed = failure(2, 2.0, signal=9)
    assert root_cause([witness, late, killed]) is killed
    assert root_cause([witness, late]) is late
    assert root_cause([witness]) is witness


def test_hints_fit_the_failure(tmp_path):
    assert "/dev/shm" in describe(failure(1, 1.0, signal=int(signal.SIGBUS)), tmp_path, local_ranks=2)
    noted = failure(1, 1.0, signal=9, notes=("the kernel's out-of-memory killer ended 1 process(es) meanwhile",))
    assert describe(noted, tmp_path, local_ranks=2).count("out-of-memory") == 1
    report = Report("OutOfMemoryError", "CUDA out of memory", "", 1.0, False, False)
    assert "--micro-batch-size" in describe(failure(1, 1.0, code=1, report=report), tmp_path, local_ranks=2)
    assert "signal 40 (a real-time signal)" in describe(failure(1, 1.0, signal=40), tmp_path, local_ranks=2)


# ---- host -----------------------------------------------------------------------------------------------------------------------------


def test_threads_share_the_cores(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert thread_environment(4) == {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "1"}
    assert thread_environment(64)["OMP_NUM_THREADS"] == "1"
    assert thread_share(4) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert "OMP_NUM_THREADS" not in thread_environment(4)
    assert thread_share(4) == 3


def test_memory_kills_are_read_or_unknown():
    kills = oom_kills()
    assert kills is None or kills >= 0


def test_process_state_of_nobody_is_empty():
    assert process_state(2**22 + 1) == ""


def test_innermost_frame_of_a_dump(tmp_path):
    log = tmp_path / "rank-0.log"
    before = "older text\n"
    dump = (
        "Thread 0x1 (most recent call first):\n"
        '  File "/x/threading.py", line 1 in wait\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/x/torch/distributed/distributed_c10d.py", line 3252 in all_reduce\n'
        f'  File "{record.package_root()}/engine/trainer.py", line 88 in step\n'
    )
    log.write_text(before + dump)
    frame = innermost_frame(log, len(before))
    ours = f"{record.package_root()}/engine/trainer.py:88 step"
    assert frame == f"/x/torch/distributed/distributed_c10d.py:3252 all_reduce, called from {ours}"
    assert waits_for_others(frame)
    assert innermost_frame(log, len(before + dump)) is None
    assert innermost_frame(tmp_path / "absent", 0) is None
