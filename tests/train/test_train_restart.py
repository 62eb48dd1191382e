"""What lies in a run directory when a run starts there: damaged, foreign, finished or busy; and a disk that fills up."""

from __future__ import annotations

import os
import signal
import time

import pytest
from train_harness import checkpoint, gone, losses, steps, summary, tensors, wait_for

FLAGS = ("--save-interval", "2", "--keep-checkpoints", "0")


def damage(folder, how):
    """One kind of damage to a checkpoint folder."""
    path = folder / "rank-00000.safetensors"
    if how == "flipped":
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "gone":
        path.unlink()
    else:
        (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    "how", ["flipped", "gone", pytest.param("cut", marks=pytest.mark.nightly), pytest.param("manifest", marks=pytest.mark.nightly)]
)
def test_a_damaged_checkpoint_is_passed_over(train, tmp_path, how):
    train("run", *FLAGS, "--dp", "2").must(0)
    before = losses(tmp_path / "run")
    damage(checkpoint(tmp_path / "run", 6), how)
    train("run", *FLAGS, "--dp", "2").must(0, "step-00000006 is damaged and passed over", "at iteration 4")
    assert losses(tmp_path / "run") == before


def test_nothing_but_damage_is_an_error(train, tmp_path):
    train("run", *FLAGS).must(0)
    before = losses(tmp_path / "run")
    for step in (2, 4, 6):
        damage(checkpoint(tmp_path / "run", step), "flipped")
    train("run", *FLAGS).must(2, "3 checkpoints, none of them good", "hint:")
    assert steps(tmp_path / "run") == [2, 4, 6] and losses(tmp_path / "run") == before


def test_resume_must(train, tmp_path):
    train("run", "--resume", "must", "--dp", "2").must(2, "--resume must", "holds no checkpoint", "--resume auto")
    train("run").must(0)
    train("run", "--resume", "must", "--iterations", "7").must(0, "at iteration 6")


def test_resume_never_does_not_mix_with_old_checkpoints(train, tmp_path):
    train("run", "--resume", "never").must(0)
    before, metrics = tensors(checkpoint(tmp_path / "run", 6)), losses(tmp_path / "run")
    train("run", "--resume", "never", "--dp", "2", "--seed", "9").must(2, "--resume never", "step-00000006", "another --run-dir")
    after = tensors(checkpoint(tmp_path / "run", 6))
    assert all(bool((after[key] == tensor).all()) for key, tensor in before.items())
    assert losses(tmp_path / "run") == metrics


def test_a_finished_run_has_nothing_to_do(train, tmp_path):
    train("run", "--dp", "2").must(0)
    before, line = summary(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    done = train("run", "--dp", "2").must(0, "nothing to do: 6 of 6 iterations are done")
    assert done.out == ""
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == line
    after = summary(tmp_path / "run")
    assert all(after[key] == before[key] for key in after.keys() | before.keys() if not key.startswith("peak_memory"))


def test_two_runs_in_one_directory(train, tmp_path):
    first = train.begin("run", "--iterations", "100000", "--dp", "2")
    first.iterations(1)
    started = time.monotonic()
    train("run").must(2, f"is in use by process {first.pid}", "choose another folder")
    assert time.monotonic() - started < 1.0 * max(1.0, os.getloadavg()[0])
    first.signal(signal.SIGTERM)
    first.wait().must(75)


def test_a_full_disk_keeps_the_older_checkpoint(train, tmp_path):
    train("run", "--dp", "2").must(0)
    largest = max(path.stat().st_size for path in checkpoint(tmp_path / "run", 6).iterdir())
    flags = ("--dp", "2", "--iterations", "8")
    started = time.monotonic()
    train("run", *flags, file_limit=largest // 2).must(1, "the checkpoint was not saved", "File too large", "earlier checkpoints")
    assert time.monotonic() - started < 30
    assert steps(tmp_path / "run") == [6]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))
    assert summary(tmp_path / "run")["status"] == "failed"
    train("run", *flags).must(0, "at iteration 6")
    assert [iteration for iteration, _ in losses(tmp_path / "run")] == [*range(1, 9)]


def test_a_kill_during_a_save_leaves_a_good_checkpoint(train, tmp_path):
    flags = ("--iterations", "100000", "--save-interval", "1", "--keep-checkpoints", "2", "--dp", "2")
    command = train.begin("run", *flags)
    ranks = command.ranks(2)
    command.iterations(4)
    folder = tmp_path / "run" / "checkpoints"
    end = time.monotonic() + 30
    while not list(folder.glob(".tmp*")):
        assert time.monotonic() < end
    os.killpg(command.pid, signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    wait_for(lambda: all(gone(pid) for pid in ranks.values()))
    last = steps(tmp_path / "run")[-1]
    again = str(last + 2)
    train("run", "--iterations", again, "--dp", "2").must(0, "resuming from")
    assert [iteration for iteration, _ in losses(tmp_path / "run")] == [*range(1, last + 3)]
    assert not list(folder.glob(".*-step-*"))
