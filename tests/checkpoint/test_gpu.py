"""Pieces in device memory: copied out one at a time on save, filled in place on load."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from megactl.engine.checkpoint import Piece, SingleProcess, load, load_full, save  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_memory_to_disk_and_back_in_another_cut(tmp_path, kit, dtype):
    weight = torch.randn(1000, 300, device="cuda").to(dtype)
    halves = [Piece("w", "weight", (1000, 300), ((a, a + 500), (0, 300)), None, weight[a : a + 500]) for a in (0, 500)]
    path = save(tmp_path, step=1, pieces=halves, header=kit.header(), group=SingleProcess(), keep=0, protect=None)
    assert torch.equal(load_full(path)["w"], weight.cpu())
    same = Piece("w", "weight", (1000, 300), ((500, 1000), (0, 300)), None, torch.zeros(500, 300, device="cuda", dtype=dtype))
    other = Piece("w", "weight", (1000, 300), ((0, 1000), (100, 200)), (777, 90_001), torch.zeros(89_224, device="cuda", dtype=dtype))
    load(path, [same, other])
    assert torch.equal(same.tensor, weight[500:])
    assert torch.equal(other.tensor, weight[:, 100:200].reshape(-1)[777:90_001])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_weight_is_rounded_on_its_way_to_the_device(tmp_path, kit):
    weight = torch.randn(64, 8)
    path = kit.save(tmp_path, 1, {("w", "weight"): weight}, precision="fp32")
    target = Piece("w", "weight", (64, 8), ((0, 64), (0, 8)), None, torch.zeros(64, 8, device="cuda", dtype=torch.bfloat16))
    load(path, [target])
    assert torch.equal(target.tensor.cpu(), weight.bfloat16())
