"""masked_softmax and its backward against the definition in float64, on the compiled operators and on the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
MASKS = ["none", "padding", "full", "rows", "expanded"]


def exact(scores: torch.Tensor, scale: float, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """Row by row: softmax over what is allowed, and zeros."""
    b, n, queries, keys = scores.shape
    allowed = torch.ones(b, n, queries, keys, dtype=torch.bool) if mask is None else mask.expand(scores.shape).clone()
    if causal:
        allowed &= torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    shifted = (scores.double() * scale).masked_fill(~allowed, -1e300)
    e = torch.where(allowed, (shifted - shifted.amax(-1, keepdim=True)).exp(), 0.0)
    return e / e.sum(-1, keepdim=True).clamp_min(1e-300)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-2))


def make_mask(kind: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    b, _, queries, keys = shape
    if kind == "none":
        return None
    if kind == "padding":  # a prefix of each sample, which may be empty
        return (torch.arange(keys) < torch.randint(0, keys + 1, (b, 1)))[:, None, None, :]
    if kind == "full":
        return torch.rand(shape) < 0.6
    if kind == "rows":
        return torch.rand(queries, keys) < 0.6
    return (torch.rand(b, 1, 1, keys) < 0.6).expand(shape)


def need_compiled() -> None:
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None


def check_both(shape: tuple[int, ...], dtype: torch.dtype, kind: str, causal: bool, scale: float) -> None:
    scores, grad, mask = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype), make_mask(kind, shape)
    torch.full((scores.numel(),), float("nan"), dtype=dtype)  # poison for the memory of the result
    y, expected = ops.masked_softmax(scores, scale=scale, mask=mask, causal=causal), exact(scores, scale, mask, causal)
    assert y.dtype == dtype and y.is_contiguous() and error(y, expected) < BOUND[dtype]
    assert (y[expected == 0] == 0).all()
    torch.full((scores.numel(),), float("nan"), dtype=dtype)
    found = ops.masked_softmax_backward(grad, y, scale=scale, mask=mask, causal=causal)
    ys, gs = y.double(), grad.double()
    right = scale * ys * (gs - (gs * ys).sum(-1, keepdim=True))
    # Where one key takes everything, the gradient is the small difference of large numbers: the bound is of those.
    size = float((scale * ys * gs).norm().clamp_min(1e-2))
    assert found.dtype == dtype and float((found.double() - right).norm()) / size < BOUND[dtype]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FLOATS),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 150)),
    st.sampled_from(MASKS),
    st.booleans(),
    st.sampled_from([1.0, 0.125, -0.7, 0.0]),
    st.integers(0, 10**6),
)
def test_compiled_equals_the_definition(dtype, shape, kind, causal, scale, seed):
    need_compiled()
    torch.manual_seed(seed)
    check_both(shape, dtype, kind, causal, scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("causal", [True, False])
def test_definition(backend, dtype, kind, causal):
    for shape in ((2, 3, 7, 7), (1, 2, 5, 37), (2, 2, 9, 4), (1, 1, 1, 1), (3, 1, 2, 1100)):
        check_both(shape, dtype, kind, causal, 0.3)


def test_long_rows_stay_accurate(compiled):
    for keys in (4096, 16384, 20_001):
        scores = torch.randn(1, 1, 3, keys)
        y = ops.masked_softmax(scores, scale=0.1)
        assert error(y, exact(scores, 0.1, None, False)) < 3e-7
        assert abs(float(y.double().sum(-1).max()) - 1) < 1e-6


def test_large_scores_do_not_overflow(backend):
    scores = torch.tensor([3e38, -3e38, 2.9e38, 0.0]).view(1, 1, 1, 4)
    assert torch.equal(ops.masked_softmax(scores, scale=1.0), torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 4))
    wide = torch.linspace(-2000, 2000, 801).view(1, 1, 1, 801)
    assert error(ops.masked_softmax(wide, scale=0.7), exact(wide, 0.7, None, False)) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_without_any_key_are_zero_and_have_no_gradient(backend, dtype):
    scores = torch.randn(2, 1, 3, 5).to(dtype).requires_grad_()
    mask = torch.tensor([True, False]).view(2, 1, 1, 1)
    y = ops.masked_softmax(scores, scale=1.0, mask=mask)
    (grad,) = torch.autograd.grad(y, scores, torch.randn(y.shape).to(dtype))
    assert (y[1] == 0).all() and (grad[1] == 0).all() and (y[0] != 0).all() and (grad[0] != 0).any()
    # More queries than keys: the first ones see nothing.
    square = ops.masked_softmax(torch.randn(1, 1, 5, 2).to(dtype), scale=1.0, causal=True)
    assert (square[0, 0, :3] == 0).all() and (square[0, 0, 3] == torch.tensor([1.0, 0.0])).all() and (square[0, 0, 4] > 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_masked_is_not_used(backend, causal):
    """NaN and infinity under the mask change nothing, neither forward nor backward."""
    shape = (2, 2, 6, 40)
    mask = torch.rand(2, 1, 6, 40) < 0.5
    scores, grad = torch.randn(shape), torch.randn(shape)
    allowed = (mask & (torch.ones(6, 40).tril(34).bool() if causal else True)).expand(shape)
    bad = torch.where(torch.rand(shape) < 0.5, float("nan"), float("inf"))
    results = []
    for filled in (True, False):
        one, other = ((torch.where(allowed, t, bad) if filled else t) for t in (scores, grad))
        leaf = one.clone().requires_grad_()
        y = ops.masked_softmax(leaf, scale=0.5, mask=mask, causal=causal)
        results.append((y.detach(), torch.autograd.grad(y, leaf, other)[0] if backend == "compiled" else y.detach()))
        results[-1] += (ops.masked_softmax_backward(other, y.detach(), scale=0.5, mask=mask, causal=causal),)
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected) and found.isfinite().all()


def test_special_numbers_as_in_torch(backend):
    inf, nan = float("inf"), float("nan")
    rows = [[nan, 1.0, 2.0], [inf, 1.0, 2.0], [-inf, 1.0, 2.0], [-inf, -inf, -inf], [inf, -inf, nan]]
    scores = torch.tensor(rows).view(1, 1, 5, 3)
    expected = torch.softmax(scores, -1)
    y = ops.masked_softmax(scores, scale=1.0)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y.nan_to_num(), expected.nan_to_num())
    masked = ops.masked_softmax(scores, scale=1.0, mask=torch.tensor([True, True, False]))
    assert (masked[..., 2] == 0).all() and torch.equal(masked[0, 0, :, 1].isnan(), torch.tensor([True, True, False, True, True]))
    grad = torch.zeros(1, 1, 1, 3)
    grad[..., 1] = nan
    assert ops.masked_softmax_backward(grad, torch.full((1, 1, 1, 3), 1 / 3), scale=1.0).isnan().all()


def test_threads_do_not_change_a_bit(compiled):
    for dtype in FLOATS:
        scores, grad = torch.randn(3, 4, 50, 131).to(dtype), torch.randn(3, 4, 50, 131).to(dtype)
        results, before = [], torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ops.masked_softmax(scores, scale=0.2, causal=True)
            results.append((y, ops.masked_softmax_backward(grad, y, scale=0.2, causal=True)))
        torch.set_num_threads(before)
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_views_that_are_not_contiguous_or_aligned(backend):
    scores, mask = torch.randn(2, 3, 4, 24), torch.rand(2, 1, 4, 24) < 0.7
    expected = ops.masked_softmax(scores, scale=0.3, mask=mask)
    assert torch.equal(ops.masked_softmax(scores.transpose(1, 2).contiguous().transpose(1, 2), scale=0.3, mask=mask), expected)
    moved = torch.cat([torch.zeros(1), scores.flatten()])[1:].view(scores.shape)
    shifted = torch.cat([torch.zeros(1, dtype=torch.bool), mask.flatten()])[1:].view(mask.shape)
    assert torch.equal(ops.masked_softmax(moved, scale=0.3, mask=shifted), expected)
    turned = mask.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(ops.masked_softmax(scores, scale=0.3, mask=turned), expected)


@pytest.mark.parametrize(("kind", "causal"), [("none", False), ("full", False), ("none", True), ("padding", True)])
def test_gradients_of_autograd(backend, kind, causal):
    scores = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = make_mask(kind, (2, 2, 3, 5))
    assert torch.autograd.gradcheck(lambda x: ops.masked_softmax(x, scale=0.4, mask=mask, causal=causal), (scores,))


def test_a_second_derivative_is_refused(compiled):
    scores = torch.randn(1, 1, 3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(ops.masked_softmax(scores, scale=1.0).square().sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


def test_empty_scores(backend):
    for shape in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        y = ops.masked_softmax(torch.empty(shape), scale=1.0, causal=True, mask=torch.ones(shape[-1], dtype=torch.bool))
        assert y.shape == shape and ops.masked_softmax_backward(y, y, scale=1.0).shape == shape


def test_refusals(backend):
    good = {"scores": torch.randn(2, 3, 4, 5), "scale": 1.0}
    wrong = [{"scores": torch.randn(3, 4, 5)}, {"scores": torch.ones(2, 3, 4, 5, dtype=torch.int64)}, {"scale": float("nan")}]
    wrong += [{"mask": torch.ones(size, dtype=torch.bool)} for size in ((4,), (2, 5), (3, 3, 4, 5), (1, 2, 3, 4, 5))]
    wrong += [{"mask": torch.ones(5)}]
    for change in wrong:
        with pytest.raises(ValueError, match="must"):
            ops.masked_softmax(**{**good, **change})
    for grad in (torch.randn(2, 3, 5, 4), good["scores"].double()):
        with pytest.raises(ValueError, match="must"):
            ops.masked_softmax_backward(grad, good["scores"], scale=1.0)


def test_compiled_checks_hold_without_the_python_face(compiled):
    op, scores = torch.ops.megactl.masked_softmax, torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="dimensions"):
        op(scores[0], None, 1.0, False)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(scores.transpose(2, 3), None, 1.0, False)
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 1, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="mask"):
            op(scores, mask, 1.0, False)
    with pytest.raises(RuntimeError, match="dimension 1"):
        op(scores, torch.ones(2, 2, 4, 5, dtype=torch.bool), 1.0, False)
    with pytest.raises(RuntimeError, match="grad"):
        torch.ops.megactl.masked_softmax_backward(scores.double(), scores, None, 1.0, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compiled, dtype):
    scores, mask = torch.randn(2, 3, 4, 5).to(dtype), torch.rand(2, 1, 1, 5) < 0.7
    torch.library.opcheck(torch.ops.megactl.masked_softmax_backward, (scores, scores, mask, 0.5, True))
    torch.library.opcheck(torch.ops.megactl.masked_softmax, (scores.requires_grad_(), mask, 0.5, False))
    torch.library.opcheck(torch.ops.megactl.masked_softmax, (scores, None, 0.5, True))


def test_torch_compile_in_one_graph(backend):
    mask = torch.rand(2, 1, 1, 8) < 0.7

    def function(scores):
        return ops.masked_softmax(scores * 2, scale=0.5, mask=mask.expand(2, 3, 4, 8), causal=True) * 3

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    scores = torch.randn(2, 3, 4, 8, requires_grad=True)
    expected, found = function(scores), traced(scores)
    # The reference is traced into other operators, which round elsewhere.
    torch.testing.assert_close(expected, found)
    one, other = (torch.autograd.grad(y.square().sum(), scores)[0] for y in (expected, found))
    torch.testing.assert_close(one, other)
