"""Operators over lists of tensors on CUDA: AdamW, squared norm, scaling, clipping."""

from __future__ import annotations

import math

import pytest
import torch

from megactl.engine import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
LISTS = ("params", "masters", "grads", "exp_avgs", "exp_avg_sqs")
# Launches take 256 tensors; blocks 4096 or 8192 elements.
SIZES = [1, 0, 7, 4096, 4097, 8192, 8193, 100_003, 0, *[n % 37 for n in range(600)], 1 << 20, 0]


def views(sizes: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors on the device, every second one beginning where no vector does."""
    return [torch.randn(n + i % 2, device="cuda").to(dtype)[i % 2 :] for i, n in enumerate(sizes)]


def lists(dtype: torch.dtype, lows: tuple[torch.dtype | None, ...], sizes: list[int] = SIZES) -> dict[str, list[torch.Tensor]]:
    made = {name: views(sizes, dtype) for name in LISTS[1:]}
    made["exp_avg_sqs"] = [tensor.abs_() for tensor in made["exp_avg_sqs"]]
    kinds = [lows[i % len(lows)] for i in range(len(sizes))]
    made["params"] = [
        master if low is None else torch.full_like(master, float("nan"), dtype=low)
        for master, low in zip(made["masters"], kinds, strict=True)
    ]
    return made


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins as the original does with regard to vectors: sums are taken in the order of the loads."""
    before = tensor.data_ptr() // tensor.element_size() % 8
    return torch.cat([tensor.new_zeros(before), tensor])[before:]


def copy(tensors: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    fresh = {name: [moved(tensor) for tensor in each] for name, each in tensors.items()}
    fresh["params"] = [
        new if old is master else param
        for old, master, new, param in zip(tensors["params"], tensors["masters"], fresh["masters"], fresh["params"], strict=True)
    ]
    return fresh


def scalars(dtype: torch.dtype = torch.float32, **changes: float) -> dict[str, torch.Tensor]:
    values = {"lr": 1e-3, "step": 3.0, "grad_scale": 0.7, "skip": 0.0, **changes}
    return {name: torch.tensor(value, dtype=dtype, device="cuda") for name, value in values.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lows", [(None,), (torch.bfloat16,), (None, torch.bfloat16, torch.float16)])
def test_adamw_many_equals_one_by_one(compiled, dtype, lows):
    one = lists(dtype, lows)
    other = copy(one)
    decays = [0.1 * (i % 3) for i in range(len(SIZES))]
    ops.adamw_many_(**one, **scalars(dtype), **SETTINGS, weight_decay=decays)
    for *tensors, decay in zip(*(other[name] for name in LISTS), decays, strict=True):
        ops.adamw_(*tensors, **scalars(dtype), **SETTINGS, weight_decay=decay)
    for name in LISTS:
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name
    assert not any(param.isnan().any() for param in one["params"])


def test_adamw_many_against_the_cpu(compiled):
    one = lists(torch.float32, (torch.bfloat16,))
    other = {name: [tensor.cpu() for tensor in each] for name, each in one.items()}
    ops.adamw_many_(**one, **scalars(), **SETTINGS, weight_decay=0.1)
    ops.adamw_many_(**other, **{name: value.cpu() for name, value in scalars().items()}, **SETTINGS, weight_decay=0.1)
    for name in LISTS:
        for a, b in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2 * torch.finfo(b.dtype).eps, atol=1e-8)


def test_adamw_many_skips_on_the_device(compiled):
    one = lists(torch.float32, (None,), [5, 5000])
    other = copy(one)
    one["grads"][0].fill_(float("nan"))
    ops.adamw_many_(**one, **scalars(skip=1.0), **SETTINGS, weight_decay=0.1)
    for name in ("masters", "exp_avgs", "exp_avg_sqs"):
        assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name


def mixed() -> list[torch.Tensor]:
    """One list of every type."""
    return [tensor for i, n in enumerate(SIZES) for tensor in views([n, n % 11], FLOATS[i % 4])]


def test_squared_norm(compiled):
    tensors = mixed()
    right = math.fsum(value * value for tensor in tensors for value in tensor.double().cpu().tolist())
    found = [ops.squared_norm(tensors) for _ in range(3)]
    assert found[0].dtype == torch.float64 and abs(found[0].item() / right - 1) < 1e-13
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert ops.squared_norm([torch.empty(0, device="cuda")]).item() == 0.0
    assert torch.isfinite(ops.squared_norm([torch.full((3,), 3e38, device="cuda")]))
    tensors[5][-1] = float("nan")
    assert ops.squared_norm(tensors).isnan()


@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_norm_of_a_large_tensor(compiled, dtype):
    tensor = torch.randn(50_000_001, device="cuda").to(dtype)[1:]
    right = sum(part.double().square().sum() for part in tensor.split(1 << 20))
    torch.testing.assert_close(ops.squared_norm([tensor]), right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("factor", [torch.tensor(0.37), torch.tensor(0.37, dtype=torch.float64), torch.tensor(1.0)])
def test_scale(compiled, factor):
    tensors = mixed()
    right = [(t.cpu().to(torch.promote_types(t.dtype, torch.float32)) * factor).to(t.dtype) for t in tensors]
    ops.scale_(tensors, factor.cuda())
    assert all(torch.equal(one.cpu(), other) for one, other in zip(tensors, right, strict=True))


def test_scale_touches_the_views_alone_and_one_touches_nothing(compiled):
    buffer = torch.ones(100_000, device="cuda")
    ops.scale_([buffer[3:10], buffer[20:20], buffer[501:99_998]], torch.tensor(2.0, device="cuda"))
    right = torch.ones(100_000)
    right[3:10] = right[501:99_998] = 2
    assert torch.equal(buffer.cpu(), right)
    bits = torch.tensor([0x7F800001, 1, 0x3F800000], dtype=torch.int32, device="cuda")
    ops.scale_([bits.view(torch.float32)], torch.tensor(1.0, device="cuda"))
    assert bits.tolist() == [0x7F800001, 1, 0x3F800000]


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clip_equals_torch(compiled, max_norm):
    tensors = views(SIZES, torch.float32)
    parameters = [torch.nn.Parameter(t.clone()) for t in tensors]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    theirs = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    torch.testing.assert_close(ops.clip_gradients_(tensors, max_norm).float(), theirs, rtol=1e-5, atol=0)
    for tensor, parameter in zip(tensors, parameters, strict=True):
        torch.testing.assert_close(tensor, parameter.grad, rtol=1e-5, atol=1e-9)


def test_a_captured_graph_of_clip_and_adamw_replays_with_new_values(compiled):
    one, values = lists(torch.float32, (torch.bfloat16,), [5, 0, 4097, 100_003]), scalars()
    start = copy(one)

    def step(tensors: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        norm = ops.clip_gradients_(tensors["grads"], 0.5)
        ops.adamw_many_(**tensors, **values, **SETTINGS, weight_decay=0.1)
        return norm

    step(one)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step(one)
    for count in (2.0, 5.0):
        for name in LISTS:
            for tensor, value in zip(one[name], start[name], strict=True):
                tensor.copy_(value * (count if name == "grads" else 1.0))
        other = copy(one)
        values["step"].fill_(count)
        graph.replay()
        assert torch.equal(norm, step(other))
        for name in LISTS:
            assert all(torch.equal(a, b) for a, b in zip(one[name], other[name], strict=True)), name


def test_list_opcheck_on_the_device(compiled):
    torch.library.opcheck(torch.ops.megactl.squared_norm, (views([3, 5], torch.float32),))
    torch.library.opcheck(torch.ops.megactl.scale_, (views([3, 5], torch.float32), torch.tensor(0.5, device="cuda")))
