"""dropout_add: which elements are kept, the arithmetic, the gradients, and what torch.compile makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops
from megactl.engine.ops.reference import random as reference
from megactl.errors import ConfigError

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rng(step: int = 3, first_sample: int = 0, seed: int = 2**33 + 1) -> torch.Tensor:
    return torch.tensor([seed, step, first_sample])


def drop_bits(element: int, n: int, *, seed: int, site: int, step: int) -> torch.Tensor:
    """32 bits an element: above, half of word e >> 1 of the site's stream, below, the same half of the stream for ties."""
    words = {stream: torch.empty(n // 2 + 1, dtype=torch.int64) for stream in (site, site + 2**31)}
    for stream, out in words.items():
        ops.philox_bits_(out, first_element=element >> 1, seed=seed, stream=stream, step=step)
    places = [(e // 2 - element // 2, 16 * (e % 2)) for e in range(element, element + n)]
    halves = {stream: [int(out[word]) >> shift & 0xFFFF for word, shift in places] for stream, out in words.items()}
    return torch.tensor([upper << 16 | lower for upper, lower in zip(halves[site], halves[site + 2**31], strict=True)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_definition(backend, dtype):
    """Element by element from the words, as the formula in the docstring says."""
    x, residual = torch.randn(2, 3, 5, 2).to(dtype), torch.randn(2, 3, 5, 2).to(dtype)
    p, offset, size, first = 0.3, 4, 11, 7
    y = ops.dropout_add(x, residual, p, rng(first_sample=first), 6, offset, size)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for b in range(2):
        for o in range(3):
            bits = drop_bits(((first + b) * size + offset + o) * 10, 10, seed=2**33 + 1, site=6, step=3)
            kept = torch.where(bits >= math.floor(p * 2**32), x[b, o].reshape(-1).to(compute) * (1 / (1 - p)), 0)
            assert torch.equal(y[b, o].reshape(-1), (residual[b, o].reshape(-1).to(compute) + kept).to(dtype))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLOATS), st.integers(1, 3), st.integers(1, 5), st.integers(1, 70), st.booleans(), st.integers(0, 2**40), st.data())
def test_compiled_equals_the_reference(dtype, batch, outer, inner, with_residual, first_sample, data):
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None
    offset = data.draw(st.integers(0, 4))
    size = outer + offset + data.draw(st.integers(0, 4))
    p = data.draw(st.floats(1e-9, 0.999))
    x, residual = torch.randn(batch, outer, inner).to(dtype), torch.randn(batch, outer, inner).to(dtype)
    arguments = (x, residual if with_residual else None, p, rng(first_sample=first_sample), 5, offset, size)
    y = torch.ops.megactl.dropout_add(*arguments)
    assert y.is_contiguous() and torch.equal(y, reference.dropout_add(*arguments))


def test_large_tensors_over_threads(compiled):
    x, residual = torch.randn(3, 257, 129), torch.randn(3, 257, 129)
    arguments = (x, residual, 0.1, rng(), 1, 0, 0)
    assert torch.equal(torch.ops.megactl.dropout_add(*arguments), reference.dropout_add(*arguments))


def test_a_probability_below_the_first_16_bits_is_honoured(backend):
    """Whether an element goes is then decided by the second 16 bits alone; an odd length shifts the halves."""
    x, p = torch.ones(1, 2047, 1023), 2.0**-17
    dropped = ops.dropout_add(x, None, p, rng(), 1) == 0
    assert torch.equal(dropped, reference.dropout_add(x, None, p, rng(), 1, 0, 0) == 0)
    assert dropped.sum() > 0 and abs(dropped.sum() - p * x.numel()) < 5 * math.sqrt(p * x.numel())


def test_every_layout_keeps_the_same_elements(backend):
    """Data parallelism cuts samples, sequence parallelism positions; together they must drop what one process drops."""
    x, residual = torch.randn(6, 8, 10), torch.randn(6, 8, 10)
    whole = ops.dropout_add(x, residual, 0.25, rng(first_sample=12), 9)
    for samples in (slice(0, 2), slice(2, 6)):
        for positions in (slice(0, 4), slice(4, 8), slice(3, 7)):
            part = ops.dropout_add(
                x[samples, positions], residual[samples, positions], 0.25, rng(first_sample=12 + samples.start), 9, positions.start, 8
            )
            assert torch.equal(part, whole[samples, positions])


def test_a_range_of_rows_keeps_the_same_elements_across_samples(backend):
    """Sequence parallelism cuts the flattened [batch, positions] anywhere, also where a cut or a whole sample lies inside."""
    x, residual = torch.randn(5, 8, 10), torch.randn(5, 8, 10)
    whole = ops.dropout_add(x, residual, 0.25, rng(first_sample=12), 9).view(40, 10)
    for first, stop in ((0, 10), (10, 20), (13, 31), (20, 40), (39, 40)):
        part, added = (tensor.view(1, 40, 10)[:, first:stop].clone().requires_grad_() for tensor in (x, residual))
        y = ops.dropout_add(part, added, 0.25, rng(first_sample=12), 9, first, 8)
        assert torch.equal(y[0], whole[first:stop])
        y.sum().backward()
        assert torch.equal(part.grad[0] != 0, whole[first:stop] != residual.view(40, 10)[first:stop])


def test_share_kept_and_independence(backend):
    x = torch.ones(4, 100, 500)
    masks = [ops.dropout_add(x, None, 0.2, rng(step=step), site) != 0 for step, site in ((1, 1), (1, 2), (2, 1))]
    sigma = math.sqrt(0.2 * 0.8 / x.numel())
    for mask in masks:
        assert abs(mask.float().mean() - 0.8) < 5 * sigma
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[one] & masks[other]).float().mean() - 0.64) < 5 * math.sqrt(0.64 * 0.36 / x.numel())
    assert torch.equal(ops.dropout_add(x, None, 0.2, rng(step=1), 1) != 0, masks[0])


def test_p_zero_is_free_and_exact(backend):
    x, residual = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert ops.dropout_add(x, None, 0.0, rng(), 0) is x
    assert torch.equal(ops.dropout_add(x, residual, 0.0, rng(), 0), residual + x)


def test_dropped_values_do_not_spoil_the_result(backend):
    x = torch.full((1, 50, 50), float("inf"))
    y = ops.dropout_add(x, torch.zeros_like(x), 0.5, rng(), 0)
    assert not y.isnan().any() and (y == 0).any() and y.isinf().any()


@pytest.mark.parametrize("with_residual", [True, False])
def test_gradients(backend, with_residual):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) if with_residual else None
    inputs = (x, residual) if with_residual else (x,)

    def function(x, residual=None):
        return ops.dropout_add(x, residual, 0.4, rng(), 3, 1, 6)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradient_only_where_it_is_wanted_and_for_expanded_gradients(backend):
    x, residual = torch.randn(2, 3, 5), torch.randn(2, 3, 5, requires_grad=True)
    ops.dropout_add(x, residual, 0.4, rng(), 3).sum().backward()  # sum's gradient is expanded, hence not contiguous
    assert torch.equal(residual.grad, torch.ones_like(residual)) and x.grad is None
    x.requires_grad_()
    y = ops.dropout_add(x, None, 0.4, rng(), 3)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y != 0, torch.tensor(1 / 0.6), torch.tensor(0.0)))


def test_backward_refuses_a_generator_that_was_changed(compiled):
    state = rng()
    x = torch.randn(2, 3, 5, requires_grad=True)
    y = ops.dropout_add(x, None, 0.4, state, 3)
    state[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inputs_that_are_not_contiguous(backend):
    x, residual = torch.randn(3, 2, 5).transpose(0, 1), torch.randn(5, 3, 2).permute(2, 1, 0)
    expected = ops.dropout_add(x.clone(memory_format=torch.contiguous_format), residual.contiguous(), 0.3, rng(), 1)
    assert torch.equal(ops.dropout_add(x, residual, 0.3, rng(), 1), expected)


def test_empty_batches(backend):
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert ops.dropout_add(torch.empty(shape), torch.empty(shape), 0.3, rng(), 1).shape == shape


def test_refusals(backend):
    x = torch.randn(2, 3, 4)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="dropout probability"):
            ops.dropout_add(x, None, p, rng(), 0)
    wrong = [
        {"residual": torch.randn(2, 3, 5)},
        {"residual": x.double()},
        {"rng": rng().int()},
        {"rng": rng()[:2]},
        {"x": torch.randn(5)},
        {"x": torch.ones(2, 3, 4, dtype=torch.int64)},
        {"outer_offset": 1},
        {"outer_offset": 2, "outer_size": 4},
        {"outer_offset": -1, "outer_size": 9},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="must"):
            ops.dropout_add(**{"x": x, "residual": None, "p": 0.5, "rng": rng(), "site": 0, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compiled, dtype):
    x = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    residual = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.megactl.dropout_add, (x, residual, 0.4, rng(), 3, 0, 0))
    torch.library.opcheck(torch.ops.megactl.dropout_add, (x, None, 0.4, rng(), 3, 2, 9))


def test_torch_compile_in_one_graph(backend):
    def function(x, residual, state):
        return ops.dropout_add(x * 2, residual, 0.4, state, 3) * 3

    # aot_eager traces forward and backward as every backend does, without the C++ compiler a later backend stage needs.
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    for state in (rng(), rng(step=4, first_sample=8)):
        x, residual = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
        expected = function(x, residual, state)
        gradients = torch.autograd.grad(expected.square().sum(), (x, residual))
        y = traced(x, residual, state)
        assert torch.equal(y, expected)
        for one, other in zip(torch.autograd.grad(y.square().sum(), (x, residual)), gradients, strict=True):
            assert torch.equal(one, other)


def test_compiled_checks_hold_without_the_python_face(compiled):
    x, op = torch.randn(2, 3, 4), torch.ops.megactl.dropout_add
    with pytest.raises(RuntimeError, match="outer"):
        op(x, None, 0.5, rng(), 0, 2, 4)
    with pytest.raises(RuntimeError, match="outer"):
        op(x[:1], None, 0.5, rng(), 0, -1, 4)
    with pytest.raises(RuntimeError, match="elements"):
        op(x, torch.randn(2, 3, 3), 0.5, rng(), 0, 0, 0)
    with pytest.raises(RuntimeError, match="seed, step"):
        op(x, None, 0.5, torch.zeros(2, dtype=torch.int64), 0, 0, 0)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(x.transpose(1, 2), None, 0.5, rng(), 0, 0, 0)
