"""Damage is never silent: bit flips and truncation of every kind of file, and finding the newest good checkpoint behind it."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from megactl.engine.checkpoint import find, load  # noqa: E402
from megactl.errors import CheckpointError  # noqa: E402
from megactl.storage.manifest import parse, read, verify  # noqa: E402

FLIPS = 120


def flip(path, position: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def silent(path, kit, tensors) -> bool:
    """Whether a load went through, or a verification found nothing."""
    try:
        kit.load(path, tensors)
    except CheckpointError:
        return verify(path).ok
    return True


def byte_ranges(path) -> dict[str, range]:
    """Bytes of the tensor file by what they hold."""
    file = path / "rank-00000.safetensors"
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    import safetensors

    with safetensors.safe_open(file, "pt") as opened:
        names = opened.offset_keys()
        sizes = [opened.get_tensor(name).nbytes for name in names]
    ranges, at = {}, data
    for name, size in zip(names, sizes, strict=True):
        kind = name.split("/")[0]
        ranges.setdefault(kind, []).extend(range(at, at + size))
        at += size
    return {"header": range(data), **ranges}


@pytest.mark.parametrize("region", ["header", "weight", "master", "exp_avg", "exp_avg_sq"])
def test_no_flip_in_a_tensor_file_is_silent(tmp_path, kit, region):
    tensors = kit.state(1)
    path = kit.save(tmp_path, 1, tensors)
    file, positions, chance = path / "rank-00000.safetensors", byte_ranges(path)[region], random.Random(region)
    missed = 0
    for _ in range(FLIPS):
        position, bit = chance.choice(positions), chance.randrange(8)
        flip(file, position, bit)
        missed += silent(path, kit, tensors)
        flip(file, position, bit)
    assert missed == 0
    assert kit.same(kit.load(path, tensors), tensors)


def test_no_flip_in_the_manifest_is_silent(tmp_path, kit):
    path = kit.save(tmp_path, 1, kit.state(1))
    data = (path / "manifest.json").read_bytes()
    parse(data, "manifest.json")
    chance, missed = random.Random(0), 0
    # Every bit of the first and last bytes (structure, seal), and random ones between.
    positions = [*range(300), *range(len(data) - 100, len(data))]
    trials = [(at, bit) for at in positions for bit in range(8)] + [
        (chance.randrange(len(data)), chance.randrange(8)) for _ in range(3 * FLIPS)
    ]
    for at, bit in trials:
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        try:
            parse(bytes(damaged), "manifest.json")
            missed += 1
        except CheckpointError:
            pass
    assert missed == 0


def test_every_truncation_of_the_manifest_is_seen(tmp_path, kit):
    path = kit.save(tmp_path, 1, {("w", "weight"): torch.zeros(2)})
    data = (path / "manifest.json").read_bytes()
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            parse(data[:length], "manifest.json")


def test_every_truncation_of_a_tensor_file_is_seen_and_names_it(tmp_path, kit):
    tensors = kit.state(1)
    path = kit.save(tmp_path, 1, tensors)
    file = path / "rank-00000.safetensors"
    data = file.read_bytes()
    for length in [*range(0, 24), *range(24, len(data), 17), len(data) - 1, len(data) + 1]:
        file.write_bytes((data + b"\0")[:length])
        with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
            kit.load(path, tensors)
        assert not verify(path).ok


def test_no_flip_in_the_pointer_matters(tmp_path, kit):
    kit.save(tmp_path, 1, kit.state(1))
    path = kit.save(tmp_path, 2, kit.state(2))
    for at in range(len("step-00000002\n")):
        for bit in range(8):
            flip(tmp_path / "latest", at, bit)
            assert find(tmp_path, lambda message: None) == path
            flip(tmp_path / "latest", at, bit)


def test_find_falls_back_and_says_so(tmp_path, kit):
    old = kit.save(tmp_path, 1, kit.state(1))
    new = kit.save(tmp_path, 2, kit.state(2))
    flip(new / "rank-00000.safetensors", (new / "rank-00000.safetensors").stat().st_size - 1, 3)
    said = []
    assert find(tmp_path, said.append) == old
    assert "step-00000002 is damaged and passed over" in said[0] and "does not match its checksum" in said[0]
    assert "using checkpoint step-00000001" in said[1]


def test_find_refuses_to_start_over_when_all_are_damaged(tmp_path, kit):
    path = kit.save(tmp_path, 1, kit.state(1))
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of them good"):
        find(tmp_path, lambda message: None)


def test_a_stale_or_missing_pointer_is_said(tmp_path, kit):
    kit.save(tmp_path, 1, kit.state(1))
    path = kit.save(tmp_path, 2, kit.state(2))
    (tmp_path / "latest").write_text("step-00000001\n")
    said = []
    assert find(tmp_path, said.append) == path and "names step-00000001" in said[0]
    (tmp_path / "latest").unlink()
    assert find(tmp_path, said.append) == path and "names none" in said[1]


def test_find_where_there_is_nothing(tmp_path):
    assert find(tmp_path / "absent", pytest.fail) is None
    assert find(tmp_path, pytest.fail) is None


def test_a_link_or_a_pipe_in_place_of_a_file_is_refused(tmp_path, kit):
    import os

    tensors = kit.state(1)
    path = kit.save(tmp_path / "c", 1, tensors)
    file = path / "rank-00000.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        kit.load(path, tensors)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError):
        kit.load(path, tensors)


def test_a_file_of_another_checkpoint_is_refused(tmp_path, kit):
    one, two = kit.save(tmp_path, 1, kit.state(1)), kit.save(tmp_path, 2, kit.state(2))
    (one / "rank-00000.safetensors").write_bytes((two / "rank-00000.safetensors").read_bytes())
    assert len(verify(one).problems) == len(read(one).entries)
    with pytest.raises(CheckpointError, match="checksum"):
        kit.load(one, kit.state(1))


def test_unchecked_loading_is_possible_only_on_request(tmp_path, kit):
    tensors = {("w", "weight"): torch.zeros(4)}
    path = kit.save(tmp_path, 1, tensors, precision="fp32")
    file = path / "rank-00000.safetensors"
    flip(file, file.stat().st_size - 1, 6)
    request = kit.whole_pieces(tensors)
    load(path, request, verify=False)
    assert request[0].tensor[3] != 0
