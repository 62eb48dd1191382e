"""Files of torch.save in both formats: the reader says what torch.load gives; mutated files end in a MegactlError or a value."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from megactl.errors import CheckpointError, MegactlError  # noqa: E402
from megactl.storage.foreign import Limits, OpenFile, read_torch_file  # noqa: E402
from megactl.storage.layouts import inspect  # noqa: E402

_NAMES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
TYPES = [getattr(torch, name) for name in _NAMES.split()]
NEW_TYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


def sample(*, new: bool = True) -> dict:
    """Tensors of every type and of odd shapes, views, parameters, a tied one, a buffer, a module's state."""
    base = torch.arange(1000.0)
    return {
        "types": {str(dtype): torch.zeros(3, 5).to(dtype) for dtype in (*TYPES, *(NEW_TYPES if new else ()))},
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "view": base[100:200].view(10, 10).t(),
        "tied": [base, base],
        "parameter": torch.nn.Parameter(torch.zeros(4)),
        "module": torch.nn.Linear(3, 4).state_dict(),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
        "size": torch.zeros(2, 3).shape,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
    }


def tensors(value, path=()):
    """(path, tensor) by walking what torch.load returns."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, (*path, str(key)))
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        for index, item in enumerate(value):
            yield from tensors(item, (*path, str(index)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_loads(tmp_path, zipped, protocol):
    path = tmp_path / "x.pt"
    # torch itself cannot read the newest types back from the old format.
    torch.save(sample(new=zipped), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    with OpenFile(path) as file:
        contents = read_torch_file(file, Limits())
    assert not contents.problems and not contents.notes and not contents.warnings
    loaded = dict(tensors(torch.load(path, weights_only=False)))
    assert [tensor.path for tensor in contents.tensors] == list(loaded)
    for tensor in contents.tensors:
        other = loaded[tensor.path]
        assert (tensor.dtype, tensor.shape, tensor.nbytes) == (str(other.dtype).removeprefix("torch."), tuple(other.shape), other.nbytes)
        if other.numel():
            start = other.storage_offset() * other.itemsize
            assert tensor.extent[0] == start and tensor.extent[1] - start >= tensor.nbytes
    distinct = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in loaded.values()}
    assert sum(contents.storages.values()) == sum(distinct.values())


def test_tensor_subclasses_sparse_and_meta(tmp_path):
    class Mine(torch.Tensor):
        pass

    value = {
        "mine": torch.zeros(3).as_subclass(Mine),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr() if hasattr(torch, "sparse_csr") else torch.zeros(1),
        "meta": torch.zeros(5, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        globals()["Mine"] = Mine
        Mine.__qualname__ = "Mine"
        torch.save(value, tmp_path / "x.pt")
    with OpenFile(tmp_path / "x.pt") as file:
        contents = read_torch_file(file, Limits())
    assert not contents.problems, contents.problems
    sizes = {tensor.path[0]: tensor.nbytes for tensor in contents.tensors}
    assert sizes["mine"] == 12 and sizes["meta"] == 0 and sizes["quantized"] == 4
    assert sum(tensor.nbytes for tensor in contents.tensors if tensor.path[0] == "sparse") == 3 * 4 + 2 * 3 * 8


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_named(tmp_path, zipped):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(50), "b": [torch.ones(3)]}, buffer, _use_new_zipfile_serialization=zipped)
    data, path = buffer.getvalue(), tmp_path / "x.pt"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with OpenFile(path) as file, pytest.raises(CheckpointError):
            read_torch_file(file, Limits())
        assert not inspect(path).good


def mutate(data: bytes, source: random.Random) -> bytes:
    """A few bytes changed, a piece cut out, doubled, or set to what sizes and opcodes dislike."""
    data = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 5))):
        at = source.randrange(len(data))
        kind = source.randrange(5)
        if kind == 0:
            data[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            data[at : at + source.choice((1, 4, 8))] = source.choice((b"\xff" * 8, b"\x00" * 4, b"\x7f\xff\xff\xff", b"PK\x05\x06", b"."))
        elif kind == 2:
            del data[at : at + source.randrange(1, 60)]
        elif kind == 3:
            data[at:at] = data[source.randrange(len(data)) :][: source.randrange(1, 60)]
        else:
            data[at] = source.randrange(256)
        if not data:
            return b"\x80"
    return bytes(data)


def fuzz(folder: Path, rounds: int, seed: int) -> int:
    """Mutate one file of a checkpoint at a time; every outcome is an inventory or a MegactlError, and the bytes still add up."""
    source, complaints = random.Random(seed), 0
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(rounds):
        victim = source.choice(files)
        before = victim.read_bytes()
        # Most of a file is tensor data, which is not read: aim at both ends as often as at the middle.
        victim.write_bytes(mutate(before, source))
        try:
            inventory = inspect(folder, Limits(opcodes=100_000))
            assert sum(inventory.parts.values()) == inventory.size
            complaints += not inventory.good
        except MegactlError:
            complaints += 1
        victim.write_bytes(before)
    assert inspect(folder).good
    return complaints


@pytest.mark.parametrize("rounds", [40, pytest.param(3000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("zipped", [True, False])
def test_mutated_files(tmp_path, zipped, rounds):
    torch.save(sample(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert fuzz(tmp_path, rounds, seed=1) > rounds // 20
