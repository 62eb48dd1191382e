"""rotary_qkv and its backward against rotations of complex numbers in float64, on the compiled operators and on the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
Shape = tuple[int, int, int, int, int, int]  # batch, positions, groups, heads of a group, width, turned pairs


def draw(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """qkv, cos and sin; the angles are any, not those of positions."""
    b, s, g, r, d, half = shape
    angles = 100 * torch.rand(b, s, half)
    return torch.randn(b, s, g, r + 2, d).to(dtype), angles.cos(), angles.sin()


def exact(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """By the definition: pair i is a complex number, multiplied by cos + i sin."""
    wide, half = qkv.double(), cos.shape[-1]
    heads, rest = wide[..., :-1, : 2 * half], wide[..., :-1, 2 * half :]
    pairs = torch.complex(heads[..., :half], heads[..., half:]) * torch.complex(cos.double(), sin.double())[:, :, None, None]
    turned = torch.cat([pairs.real, pairs.imag, rest], -1)
    return turned[:, :, :, :-1].flatten(2, 3), turned[:, :, :, -1], wide[:, :, :, -1]


def gradients(grads: tuple[torch.Tensor, ...], qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = qkv.double().requires_grad_()
    return torch.autograd.grad(exact(x, cos, sin), x, [grad.double() for grad in grads])[0]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-2))


def poison(size: int) -> None:
    """Leave NaN in the memory that the next tensors are likely to get."""
    for part in (size, size // 2, size // 3, size // 4):
        torch.full((part,), float("nan"))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FLOATS), st.tuples(*(st.integers(1, 4) for _ in range(4)), st.integers(1, 70)), st.data(), st.integers(0, 10**6),
)  # fmt: skip
def test_compiled_equals_the_definition(dtype, sizes, data, seed):
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None
    torch.manual_seed(seed)
    shape = (*sizes[:4], 2 * sizes[4], data.draw(st.integers(1, sizes[4])))
    qkv, cos, sin = draw(shape, dtype)
    poison(qkv.numel())
    found = torch.ops.megactl.rotary_qkv(qkv, cos, sin)
    for one, other in zip(found, exact(qkv, cos, sin), strict=True):
        assert error(one, other) < BOUND[dtype]
    grads = tuple(torch.randn(one.shape).to(dtype) for one in found)
    poison(qkv.numel())
    assert error(torch.ops.megactl.rotary_qkv_backward(*grads, cos, sin), gradients(grads, qkv, cos, sin)) < BOUND[dtype]


SHAPES = [(1, 1, 1, 1, 2, 1), (2, 3, 2, 4, 64, 32), (2, 5, 3, 1, 48, 6), (1, 7, 1, 8, 34, 17), (1, 2, 1, 1, 4098, 2049)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(backend, dtype, shape):
    qkv, cos, sin = draw(shape, dtype)
    b, s, g, r, d, _ = shape
    found = ops.rotary_qkv(qkv, cos, sin)
    assert [tuple(one.shape) for one in found] == [(b, s, g * r, d), (b, s, g, d), (b, s, g, d)]
    for one, other in zip(found, exact(qkv, cos, sin), strict=True):
        assert one.dtype == dtype and one.is_contiguous() and error(one, other) < BOUND[dtype]
    grads = tuple(torch.randn(one.shape).to(dtype) for one in found)
    back = ops.rotary_qkv_backward(*grads, cos, sin)
    assert back.shape == qkv.shape and back.dtype == dtype and error(back, gradients(grads, qkv, cos, sin)) < BOUND[dtype]


def test_values_and_what_is_not_turned_keep_their_bits(backend):
    qkv, cos, sin = draw((2, 3, 2, 2, 16, 4), torch.bfloat16)
    q, k, v = ops.rotary_qkv(qkv, cos, sin)
    assert torch.equal(v, qkv[..., -1, :])
    assert torch.equal(q[..., 8:].unflatten(2, (2, 2)), qkv[..., :2, 8:]) and torch.equal(k[..., 8:], qkv[..., 2, 8:])


def test_backward_turns_back(backend):
    """A rotation's transpose is its inverse: backward of what forward gave is what it was given."""
    qkv, cos, sin = draw((2, 3, 2, 3, 32, 16), torch.float64)
    assert error(ops.rotary_qkv_backward(*ops.rotary_qkv(qkv, cos, sin), cos, sin), qkv) < 1e-7


def test_strided_gradients_need_no_copy(backend):
    """Attention gives gradients [b, n, s, d] transposed, or parts of one tensor."""
    qkv, cos, sin = draw((2, 5, 2, 3, 8, 4), torch.float32)
    grads = tuple(torch.randn_like(one) for one in ops.rotary_qkv(qkv, cos, sin))
    expected = ops.rotary_qkv_backward(*grads, cos, sin)
    transposed = tuple(grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads)
    assert torch.equal(ops.rotary_qkv_backward(*transposed, cos, sin), expected)
    parts = torch.cat(grads, 2).split((6, 2, 2), 2)
    assert torch.equal(ops.rotary_qkv_backward(*parts, cos, sin), expected)
    spread = tuple(torch.stack([grad, grad], -1)[..., 0] for grad in grads)
    assert torch.equal(ops.rotary_qkv_backward(*spread, cos, sin), expected)


def test_views_that_are_not_contiguous_or_aligned(backend):
    qkv, cos, sin = draw((2, 3, 2, 2, 8, 4), torch.float32)
    expected = ops.rotary_qkv(qkv, cos, sin)
    for dense in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape),
    ):
        found = ops.rotary_qkv(dense(qkv), dense(cos), dense(sin))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_threads_do_not_change_a_bit(compiled):
    for dtype in FLOATS:
        qkv, cos, sin = draw((3, 50, 2, 3, 64, 24), dtype)
        results, before = [], torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = ops.rotary_qkv(qkv, cos, sin)
            results.append([*found, ops.rotary_qkv_backward(*found, cos, sin)])
        torch.set_num_threads(before)
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_gradients_of_autograd(backend):
    qkv, cos, sin = draw((2, 3, 2, 2, 6, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.rotary_qkv(x, cos, sin), (qkv.requires_grad_(),))


def test_results_that_nobody_used_have_no_gradient(backend):
    qkv, cos, sin = draw((1, 3, 2, 2, 4, 2), torch.float64)
    _, keys, _ = ops.rotary_qkv(qkv.requires_grad_(), cos, sin)
    (grad,) = torch.autograd.grad(keys.sum(), qkv)
    assert grad[..., 2, :].any() and not grad[..., :2, :].any() and not grad[..., 3, :].any()


def test_a_second_derivative_is_refused(compiled):
    qkv, cos, sin = draw((1, 2, 1, 1, 4, 2), torch.float32)
    (first,) = torch.autograd.grad(ops.rotary_qkv(qkv.requires_grad_(), cos, sin)[0].square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


def test_empty(backend):
    for shape in ((0, 3, 2, 1, 4, 2), (2, 0, 2, 1, 4, 2)):
        qkv, cos, sin = draw(shape, torch.float32)
        found = ops.rotary_qkv(qkv, cos, sin)
        assert found[0].shape == (*shape[:2], 2, 4) and ops.rotary_qkv_backward(*found, cos, sin).shape == qkv.shape


def test_refusals(backend):
    qkv, cos, sin = draw((2, 3, 2, 1, 8, 4), torch.float32)
    for wrong in (qkv[0], qkv[..., :2, :], qkv[..., :7], qkv.int()):
        with pytest.raises(ValueError, match=r"qkv is .*must be"):
            ops.rotary_qkv(wrong, cos, sin)
    for bad_cos, bad_sin in ((cos.double(), sin), (cos, sin[..., :2]), (cos[:1], sin[:1]), (torch.randn(2, 3, 5), torch.randn(2, 3, 5))):
        with pytest.raises(ValueError, match=r"(cos|sin) is .*must be"):
            ops.rotary_qkv(qkv, bad_cos, bad_sin)
    q, k, v = ops.rotary_qkv(qkv, cos, sin)
    for grads in ((q[:, :2], k, v), (q, k[..., :4], v), (q[:, :, :1], k, v), (q.double(), k, v), (q, k, v[:, :, :1])):
        with pytest.raises(ValueError, match="must be"):
            ops.rotary_qkv_backward(*grads, cos, sin)


def test_compiled_checks_hold_without_the_python_face(compiled):
    qkv, cos, sin = draw((2, 3, 2, 1, 8, 4), torch.float32)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.megactl.rotary_qkv(qkv.transpose(0, 1), cos, sin)
    with pytest.raises(RuntimeError, match="at least 1 and d even"):
        torch.ops.megactl.rotary_qkv(qkv[..., :2, :].contiguous(), cos, sin)
    with pytest.raises(RuntimeError, match="cos and sin must be"):
        torch.ops.megactl.rotary_qkv(qkv, cos, sin[..., :2].contiguous())
    q, k, v = ops.rotary_qkv(qkv, cos, sin)
    with pytest.raises(RuntimeError, match="alike but for their heads"):
        torch.ops.megactl.rotary_qkv_backward(q[:, :2], k, v, cos, sin)
    with pytest.raises(RuntimeError, match="rows must be contiguous"):
        torch.ops.megactl.rotary_qkv_backward(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, cos, sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compiled, dtype):
    qkv, cos, sin = draw((2, 3, 2, 2, 8, 3), dtype)
    torch.library.opcheck(torch.ops.megactl.rotary_qkv_backward, (*ops.rotary_qkv(qkv, cos, sin), cos, sin))
    torch.library.opcheck(torch.ops.megactl.rotary_qkv, (qkv.requires_grad_(), cos, sin))


def test_torch_compile_in_one_graph(backend):
    qkv, cos, sin = draw((2, 3, 2, 2, 8, 4), torch.float32)

    def function(x):
        q, k, v = ops.rotary_qkv(x * 2, cos, sin)
        return q.sum(2) * k[:, :, 0] + v[:, :, 1]

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    qkv.requires_grad_()
    expected, found = function(qkv), traced(qkv)
    torch.testing.assert_close(expected, found)
    one, other = (torch.autograd.grad(y.square().sum(), qkv)[0] for y in (expected, found))
    torch.testing.assert_close(one, other)
