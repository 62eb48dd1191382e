"""dropout_add_rows: rows from anywhere keep what the whole tensor keeps, in every type, with gradients, compiled and in plain torch."""

from __future__ import annotations

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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 5, 8, 70, 1024])
def test_rows_in_any_order_equal_the_whole(backend, dtype, columns):
    """Samples 12 to 14 of eight positions; some of their rows, shuffled, one of them twice."""
    x, residual = torch.randn(3, 8, columns).to(dtype), torch.randn(3, 8, columns).to(dtype)
    whole = ops.dropout_add(x, residual, 0.25, rng(first_sample=12), 9).flatten(0, 1)
    taken = torch.tensor([[0, 1, 2, 3], [23, 22, 21, 5], [6, 7, 16, 6]])
    kept = ops.dropout_add_rows(x.flatten(0, 1)[taken], residual.flatten(0, 1)[taken], 0.25, rng(first_sample=99), 9, taken + 12 * 8)
    assert kept.is_contiguous() and torch.equal(kept, whole[taken])


def test_pieces_of_rows_equal_the_whole(backend):
    """A block of scores: with rows of a piece's length, the pieces of a row are rows themselves."""
    b, heads, s, piece = 2, 3, 8, 2
    scores = torch.rand(b, heads, s, s)
    whole = ops.dropout_add(scores, None, 0.4, rng(first_sample=5), 2, 4, 9)
    queries, pieces = torch.tensor([1, 2, 7]), torch.tensor([0, 3])
    sample, head = 5 + torch.arange(b)[:, None, None], 4 + torch.arange(heads)[:, None]
    rows = ((sample * 9 + head) * s + queries).unsqueeze(-1) * (s // piece) + pieces
    cut = scores[:, :, queries].unflatten(-1, (-1, piece))[..., pieces, :]
    expected = whole[:, :, queries].unflatten(-1, (-1, piece))[..., pieces, :]
    assert torch.equal(ops.dropout_add_rows(cut, None, 0.4, rng(), 2, rows), expected)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FLOATS), st.lists(st.integers(0, 2**40), min_size=1, max_size=6), st.integers(1, 70), st.booleans(), st.data())
def test_compiled_equals_the_reference(dtype, starts, columns, with_residual, data):
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None
    # Runs of neighbouring rows, which the CPU draws for together, between single ones.
    rows = torch.tensor([start + i for start in starts for i in range(data.draw(st.integers(1, 4)))])
    x, residual = torch.randn(len(rows), columns).to(dtype), torch.randn(len(rows), columns).to(dtype)
    arguments = (x, residual if with_residual else None, data.draw(st.floats(1e-9, 0.999)), rng(), 5, rows)
    assert torch.equal(torch.ops.megactl.dropout_add_rows(*arguments), reference.dropout_add_rows(*arguments))


def test_large_tensors_over_threads(compiled):
    x, residual, rows = torch.randn(3, 257, 129), torch.randn(3, 257, 129), torch.randperm(3 * 257).view(3, 257)
    arguments = (x, residual, 0.1, rng(), 1, rows)
    assert torch.equal(torch.ops.megactl.dropout_add_rows(*arguments), reference.dropout_add_rows(*arguments))


@pytest.mark.parametrize("with_residual", [True, False])
def test_gradients(backend, with_residual):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) if with_residual else None
    rows = torch.tensor([[4, 5, 9], [1, 0, 30]])

    def function(x, residual=None):
        return ops.dropout_add_rows(x, residual, 0.4, rng(), 3, rows)

    inputs = (x, residual) if with_residual else (x,)
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("changed", ["rng", "rows"])
def test_backward_refuses_what_was_changed(compiled, changed):
    state = {"rng": rng(), "rows": torch.arange(6).view(2, 3)}
    y = ops.dropout_add_rows(torch.randn(2, 3, 5, requires_grad=True), None, 0.4, site=3, **state)
    state[changed] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_to_drop_and_nothing_at_all(backend):
    x, residual, rows = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.arange(6).view(2, 3)
    assert ops.dropout_add_rows(x, None, 0.0, rng(), 0, rows) is x
    assert torch.equal(ops.dropout_add_rows(x, residual, 0.0, rng(), 0, rows), residual + x)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        empty = torch.empty(shape)
        assert ops.dropout_add_rows(empty, empty, 0.3, rng(), 1, torch.zeros(shape[:-1], dtype=torch.int64)).shape == shape


def test_inputs_that_are_not_contiguous(backend):
    x, rows = torch.randn(3, 2, 5).transpose(0, 1), torch.arange(6).view(3, 2).t()
    expected = ops.dropout_add_rows(x.contiguous(), None, 0.3, rng(), 1, rows.contiguous())
    assert torch.equal(ops.dropout_add_rows(x, None, 0.3, rng(), 1, rows), expected)


def test_refusals(backend):
    x, rows = torch.randn(2, 3, 4), torch.arange(6).view(2, 3)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="dropout probability"):
            ops.dropout_add_rows(x, None, p, rng(), 0, rows)
    wrong = [
        {"residual": torch.randn(2, 3, 5)},
        {"rng": rng().int()},
        {"rng": rng()[:2]},
        {"x": torch.randn(5), "rows": torch.arange(1)},
        {"x": torch.ones(2, 3, 4, dtype=torch.int64)},
        {"rows": rows.int()},
        {"rows": rows.flatten()},
        {"rows": rows[:1]},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="must"):
            ops.dropout_add_rows(**{"x": x, "residual": None, "p": 0.5, "rng": rng(), "site": 0, "rows": rows, **change})


def test_compiled_checks_hold_without_the_python_face(compiled):
    x, rows, op = torch.randn(2, 3, 4), torch.arange(6).view(2, 3), torch.ops.megactl.dropout_add_rows
    with pytest.raises(RuntimeError, match="one for each row"):
        op(x, None, 0.5, rng(), 0, rows[:1])
    with pytest.raises(RuntimeError, match="rows must be int64"):
        op(x, None, 0.5, rng(), 0, rows.int())
    with pytest.raises(RuntimeError, match="seed, step"):
        op(x, None, 0.5, rng()[:2], 0, rows)
    with pytest.raises(RuntimeError, match="contiguous"):
        op(x.transpose(1, 2), None, 0.5, rng(), 0, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(compiled, dtype):
    x = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True)
    residual, rows = torch.randn(2, 3, 5, dtype=dtype, requires_grad=True), torch.arange(6).view(2, 3)
    torch.library.opcheck(torch.ops.megactl.dropout_add_rows, (x, residual, 0.4, rng(), 3, rows))
    torch.library.opcheck(torch.ops.megactl.dropout_add_rows, (x, None, 0.4, rng(), 3, rows))


def test_torch_compile_in_one_graph(backend):
    rows = torch.tensor([[4, 5, 9], [1, 0, 30]])

    def function(x, state):
        return ops.dropout_add_rows(x * 2, None, 0.4, state, 3, rows) * 3

    traced, x = torch.compile(function, fullgraph=True, backend="aot_eager"), torch.randn(2, 3, 8, requires_grad=True)
    expected, y = function(x, rng()), traced(x, rng())
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(one.square().sum(), x)[0] for one in (y, expected)))
