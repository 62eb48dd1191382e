"""Saving and loading in one layout: contents, types, header, the files' format, and every refusal."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from megactl.engine.checkpoint import Piece, SingleProcess, find, load, load_full, save  # noqa: E402
from megactl.errors import CheckpointError  # noqa: E402
from megactl.storage.manifest import read, verify  # noqa: E402


def request(name, kind, tensor):
    return Piece(name, kind, tuple(tensor.shape), tuple((0, n) for n in tensor.shape), None, tensor)


def test_state_comes_back_bitwise(tmp_path, kit):
    tensors = kit.state(1)
    path = kit.save(tmp_path / "checkpoints", 100, tensors)
    assert path.name == "step-00000100"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000100\n"
    assert kit.same(kit.load(path, tensors), tensors)
    assert verify(path).ok and verify(path).files_checked == 1
    assert find(tmp_path / "checkpoints", pytest.fail) == path


def test_header_comes_back(tmp_path, kit):
    extra = {"model": {"h": 8, "eps": 1e-5, "act": "gelu", "x": None}, "tokenizer": {"name": "byte"}, "state": {"rng": [1, 2], "λ": True}}
    path = kit.save(tmp_path, 7, kit.state(1), consumed_samples=12345, **extra)
    header = load(path, [])
    assert (header.step, header.consumed_samples, header.precision, header.layout["tp"]) == (7, 12345, "bf16", 1)
    assert {"model": header.model, "tokenizer": header.tokenizer, "state": header.state} == extra
    assert header.created_at.endswith("+00:00") and header.host


def test_the_files_are_plain_safetensors(tmp_path, kit):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = kit.state(3)
    path = kit.save(tmp_path, 1, tensors)
    stored = safetensors.load_file(path / "rank-00000.safetensors")
    for entry in read(path).entries:
        assert torch.equal(stored[entry.key], tensors[entry.name, entry.kind])
    assert len(stored) == len(tensors)


def test_values_that_compare_oddly_survive(tmp_path, kit):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45, -float("inf")])
    path = kit.save(tmp_path, 1, {("w", "weight"): odd}, precision="fp32")
    assert torch.equal(load_full(path)["w"].view(torch.int32), odd.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mixed_types_in_one_file(tmp_path, kit, dtype):
    tensors = {
        ("a", "weight"): torch.randn(3).to(dtype),
        ("b", "weight"): torch.randn(5).bfloat16(),
        ("c", "weight"): torch.randn(2, 2).double(),
    }
    assert kit.same(kit.load(kit.save(tmp_path, 1, tensors), tensors), tensors)


def test_a_parameter_and_a_transposed_copy_are_fine(tmp_path, kit):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    path = kit.save(tmp_path, 1, {("w", "weight"): weight}, precision="fp32")
    target = torch.nn.Parameter(torch.zeros(4, 3))
    load(path, [request("w", "weight", target)])
    assert torch.equal(target, weight)


def test_one_request_twice_and_parts_of_it(tmp_path, kit):
    weight = torch.randn(6, 5)
    path = kit.save(tmp_path, 1, {("w", "weight"): weight}, precision="fp32")
    full, again, part = torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(2, 3)
    load(path, [request("w", "weight", full), request("w", "weight", again), Piece("w", "weight", (6, 5), ((1, 3), (2, 5)), None, part)])
    assert torch.equal(full, weight) and torch.equal(again, weight) and torch.equal(part, weight[1:3, 2:5])


@pytest.mark.parametrize("verified", [True, False])
def test_a_narrow_read_without_checksums_gives_the_same(tmp_path, kit, verified):
    weight = torch.randn(64, 8)
    path = kit.save(tmp_path, 1, {("w", "weight"): weight}, precision="fp32")
    part = torch.zeros(11)
    load(path, [Piece("w", "weight", (64, 8), ((10, 20), (2, 7)), (13, 24), part)], verify=verified)
    assert torch.equal(part, weight[10:20, 2:7].reshape(-1)[13:24])


def test_an_fp32_weight_stands_for_its_master_and_is_rounded_to_bf16(tmp_path, kit):
    weight = torch.randn(9)
    path = kit.save(tmp_path, 1, {("w", "weight"): weight, ("w", "exp_avg"): weight * 2}, precision="fp32")
    master, rounded = torch.zeros(9), torch.zeros(9, dtype=torch.bfloat16)
    load(path, [request("w", "master", master), request("w", "weight", rounded)])
    assert torch.equal(master, weight) and torch.equal(rounded, weight.bfloat16())
    assert torch.equal(load_full(path, "master")["w"], weight)


def test_a_bf16_run_continues_in_fp32_from_its_master_copy(tmp_path, kit):
    tensors = kit.state(5)
    path = kit.save(tmp_path, 1, tensors)
    weight = torch.zeros(10, 4)
    load(path, [request("embedding.word.weight", "weight", weight)])
    assert torch.equal(weight, tensors["embedding.word.weight", "master"])


def test_weights_left_out_are_rounded_from_the_master(tmp_path, kit):
    master = torch.randn(5)
    path = kit.save(tmp_path, 1, {("w", "master"): master})
    weight = torch.zeros(5, dtype=torch.bfloat16)
    load(path, [request("w", "weight", weight)])
    assert torch.equal(weight, master.bfloat16())


def test_other_changes_of_type_are_refused(tmp_path, kit):
    path = kit.save(tmp_path, 1, {("w", "weight"): torch.zeros(3).bfloat16(), ("w", "exp_avg"): torch.zeros(3)})
    for kind, dtype in (("weight", torch.float32), ("master", torch.float32), ("exp_avg", torch.bfloat16), ("exp_avg_sq", torch.float32)):
        with pytest.raises(CheckpointError, match="stored"):
            load(path, [request("w", kind, torch.zeros(3, dtype=dtype))])


def test_a_master_is_never_rounded(tmp_path, kit):
    path = kit.save(tmp_path, 1, {("w", "weight"): torch.zeros(3)}, precision="fp32")
    with pytest.raises(CheckpointError, match="float32, the run has float64"):
        load(path, [request("w", "master", torch.zeros(3).double())])


def test_all_that_does_not_fit_is_named_at_once(tmp_path, kit):
    path = kit.save(tmp_path, 1, kit.state(1))
    wrong = [request("layers.0.mlp.biass", "weight", torch.zeros(7)), request("scale", "weight", torch.zeros(2).bfloat16())]
    with pytest.raises(CheckpointError) as caught:
        load(path, wrong)
    assert "closest name is 'layers.0.mlp.bias'" in str(caught.value) and "stored with shape [], the run has [2]" in str(caught.value)


def test_load_full_of_an_absent_kind(tmp_path, kit):
    path = kit.save(tmp_path, 1, {("w", "weight"): torch.zeros(3).bfloat16()})
    with pytest.raises(CheckpointError, match="ask for one of weight"):
        load_full(path, "exp_avg")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "momentum"}, "kind must be one of"),
        ({"tensor": torch.zeros(3, 4, dtype=torch.int64)}, "type int64"),
        ({"tensor": torch.zeros(4, 3)}, "a tensor of shape"),
        ({"tensor": torch.zeros(4, 3).t()}, "contiguous"),
        ({"rectangle": ((0, 3), (0, 5))}, "within"),
        ({"rectangle": ((0, 3),)}, "dimensions"),
        ({"rectangle": ((0, 3), (0, 4)), "flat_range": (5, 5), "tensor": torch.zeros(0)}, "flat range"),
        ({"name": "../w"}, "the name must be"),
        ({"rectangle": ((0, 2), (0, 4)), "tensor": torch.zeros(2, 4)}, "4 of 12 elements are held by no piece"),
    ],
)
def test_pieces_that_cannot_be_saved(tmp_path, kit, change, words):
    piece = {
        "name": "w",
        "kind": "weight",
        "logical_shape": (3, 4),
        "rectangle": ((0, 3), (0, 4)),
        "flat_range": None,
        "tensor": torch.zeros(3, 4),
    }
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path / "c", step=1, pieces=[Piece(**(piece | change))], header=kit.header(), group=SingleProcess(), keep=0, protect=None)
    assert list((tmp_path / "c").iterdir()) == []


def test_a_replica_saved_twice_is_refused(tmp_path, kit):
    pieces = kit.whole_pieces({("w", "weight"): torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"\[0:4\] are held by more than one piece"):
        save(tmp_path, step=1, pieces=pieces * 2, header=kit.header(), group=SingleProcess(), keep=0, protect=None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "int4"}, "precision"),
        ({"state": {"x": float("nan")}}, "not JSON compliant|Out of range"),
        ({"state": {"x": (1, 2)}}, "changes when written"),
        ({"state": {1: 2}}, "changes when written"),
        ({"state": {"x": object()}}, "not JSON serializable"),
        ({"layout": {"tp": 1}}, "has no 'cp'"),
        ({"layout": {"tp": 0, "cp": 1, "dp": 1, "pp": 1, "zero": 0}}, "at least 1"),
        ({"consumed_samples": -1}, "at least 0"),
        ({"extra": 1}, "must have exactly"),
    ],
)
def test_headers_that_cannot_be_saved(tmp_path, kit, change, words):
    with pytest.raises(CheckpointError, match=words):
        kit.save(tmp_path / "c", 1, kit.state(1), **change)
    assert list((tmp_path / "c").iterdir()) == []


def test_the_manifest_is_ordinary_json(tmp_path, kit):
    path = kit.save(tmp_path, 1, kit.state(1))
    document = json.loads((path / "manifest.json").read_text())
    assert document["schema_version"] == 1 and len(document["tensors"]) == 12
    assert document["tensors"][0].keys() == {"name", "kind", "shape", "rectangle", "flat_range", "dtype", "file", "key", "checksum"}
