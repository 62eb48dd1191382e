"""bias_gelu and its backward against the definition in float64, on the compiled operators and on the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMS = ["tanh", "none"]
# Relative norm of an error: some units in the last place of the arithmetic, or half of one of a rounded result.
BOUND = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def exact(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """The definition, written so that it does not cancel."""
    v = x.double() + bias.double()
    if approximate == "none":
        return v * 0.5 * torch.erfc(v * -math.sqrt(0.5))
    return v * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))


def gradients(grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, approximate: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, bias = x.double().requires_grad_(), bias.double().requires_grad_()
    return torch.autograd.grad(exact(x, bias, approximate), (x, bias), grad.double())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, but for tensors of a few tiny numbers, which float16 cannot hold as well."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-2))


def poison(*sizes: int) -> None:
    """Leave NaN in the memory that the next tensors are likely to get."""
    for size in sizes:
        torch.full((size,), float("nan"))


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (2 * torch.randn(shape)).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)


def need_compiled() -> None:
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(FLOATS), st.sampled_from(FORMS), st.lists(st.integers(1, 9), max_size=2), st.integers(1, 1100), st.integers(0, 10**6)
)
def test_compiled_equals_the_definition(dtype, approximate, outer, columns, seed):
    need_compiled()
    torch.manual_seed(seed)
    x, bias, grad = draw((*outer, columns), dtype)
    tanh = approximate == "tanh"
    poison(x.numel(), x.numel() // 2, columns)
    assert error(torch.ops.megactl.bias_gelu(x, bias, tanh), exact(x, bias, approximate)) < BOUND[dtype]
    grad_x, grad_bias = torch.ops.megactl.bias_gelu_backward(grad, x, bias, tanh)
    expected_x, expected_bias = gradients(grad, x, bias, approximate)
    # The slope crosses 0 near -0.75, so the size that counts is that of grad.
    assert float((grad_x - expected_x).norm() / grad.double().norm().clamp_min(1e-2)) < BOUND[dtype]
    assert grad_bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((grad_bias - expected_bias).norm() / grad.double().norm().clamp_min(1e-2)) < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 4, 17), (70, 33), (1030, 1025)])
def test_definition(backend, dtype, approximate, shape):
    x, bias, grad = draw(shape, dtype)
    assert error(ops.bias_gelu(x, bias, approximate), exact(x, bias, approximate)) < BOUND[dtype]
    grad_x, grad_bias = ops.bias_gelu_backward(grad, x, bias, approximate)
    expected_x, expected_bias = gradients(grad, x, bias, approximate)
    assert grad_x.dtype == dtype and error(grad_x, expected_x) < BOUND[dtype]
    # The sum is of gradients that were not rounded to the dtype yet.
    assert error(grad_bias, expected_bias) < (1e-13 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("approximate", FORMS)
def test_tails_keep_their_relative_accuracy(compiled, approximate):
    x = torch.linspace(-12, 12, 30_001)[:, None]
    for dtype, near, far in ((torch.float32, 2e-6, 2e-5), (torch.float64, 1e-14, 2e-13)):
        y, expected = ops.bias_gelu(x.to(dtype), torch.zeros(1, dtype=dtype), approximate), exact(x, torch.zeros(1), approximate)
        relative = ((y.double() - expected) / expected).abs()
        small = (x.abs() < 3) & (x != 0)
        assert relative[small].max() < near
        # Beyond this, results are smaller than float32's least normal number.
        assert relative[(expected.abs() > 1e-36) & (x != 0)].max() < far


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("approximate", FORMS)
def test_special_numbers_as_in_torch(backend, dtype, approximate):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 300.0, -300.0, 6e4, -6e4]).to(dtype)
    # In float64: torch's vectorised exact GELU of infinity is NaN in some dtypes.
    expected = torch.nn.functional.gelu(x.double(), approximate=approximate)
    y, known = ops.bias_gelu(x, torch.zeros(9, dtype=dtype), approximate).double(), torch.ones(9, dtype=torch.bool)
    known[1] = backend == "compiled" or approximate == "tanh"
    assert torch.equal(y.isnan()[known], expected.isnan()[known])
    assert torch.equal(y.nan_to_num()[known], expected.nan_to_num()[known])
    slopes = ops.bias_gelu_backward(torch.ones(9, dtype=dtype), x, torch.zeros(9, dtype=dtype), approximate)[0]
    assert slopes[0].isnan() and torch.equal(slopes[5:], torch.tensor([1.0, 0.0, 1.0, 0.0]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_runs_agree_with_torch(compiled, dtype):
    """Far to the right GELU is the identity and its slope is 1: what is left are the conversions, bit for bit."""
    halves = torch.arange(-(2**15), 2**15 - 5).to(torch.int16).view(dtype)  # not a multiple of a vector
    grad_x, grad_bias = ops.bias_gelu_backward(halves[None], torch.full_like(halves, 100.0)[None], torch.zeros_like(halves))
    assert ((grad_x[0].view(torch.int16) == halves.view(torch.int16)) | (grad_x[0].isnan() & halves.isnan())).all()
    assert ((grad_bias == halves.float()) | (grad_bias.isnan() & halves.isnan())).all()
    x, bias = (100 + 900 * torch.rand(40, 777)).to(dtype), (0.1 + 100 * torch.rand(777)).to(dtype)
    assert torch.equal(ops.bias_gelu(x, bias), (x.float() + bias.float()).to(dtype))


def test_threads_do_not_change_a_bit(compiled):
    for dtype in FLOATS:
        x, bias, grad = draw((257, 1031), dtype)
        results, before = [], torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([ops.bias_gelu(x, bias), *ops.bias_gelu_backward(grad, x, bias)])
        torch.set_num_threads(before)
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_views_that_are_not_contiguous_or_aligned(backend):
    x, bias, grad = draw((6, 40), torch.float32)
    expected = [ops.bias_gelu(x, bias), *ops.bias_gelu_backward(grad, x, bias)]
    for dense in (lambda t: t.t().contiguous().t(), lambda t: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape)):
        found = [ops.bias_gelu(dense(x), bias), *ops.bias_gelu_backward(dense(grad), dense(x), bias)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    spread = torch.stack([bias, bias], 1)[:, 0]
    assert not spread.is_contiguous() and torch.equal(ops.bias_gelu(x, spread), expected[0])


def test_column_sums_of_many_rows_stay_accurate(compiled):
    """A chain of float32 additions over so many rows would be off by far more."""
    x, bias, grad = torch.randn(60_000, 3), torch.randn(3), 1.0 + torch.rand(60_000, 3)
    _, grad_bias = ops.bias_gelu_backward(grad, x, bias)
    expected = gradients(grad, x, bias, "tanh")[1]
    assert error(grad_bias, expected) < 1e-6


@pytest.mark.parametrize("approximate", FORMS)
def test_gradients_of_autograd(backend, approximate):
    x, bias, _ = draw((3, 5, 7), torch.float64)
    inputs = (x.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, bias: ops.bias_gelu(x, bias, approximate), inputs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_autograd_gives_each_input_its_own_dtype(backend, dtype):
    x, bias, grad = draw((4, 50), dtype)
    x.requires_grad_(), bias.requires_grad_()
    grads = torch.autograd.grad(ops.bias_gelu(x, bias, "none"), (x, bias), grad)
    assert all(one.dtype == dtype for one in grads)
    assert all(
        error(one, other) < BOUND[dtype] for one, other in zip(grads, gradients(grad, x.detach(), bias.detach(), "none"), strict=True)
    )
    assert not ops.bias_gelu_forward(x, bias).requires_grad


def test_a_second_derivative_is_refused(compiled):
    x, bias, _ = draw((3, 4), torch.float32)
    (first,) = torch.autograd.grad(ops.bias_gelu(x.requires_grad_(), bias).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


def test_empty_gelu(backend):
    for shape in ((0, 5), (3, 0), (0,)):
        x, bias = torch.empty(shape), torch.empty(shape[-1])
        assert ops.bias_gelu(x, bias).shape == shape
        grad_x, grad_bias = ops.bias_gelu_backward(x, x, bias)
        assert grad_x.shape == shape and torch.equal(grad_bias, torch.zeros(shape[-1]))


def test_refusals(backend):
    good = {"x": torch.randn(2, 3), "bias": torch.randn(3)}
    wrong = [{"bias": torch.randn(2)}, {"bias": torch.randn(1, 3)}, {"bias": torch.randn(3).double()}, {"approximate": "erf"}]
    wrong += [{"x": torch.ones(2, 3, dtype=torch.int64)}, {"x": torch.tensor(1.0)}]
    for change in wrong:
        with pytest.raises(ValueError, match="must"):
            ops.bias_gelu(**{**good, **change})
    for grad in (torch.randn(3, 2), torch.randn(2, 3).double()):
        with pytest.raises(ValueError, match="must"):
            ops.bias_gelu_backward(grad, **good)


def test_compiled_checks_hold_without_the_python_face(compiled):
    x, bias = torch.randn(4, 3), torch.randn(3)
    for wrong in (torch.randn(4), torch.randn(3, 1), bias.double(), torch.randn(6)[::2]):
        with pytest.raises(RuntimeError, match="bias"):
            torch.ops.megactl.bias_gelu(x, wrong, True)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.megactl.bias_gelu(torch.randn(3, 4).t(), bias, True)
    with pytest.raises(RuntimeError, match="grad"):
        torch.ops.megactl.bias_gelu_backward(torch.randn(3, 3), x, bias, True)
    with pytest.raises(RuntimeError, match="float64, float32"):
        torch.ops.megactl.bias_gelu(x.int(), bias.int(), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compiled, dtype):
    x, bias, grad = draw((3, 5), dtype)
    torch.library.opcheck(torch.ops.megactl.bias_gelu_backward, (grad, x, bias, True))
    torch.library.opcheck(torch.ops.megactl.bias_gelu, (x.requires_grad_(), bias.requires_grad_(), False))


def test_torch_compile_in_one_graph(backend):
    def function(x, bias):
        return ops.bias_gelu(x * 2, bias, "none") * 3

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, bias, _ = draw((4, 8), torch.float32)
    x.requires_grad_(), bias.requires_grad_()
    expected, found = function(x, bias), traced(x, bias)
    # The reference is traced into other operators, which round elsewhere.
    torch.testing.assert_close(expected, found)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (x, bias)) for y in (expected, found)), strict=True):
        torch.testing.assert_close(one, other)
