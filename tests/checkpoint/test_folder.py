"""The checkpoints folder: retention, overwriting, clearing up, and which checkpoint a path means."""

from __future__ import annotations

import errno
import os

import pytest

torch = pytest.importorskip("torch")

from megactl.engine.checkpoint import find, sweep  # noqa: E402
from megactl.errors import CheckpointError  # noqa: E402
from megactl.storage import checkpoint_folder, durable  # noqa: E402


def names(root):
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def tensors():
    return {("w", "weight"): torch.arange(4.0)}


def test_the_newest_are_kept(tmp_path, kit, tensors):
    for step in (1, 2, 3, 4):
        kit.save(tmp_path, step, tensors, keep=3)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003", "step-00000004"]


def test_zero_keeps_all(tmp_path, kit, tensors):
    for step in (1, 2, 3):
        kit.save(tmp_path, step, tensors, keep=0)
    assert len(names(tmp_path)) == 4


def test_the_one_resumed_from_is_protected(tmp_path, kit, tensors):
    first = kit.save(tmp_path, 1, tensors, keep=0)
    for step in (2, 3, 4):
        kit.save(tmp_path, step, tensors, keep=1, protect=first)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000004"]
    kit.save(tmp_path, 5, tensors, keep=1)
    assert names(tmp_path) == ["latest", "step-00000005"]


def test_a_later_step_is_neither_deleted_nor_counted(tmp_path, kit, tensors):
    for step in (10, 20, 30):
        kit.save(tmp_path, step, tensors, keep=0)
    kit.save(tmp_path, 15, tensors, keep=1)
    assert names(tmp_path) == ["latest", "step-00000015", "step-00000020", "step-00000030"]
    assert (tmp_path / "latest").read_text() == "step-00000015\n"


def test_other_things_in_the_folder_are_left_alone(tmp_path, kit, tensors):
    for name in ("notes.txt", "step-old", ".tmp-mine", "step-00000001.bak"):
        (tmp_path / name).mkdir()
    kit.save(tmp_path, 1, tensors, keep=1)
    kit.save(tmp_path, 2, tensors, keep=1)
    sweep(tmp_path, pytest.fail)
    assert names(tmp_path) == [".tmp-mine", "latest", "notes.txt", "step-00000001.bak", "step-00000002", "step-old"]


def test_a_step_saved_again_replaces_the_old_one(tmp_path, kit):
    kit.save(tmp_path, 3, kit.state(1))
    path = kit.save(tmp_path, 3, kit.state(2))
    assert kit.same(kit.load(path, kit.state(2)), kit.state(2))
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_a_deletion_that_fails_is_said_and_the_save_stands(tmp_path, kit, tensors, monkeypatch, caplog):
    kit.save(tmp_path, 1, tensors, keep=1)

    def refuse(path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(durable, "remove_tree", refuse)
    path = kit.save(tmp_path, 2, tensors, keep=1)
    assert find(tmp_path, pytest.fail) == path
    assert "step-00000001 could not be deleted (Permission denied)" in caplog.text


def test_sweep_removes_leftovers_and_gives_a_name_back(tmp_path, kit, tensors):
    kit.save(tmp_path, 1, tensors)
    path = kit.save(tmp_path, 2, tensors)
    path.rename(tmp_path / ".replaced-step-00000002-0123abcd")
    for name in (".tmp-step-00000003-0123abcd", ".delete-step-00000001-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".latest-0123abcd").write_text("step")
    assert find(tmp_path, lambda message: None).name == ".replaced-step-00000002-0123abcd"
    said = []
    sweep(tmp_path, said.append)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"] and len(said) == 3
    assert find(tmp_path, pytest.fail) == path


def test_sweep_without_a_folder_does_nothing(tmp_path):
    sweep(tmp_path / "absent", pytest.fail)


def test_sweep_that_is_refused(tmp_path, monkeypatch):
    (tmp_path / ".tmp-step-00000003-0123abcd").mkdir()

    def refuse(path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(durable, "remove_tree", refuse)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        sweep(tmp_path, lambda message: None)
    assert caught.value.exit_code == 1


def test_what_a_path_means(tmp_path, kit, tensors):
    root = tmp_path / "run" / "checkpoints"
    old, new = kit.save(root, 1, tensors), kit.save(root, 2, tensors)
    assert [checkpoint_folder.resolve(path) for path in (old, new, root, tmp_path / "run")] == [old, new, new, new]
    (new / "manifest.json").write_text("{}")
    assert checkpoint_folder.resolve(root) == old
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint_folder.resolve(tmp_path)


def test_a_save_into_a_file_is_one_clear_error(tmp_path, kit, tensors):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="was not saved") as caught:
        kit.save(tmp_path / "checkpoints", 1, tensors)
    assert caught.value.exit_code == 1


def test_steps_beyond_eight_digits_sort(tmp_path, kit, tensors):
    kit.save(tmp_path, 99_999_999, tensors, keep=0)
    path = kit.save(tmp_path, 100_000_000, tensors, keep=0)
    assert find(tmp_path, pytest.fail) == path
