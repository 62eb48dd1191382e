"""Mutated checkpoints of every layout: an inventory whose bytes add up, or a MegactlError; never anything else."""

from __future__ import annotations

import contextlib
import random

import pytest

torch = pytest.importorskip("torch")

from megactl.errors import MegactlError  # noqa: E402
from megactl.storage.foreign import Limits  # noqa: E402
from megactl.storage.layouts import inspect  # noqa: E402

MAKERS = {
    "megatron": lambda make, root: make.megatron(root, tp=2, pp=1),
    "megatron-distributed": lambda make, root: make.megatron(root, tp=1, pp=1, distributed=True),
    "deepspeed": lambda make, root: make.deepspeed_pipeline(root, tp=1, pp=2),
    "zero3": lambda make, root: make.deepspeed_flat(root, zero=3),
    "huggingface": lambda make, root: make.huggingface(root),
    "torch_dist": lambda make, root: make.distributed(root),
}


def mutate(data: bytes, source: random.Random) -> bytes:
    """Some bytes changed, cut out or moved; half of the time near the ends, where headers and directories are."""
    data = bytearray(data)
    for _ in range(source.choice((1, 3))):
        near = min(len(data), 2000)
        at = source.choice((source.randrange(near), len(data) - 1 - source.randrange(near), source.randrange(len(data))))
        action = source.randrange(4)
        if action == 0:
            data[at] ^= 1 << source.randrange(8)
        elif action == 1:
            data[at : at + 8] = source.choice((b"\xff" * 8, bytes(8), b"-9", b'"', b"[[[["))
        elif action == 2:
            del data[at : at + source.randrange(1, 100)]
        else:
            data[at:at] = data[: source.randrange(1, 100)]
        if not data:
            return b""
    return bytes(data)


@pytest.mark.parametrize("rounds", [15, pytest.param(1500, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", list(MAKERS))
def test_mutated_checkpoints(make, tmp_path, name, rounds):
    MAKERS[name](make, tmp_path)
    assert inspect(tmp_path).good
    source = random.Random(name)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size)
    complaints = 0
    for _ in range(rounds):
        victim = source.choice(files)
        before = victim.read_bytes()
        victim.write_bytes(mutate(before, source))
        try:
            inventory = inspect(tmp_path, Limits(opcodes=100_000))
            assert sum(inventory.parts.values()) == inventory.size == sum(row.size for row in inventory.files)
            complaints += not inventory.good
        except MegactlError:
            complaints += 1
        victim.write_bytes(before)
    assert complaints > rounds // 4 and inspect(tmp_path).good


@pytest.mark.parametrize("name", list(MAKERS))
def test_every_file_gone_or_cut_is_noticed(make, tmp_path, name):
    MAKERS[name](make, tmp_path)
    for victim in sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size):
        before, aside = victim.read_bytes(), victim.with_name("aside-for-a-test")
        optional = victim.suffix in (".json", ".txt") or victim.name in ("latest", "optimizer.pt", "rng_state.pth") or name == "huggingface"
        if not optional:
            victim.rename(aside.with_suffix(".txt"))
            with contextlib.suppress(MegactlError):
                assert not inspect(tmp_path).good, f"without {victim.name}"
            aside.with_suffix(".txt").rename(victim)
        if victim.suffix not in (".json", ".txt") and victim.name != "latest":
            victim.write_bytes(before[: len(before) // 2])
            assert not inspect(tmp_path).good, f"half of {victim.name}"
            victim.write_bytes(before)
