"""squared_norm, scale_ and clip_gradients_ over lists of tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops
from megactl.engine.ops.reference import gradients as reference

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 0, 7, 8192, 8193, 100_000, 0, 31, 0]


def exact(tensors) -> float:
    """The sum of squares by fsum, rounded once at the end (squares of float64 aside)."""
    return math.fsum(value * value for tensor in tensors for value in tensor.double().flatten().tolist())


def mixed(sizes=SIZES) -> list[torch.Tensor]:
    return [torch.randn(n).to(FLOATS[i % 4]) for i, n in enumerate(sizes)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(FLOATS)), min_size=1, max_size=9))
def test_squared_norm_of_any_list(shapes):
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None
    tensors = [torch.randn(n).to(dtype) for n, dtype in shapes]
    right = exact(tensors)
    for function in (torch.ops.megactl.squared_norm, reference.squared_norm):
        found = function(tensors)
        assert found.dtype == torch.float64 and found.shape == ()
        assert abs(found.item() - right) <= 1e-14 * right


@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_norm_of_many_elements(backend, dtype):
    """torch's own float32 norm is 7e-5 off here."""
    tensor = torch.rand(2_000_003).to(dtype)
    assert abs(ops.squared_norm([tensor]).item() / exact([tensor]) - 1) < 1e-13


def test_squares_that_float32_cannot_hold(backend):
    tensors = [torch.tensor([3e38, -3e38]), torch.tensor([1e-30])]
    torch.testing.assert_close(ops.squared_norm(tensors), 2 * tensors[0][0].double() ** 2)
    assert torch.isfinite(ops.squared_norm(tensors))


def test_nan_and_infinity_show(backend):
    for value in (float("nan"), float("inf")):
        tensors = mixed()
        tensors[5][77_777] = value
        assert not torch.isfinite(ops.squared_norm(tensors))


def test_threads_and_repeats_give_the_same_bits(compiled):
    tensors = mixed([300_001, 5, 70_000, 123_456])
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(ops.squared_norm(tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("factor", [torch.tensor(0.37), torch.tensor(0.37, dtype=torch.float64), torch.tensor(0.0)])
def test_scale(backend, factor):
    tensors = mixed()
    right = [(t.to(torch.promote_types(t.dtype, torch.float32)) * factor).to(t.dtype) for t in tensors]
    ops.scale_(tensors, factor)
    assert all(torch.equal(one, other) for one, other in zip(tensors, right, strict=True))


def test_scale_touches_the_views_alone(backend):
    buffer = torch.ones(1000)
    ops.scale_([buffer[3:10], buffer[20:20], buffer[501:999]], torch.tensor(2.0))
    right = torch.ones(1000)
    right[3:10] = right[501:999] = 2
    assert torch.equal(buffer, right)


def test_a_factor_of_one_touches_no_bit(backend):
    """Not even the payload of a NaN, which a product with 1 may change."""
    tensor = torch.tensor([0x7F800001, 0x7FC12345, 1, 0x3F800000], dtype=torch.int32).view(torch.float32)
    before = tensor.view(torch.int32).clone()
    ops.scale_([tensor], torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(tensor.view(torch.int32), before)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clip_equals_torch(backend, max_norm):
    tensors = [torch.randn(n) for n in SIZES]
    parameters = [torch.nn.Parameter(torch.empty_like(t)) for t in tensors]
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.grad = tensor.double().clone().float()
    before = [t.clone() for t in tensors]
    theirs = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = ops.clip_gradients_(tensors, max_norm)
    assert norm.dtype == torch.float64 and norm.shape == ()
    torch.testing.assert_close(norm.float(), theirs, rtol=1e-5, atol=0)
    for tensor, parameter, old in zip(tensors, parameters, before, strict=True):
        torch.testing.assert_close(tensor, parameter.grad, rtol=1e-5, atol=1e-9)
        assert max_norm < 1 or torch.equal(tensor, old)
    assert max_norm > 1 or abs(ops.squared_norm(tensors).sqrt().item() - max_norm) < 1e-5


def test_clip_of_a_norm_that_is_not_finite(backend):
    tensors = [torch.tensor([1.0, float("nan")]), torch.ones(3)]
    assert ops.clip_gradients_(tensors, 1.0).isnan() and tensors[1].isnan().all()
    tensors = [torch.tensor([1.0, float("inf")]), torch.ones(3)]
    assert ops.clip_gradients_(tensors, 1.0).isinf() and not tensors[1].any() and tensors[0][1].isnan()


def test_list_opcheck(compiled):
    torch.library.opcheck(torch.ops.megactl.squared_norm, (mixed([3, 5]),))
    torch.library.opcheck(torch.ops.megactl.scale_, (mixed([3, 5]), torch.tensor(0.5)))


def test_torch_compile_in_one_graph(backend):
    def function(tensors):
        return ops.clip_gradients_(tensors, 0.1) * 2

    one, other = [torch.randn(30), torch.randn(7)], None
    other = [t.clone() for t in one]
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(one), function(other))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_list_refusals(backend):
    good = torch.ones(4)
    for tensors in ([], [good, torch.ones(8)[::2]], [good, good.long()], [good, torch.ones(4, device="meta")]):
        for function in (ops.squared_norm, lambda t: ops.scale_(t, torch.tensor(1.0)), lambda t: ops.clip_gradients_(t, 1.0)):
            with pytest.raises(ValueError, match="must"):
                function(tensors)
    for factor in (torch.ones(1), torch.tensor(1), torch.tensor(1.0).half()):
        with pytest.raises(ValueError, match="factor"):
            ops.scale_([good], factor)
    for max_norm in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm"):
            ops.clip_gradients_([good], max_norm)


def test_list_checks_hold_without_the_python_face(compiled):
    for tensors, named in (([], "empty"), ([torch.ones(8)[::2]], "contiguous"), ([torch.ones(3).long()], "dtype")):
        with pytest.raises(RuntimeError, match=named):
            torch.ops.megactl.squared_norm(tensors)
    with pytest.raises(RuntimeError, match="factor"):
        torch.ops.megactl.scale_([torch.ones(3)], torch.ones(2))
