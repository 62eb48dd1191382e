"""swiglu and its backward against the definition in float64, on the compiled operators and on the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative norm of an error: some units in the last place of the arithmetic, or half of one of a rounded result.
BOUND = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def exact(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x = x.double().requires_grad_()
    return torch.autograd.grad(exact(x), x, grad.double())[0]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, but for tensors of a few tiny numbers, which float16 cannot hold as well."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-2))


def poison(*sizes: int) -> None:
    """Leave NaN in the memory that the next tensors are likely to get."""
    for size in sizes:
        torch.full((size,), float("nan"))


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., 2f] and grad [..., f] for a shape [..., f]."""
    return (2 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype), torch.randn(shape).to(dtype)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(FLOATS), st.lists(st.integers(1, 9), max_size=2), st.integers(1, 1100), st.integers(0, 10**6))
def test_compiled_equals_the_definition(dtype, outer, columns, seed):
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None
    torch.manual_seed(seed)
    x, grad = draw((*outer, columns), dtype)
    poison(grad.numel(), x.numel())
    assert error(torch.ops.megactl.swiglu(x), exact(x)) < BOUND[dtype]
    assert error(torch.ops.megactl.swiglu_backward(grad, x), gradient(grad, x)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 4, 17), (70, 33), (1030, 1025)])
def test_definition(backend, dtype, shape):
    x, grad = draw(shape, dtype)
    y, grad_x = ops.swiglu(x), ops.swiglu_backward(grad, x)
    assert (y.shape, y.dtype, grad_x.shape, grad_x.dtype) == (shape, dtype, x.shape, dtype)
    assert error(y, exact(x)) < BOUND[dtype]
    assert error(grad_x, gradient(grad, x)) < BOUND[dtype]


def test_far_out_it_keeps_its_relative_accuracy(compiled):
    gate = torch.linspace(-80, 80, 30_001)[:, None]
    for dtype, bound in ((torch.float32, 2e-5), (torch.float64, 2e-13)):
        x = torch.cat([gate, torch.ones_like(gate)], -1).to(dtype)
        known = gate != 0
        assert ((ops.swiglu(x) - exact(x)) / exact(x))[known].abs().max() < bound


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_numbers_as_in_torch(backend, dtype):
    gate = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 300.0, -300.0, 6e4, -6e4]).to(dtype)
    x = torch.stack([gate, torch.ones_like(gate)], -1)
    expected = torch.nn.functional.silu(gate)
    y = ops.swiglu(x)[:, 0]
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y.double().nan_to_num(), expected.double().nan_to_num(), rtol=1e-5, atol=1e-30)
    slopes = ops.swiglu_backward(torch.ones(8, 1, dtype=dtype), x)[:, 0]
    assert slopes[0].isnan()
    torch.testing.assert_close(slopes[2:].double(), torch.tensor([0.5, 0.5, 1.0, 0.0, 1.0, 0.0]).double(), rtol=0, atol=1e-100)


def test_threads_do_not_change_a_bit(compiled):
    for dtype in FLOATS:
        x, grad = draw((257, 1031), dtype)
        results, before = [], torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([ops.swiglu(x), ops.swiglu_backward(grad, x)])
        torch.set_num_threads(before)
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_views_that_are_not_contiguous_or_aligned(backend):
    x, grad = draw((6, 20), torch.float32)
    expected = [ops.swiglu(x), ops.swiglu_backward(grad, x)]
    for dense in (lambda t: t.t().contiguous().t(), lambda t: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape)):
        found = [ops.swiglu(dense(x)), ops.swiglu_backward(dense(grad), dense(x))]
        for one, other in zip(found, expected, strict=True):
            # torch's own functions take other instructions for tensors that are not aligned.
            torch.testing.assert_close(one, other, rtol=0 if backend == "compiled" else 1e-6, atol=0)


def test_gradients_of_autograd(backend):
    x, _ = draw((3, 5, 7), torch.float64)
    assert torch.autograd.gradcheck(ops.swiglu, (x.requires_grad_(),))


def test_a_second_derivative_is_refused(compiled):
    x, _ = draw((3, 4), torch.float32)
    (first,) = torch.autograd.grad(ops.swiglu(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


def test_empty(backend):
    for shape in ((0, 6), (3, 0), (0,)):
        x = torch.empty(shape)
        grad = torch.empty(*shape[:-1], shape[-1] // 2)
        assert ops.swiglu(x).shape == grad.shape and ops.swiglu_backward(grad, x).shape == shape


def test_refusals(backend):
    for wrong in (torch.randn(2, 3), torch.ones(2, 4, dtype=torch.int64), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="gate and up"):
            ops.swiglu(wrong)
    for grad in (torch.randn(2, 4), torch.randn(2, 2).double(), torch.randn(4, 1)):
        with pytest.raises(ValueError, match="must be"):
            ops.swiglu_backward(grad, torch.randn(2, 4))


def test_compiled_checks_hold_without_the_python_face(compiled):
    x = torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="gate and up"):
        torch.ops.megactl.swiglu(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.megactl.swiglu(torch.randn(6, 4).t())
    with pytest.raises(RuntimeError, match="grad"):
        torch.ops.megactl.swiglu_backward(torch.randn(4, 6), x)
    with pytest.raises(RuntimeError, match="float64, float32"):
        torch.ops.megactl.swiglu(x.int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compiled, dtype):
    x, grad = draw((3, 5), dtype)
    torch.library.opcheck(torch.ops.megactl.swiglu_backward, (grad, x))
    torch.library.opcheck(torch.ops.megactl.swiglu, (x.requires_grad_(),))


def test_torch_compile_in_one_graph(backend):
    def function(x):
        return ops.swiglu(x * 2) * 3

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = draw((4, 8), torch.float32)[0].requires_grad_()
    expected, found = function(x), traced(x)
    torch.testing.assert_close(expected, found)
    one, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (expected, found))
    torch.testing.assert_close(one, other)
