"""Several ranks as real processes over gloo: one rank's failure is everybody's, nobody hangs, and what was there stays."""

from __future__ import annotations

import errno
import os
import resource
import signal

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from megactl.engine.checkpoint import Piece, find, load, load_full, save  # noqa: E402
from megactl.errors import CheckpointError  # noqa: E402
from megactl.storage import checkpoint_folder, tensor_file  # noqa: E402


def rows(tensor, rank: int, size: int) -> list[Piece]:
    part = tensor.shape[0] // size
    box = ((rank * part, (rank + 1) * part), (0, tensor.shape[1]))
    return [Piece("w", "weight", tuple(tensor.shape), box, None, tensor[box[0][0] : box[0][1]].clone())]


def save_rows(kit, root, step, tensor, group, **options):
    arguments = {"keep": 2, "protect": None} | options
    return save(root, step=step, pieces=rows(tensor, group.rank, group.size), header=kit.header(precision="fp32"), group=group, **arguments)


def left_over(root):
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("size", [2, 4])
def test_processes_save_find_and_load_together(tmp_path, kit, size):
    weight, root = torch.randn(8, 5), tmp_path / "run" / "checkpoints"

    def work(group):
        for step in (1, 2, 3):
            save_rows(kit, root, step, weight * step, group)
        path = find(root, lambda message: None, group=group)
        assert path == root / "step-00000003"
        part = rows(torch.zeros(8, 5), group.rank, group.size)
        header = load(path, part, group=group)
        assert header.step == 3
        assert torch.equal(part[0].tensor, rows(weight * 3, group.rank, group.size)[0].tensor)

    assert kit.run_processes(size, tmp_path, work) == [0] * size
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert torch.equal(load_full(root / "step-00000003")["w"], weight * 3)


def test_ranks_agree_on_a_damaged_checkpoint(tmp_path, kit):
    weight = torch.randn(6, 4)
    kit.run_processes(3, tmp_path, lambda group: [save_rows(kit, tmp_path / "c", step, weight * step, group) for step in (1, 2)])
    file = tmp_path / "c" / "step-00000002" / "rank-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")

    def work(group):
        said = []
        assert find(tmp_path / "c", said.append, group=group) == tmp_path / "c" / "step-00000001"
        assert bool(said) == (group.rank == 0)
        assert group.rank or ("rank 2" in said[0] and "rank-00002" in said[0])
        # Only rank 2's request is in the damaged file, yet all must raise: the others would go on into a collective.
        with pytest.raises(CheckpointError):
            load(file.parent, rows(torch.zeros(6, 4), group.rank, group.size), group=group)

    assert kit.run_processes(3, tmp_path, work) == [0] * 3


def fail_write(monkeypatch_error):
    def write(path, parts):
        raise OSError(monkeypatch_error, os.strerror(monkeypatch_error), str(path))

    return write


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_one_rank_cannot_write(tmp_path, kit, failing, code):
    weight, root = torch.randn(6, 4), tmp_path / "c"

    def work(group):
        save_rows(kit, root, 1, weight, group)
        if group.rank == failing:
            tensor_file.write = fail_write(code)
        save_rows(kit, root, 2, weight * 2, group)

    assert kit.run_processes(3, tmp_path, work) == [3] * 3
    assert left_over(root) == []
    assert torch.equal(load_full(find(root, pytest.fail))["w"], weight)


@pytest.mark.parametrize("broken", ["commit", "manifest"])
def test_rank_0_fails_at_the_end(tmp_path, kit, broken):
    weight, root = torch.randn(6, 4), tmp_path / "c"

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def work(group):
        save_rows(kit, root, 1, weight, group)
        if broken == "commit":
            checkpoint_folder.commit = refuse
        else:
            os.fsync = refuse if group.rank == 0 else os.fsync
        save_rows(kit, root, 2, weight * 2, group)

    assert kit.run_processes(3, tmp_path, work) == [3] * 3
    assert left_over(root) == []
    assert torch.equal(load_full(find(root, pytest.fail))["w"], weight)


@pytest.mark.parametrize("limit", [0, 100, 300, 4096, 100_000])
def test_the_system_refuses_to_write_more(tmp_path, kit, limit):
    """A real limit (RLIMIT_FSIZE) on one rank, at sizes that fall into the header, the data and their end."""
    weight, root = torch.randn(200, 1000), tmp_path / "c"

    def work(group):
        save_rows(kit, root, 1, weight, group)
        if group.rank == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save_rows(kit, root, 2, weight * 2, group)

    assert kit.run_processes(2, tmp_path, work) == [3, 3]
    assert left_over(root) == []
    assert torch.equal(load_full(find(root, pytest.fail))["w"], weight)


def test_pieces_that_do_not_make_a_tensor_fail_on_all_ranks(tmp_path, kit):
    weight = torch.randn(6, 4)

    def work(group):
        pieces = rows(weight, 0, 3) if group.rank == 1 else rows(weight, group.rank, 3)
        save(tmp_path / "c", step=1, pieces=pieces, header=kit.header(), group=group, keep=2, protect=None)

    assert kit.run_processes(3, tmp_path, work) == [3] * 3
    assert left_over(tmp_path / "c") == []


def test_a_rank_killed_while_it_writes(tmp_path, kit):
    weight, root = torch.randn(6, 4), tmp_path / "c"

    def work(group):
        save_rows(kit, root, 1, weight, group)
        if group.rank == 1:
            os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        save_rows(kit, root, 2, weight * 2, group)

    codes = kit.run_processes(3, tmp_path, work)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0 and codes[2] != 0
    assert torch.equal(load_full(find(root, pytest.fail))["w"], weight)
    checkpoint_folder.sweep(root, lambda message: None)
    assert left_over(root) == []


def test_a_rank_with_nothing_to_save_writes_no_file(tmp_path, kit):
    weight = torch.randn(6, 4)

    def work(group):
        pieces = rows(weight, 0, 1) if group.rank == 1 else []
        save(tmp_path / "c", step=1, pieces=pieces, header=kit.header(), group=group, keep=2, protect=None)

    assert kit.run_processes(2, tmp_path, work) == [0, 0]
    assert sorted(path.name for path in (tmp_path / "c" / "step-00000001").iterdir()) == ["manifest.json", "rank-00001.safetensors"]
