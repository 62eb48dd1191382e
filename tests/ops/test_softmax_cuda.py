"""masked_softmax's CUDA kernels against the definition in float64: every length of row that has a kernel of its own."""

from __future__ import annotations

import math

import pytest
import torch

from megactl.engine import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
KEYS = [1, 5, 8, 64, 250, 256, 264, 300, 512, 520, 777, 1023, 1024, 1032, 1500, 2048, 4096, 4100, 8192, 16_384, 16_392, 20_001]


def exact(scores: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    queries, keys = scores.shape[-2:]
    allowed = torch.ones(scores.shape, dtype=torch.bool, device="cuda") if mask is None else mask.expand(scores.shape).clone()
    if causal:
        allowed &= torch.arange(keys, device="cuda") <= torch.arange(queries, device="cuda")[:, None] + keys - queries
    shifted = (scores.double() * scale).masked_fill(~allowed, -1e300)
    e = torch.where(allowed, (shifted - shifted.amax(-1, keepdim=True)).exp(), 0.0)
    return e / e.sum(-1, keepdim=True).clamp_min(1e-300)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-2))


def make_mask(kind: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    batch, _, queries, keys = shape
    if kind == "none":
        return None
    if kind == "padding":
        return (torch.arange(keys, device="cuda") < torch.randint(0, keys + 1, (batch, 1), device="cuda"))[:, None, None, :]
    return torch.rand(batch, 1, queries, keys, device="cuda") < 0.6 if kind == "queries" else torch.rand(shape, device="cuda") < 0.6


def check(shape: tuple[int, ...], dtype: torch.dtype, kind: str, causal: bool, shift: int = 0) -> None:
    def draw() -> torch.Tensor:
        return torch.randn(math.prod(shape) + shift, device="cuda").to(dtype)[shift:].view(shape)

    scores, grad, mask, scale = draw(), draw(), make_mask(kind, shape), 0.6
    torch.full((scores.numel(),), float("nan"), dtype=dtype, device="cuda")  # poison for the memory of the result
    y, expected = ops.masked_softmax(scores, scale=scale, mask=mask, causal=causal), exact(scores, scale, mask, causal)
    assert error(y, expected) < BOUND[dtype]
    assert (y[expected == 0] == 0).all()
    torch.full((scores.numel(),), float("nan"), dtype=dtype, device="cuda")
    found = ops.masked_softmax_backward(grad, y, scale=scale, mask=mask, causal=causal)
    ys, gs = y.double(), grad.double()
    right = scale * ys * (gs - (gs * ys).sum(-1, keepdim=True))
    assert float((found.double() - right).norm() / (scale * ys * gs).norm().clamp_min(1e-2)) < BOUND[dtype]
    assert (found[expected == 0] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("keys", KEYS)
def test_definition(compiled, dtype, keys):
    shape = (2, 3, 9 if keys < 4000 else 3, keys)
    for kind in ("none", "padding", "queries", "full"):
        for causal in (False, True):
            check(shape, dtype, kind, causal)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_are_not_aligned(compiled, dtype):
    for keys in (64, 512, 1024, 2048):
        check((2, 2, 5, keys), dtype, "queries", True, shift=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_shape_of_gpt_345m(compiled, dtype):
    check((4, 16, 1024, 1024), dtype, "none", True)
    check((4, 16, 1024, 1024), dtype, "padding", False)


def test_more_queries_than_keys_and_fewer(compiled):
    for queries, keys in ((70, 24), (24, 70), (300, 8), (1, 1024)):
        check((1, 2, queries, keys), torch.float32, "none", True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_masked_is_not_used(compiled, dtype):
    for keys in (64, 600, 1024, 2048, 20_001):
        shape = (1, 2, 3, keys)
        mask = torch.rand(1, 1, 3, keys, device="cuda") < 0.5
        allowed = (mask & torch.ones(3, keys, dtype=torch.bool, device="cuda").tril(keys - 3)).expand(shape)
        scores, grad = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
        bad = torch.where(torch.rand(shape, device="cuda") < 0.5, float("nan"), float("inf")).to(dtype)
        results = []
        for one, other in ((scores, grad), (torch.where(allowed, scores, bad), torch.where(allowed, grad, bad))):
            y = ops.masked_softmax(one, scale=0.5, mask=mask, causal=True)
            results.append((y, ops.masked_softmax_backward(other, y, scale=0.5, mask=mask, causal=True)))
        assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("keys", [3, 64, 2048, 20_001])
def test_special_numbers_as_in_torch(compiled, keys):
    inf, nan = float("inf"), float("nan")
    scores = torch.randn(1, 1, 6, keys, device="cuda")
    scores[0, 0, 0, 1], scores[0, 0, 1, 2], scores[0, 0, 2, 0], scores[0, 0, 3], scores[0, 0, 4, 1] = nan, inf, -inf, -inf, 3e38
    expected, y = torch.softmax(scores, -1), ops.masked_softmax(scores, scale=1.0)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y.nan_to_num(), expected.nan_to_num())


def test_repeats_and_both_devices(compiled):
    for dtype in FLOATS:
        scores, grad = (torch.randn(2, 4, 64, 1024, device="cuda").to(dtype) for _ in range(2))
        y = ops.masked_softmax(scores, scale=0.3, causal=True)
        g = ops.masked_softmax_backward(grad, y, scale=0.3, causal=True)
        for _ in range(3):
            assert torch.equal(y, ops.masked_softmax(scores, scale=0.3, causal=True))
            assert torch.equal(g, ops.masked_softmax_backward(grad, y, scale=0.3, causal=True))
        assert error(y.cpu(), ops.masked_softmax(scores.cpu(), scale=0.3, causal=True).double()) < BOUND[dtype]


def test_a_captured_graph_replays_with_new_inputs(compiled):
    scores, grad = (torch.randn(2, 4, 64, 1024, device="cuda").bfloat16() for _ in range(2))
    mask = torch.rand(2, 1, 1, 1024, device="cuda") < 0.5

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        y = ops.masked_softmax(scores, scale=0.3, mask=mask)
        return y, ops.masked_softmax_backward(grad, y, scale=0.3, mask=mask)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(2):
        scores.copy_(torch.randn_like(scores))
        mask.copy_(torch.rand(mask.shape, device="cuda") < 0.5)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, both(), strict=True))


def test_more_than_two_to_the_31_elements(compiled):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    scores = torch.zeros(33, 64, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    scores[-1, -1, -1] = torch.randn(1024, device="cuda").bfloat16()
    y = ops.masked_softmax(scores, scale=1.0, causal=True)
    assert torch.equal(y[-1, -1, -1], ops.masked_softmax(scores[-1:, -1:, -1:].clone(), scale=1.0)[0, 0, 0])
    assert torch.equal(y[0], y[31]) and y[0, 0, 0, 0] == 1 and (y[0, 0, 0, 1:] == 0).all()


def test_autograd_opcheck_and_compile_on_the_device(compiled):
    scores, mask = torch.randn(2, 3, 16, 64, device="cuda", requires_grad=True), torch.rand(2, 1, 1, 64, device="cuda") < 0.7
    torch.library.opcheck(torch.ops.megactl.masked_softmax, (scores, mask, 0.5, True))

    def function(scores: torch.Tensor) -> torch.Tensor:
        return ops.masked_softmax(scores * 2, scale=0.5, mask=mask).sin()

    traced = torch.compile(function, fullgraph=True)
    one, other = (torch.autograd.grad(y.square().sum(), scores)[0] for y in (traced(scores), function(scores)))
    torch.testing.assert_close(one, other)
