"""The CUDA kernels against the CPU ones: the same words, the same elements kept, the same initial weights."""

from __future__ import annotations

import pytest
import torch

from megactl.engine import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(("first", "n"), [(0, 4), (3, 1000), (2**40 + 1, 100_003)])
def test_words(compiled, first, n):
    drawn = [torch.full((n,), -1, device=device) for device in ("cpu", "cuda")]
    for out in drawn:
        ops.philox_bits_(out, first_element=first, seed=2**45 + 7, stream=5, step=6)
    assert torch.equal(drawn[0], drawn[1].cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "rectangle", [[(0, 5), (0, 13), (0, 10)], [(1, 4), (2, 9), (3, 8)], [(4, 5), (0, 13), (0, 10)], [(2, 2), (0, 13), (0, 10)]]
)
def test_normal_is_the_same_bit_for_bit(compiled, dtype, rectangle):
    drawn = [torch.full([b - a for a, b in rectangle], float("nan"), dtype=dtype, device=device) for device in ("cpu", "cuda")]
    for out in drawn:
        ops.normal_(out, logical_shape=(5, 13, 10), rectangle=rectangle, seed=9, stream=8, std=0.02)
    assert torch.equal(drawn[0], drawn[1].cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 3, 5), (3, 129, 1), (1, 1, 1), (70_000, 1, 8), (2, 64, 16, 24)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_dropout_is_the_same_bit_for_bit(compiled, dtype, shape, with_residual):
    x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.clone().to(device).requires_grad_()  # a clone: on the CPU .to() returns x itself
        state = torch.tensor([2**40 + 1, 7, 12], device=device)
        y = ops.dropout_add(leaf, residual.to(device) if with_residual else None, 0.3, state, 4, 5, shape[1] + 9)
        y.backward(grad.to(device))
        results.append((y.detach().cpu(), leaf.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 5, 8, 64, 1021, 1024])
@pytest.mark.parametrize("with_residual", [True, False])
def test_dropout_of_rows_is_the_same_bit_for_bit(compiled, dtype, columns, with_residual):
    x, residual, grad = (torch.randn(7, 33, columns).to(dtype) for _ in range(3))
    rows = torch.randint(0, 2**40, (7, 33))
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.clone().to(device).requires_grad_()
        state = torch.tensor([2**40 + 1, 7, 12], device=device)
        y = ops.dropout_add_rows(leaf, residual.to(device) if with_residual else None, 0.3, state, 4, rows.to(device))
        y.backward(grad.to(device))
        results.append((y.detach().cpu(), leaf.grad.cpu()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_dropout_on_views_that_are_not_aligned(compiled):
    base = torch.randn(1 + 2 * 3 * 64)
    x = base[1:].view(2, 3, 64)
    expected = ops.dropout_add(x, x, 0.3, torch.tensor([1, 2, 3]), 4)
    moved = base.cuda()[1:].view(2, 3, 64)
    assert torch.equal(ops.dropout_add(moved, moved, 0.3, torch.tensor([1, 2, 3], device="cuda"), 4).cpu(), expected)


@pytest.mark.parametrize("n", [1, 1001, 1 << 20])
@pytest.mark.parametrize(
    ("dtype", "low"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, None),
        (torch.float64, torch.float32),
    ],
)
def test_adamw(compiled, n, dtype, low):
    start = {"master": torch.randn(n, dtype=dtype), "grad": torch.randn(n, dtype=dtype), "exp_avg": torch.randn(n, dtype=dtype)}
    start["exp_avg_sq"] = torch.rand(n, dtype=dtype)
    results = []
    for device in ("cpu", "cuda"):
        tensors = {name: tensor.to(device, copy=True) for name, tensor in start.items()}
        param = tensors["master"] if low is None else torch.full((n,), float("nan"), dtype=low, device=device)
        for step in (1.0, 2.0):
            values = {"lr": 1e-3, "step": step, "grad_scale": 0.5, "skip": 0.0}
            ops.adamw_(param, **tensors, **{k: torch.tensor(v, dtype=dtype, device=device) for k, v in values.items()}, **SETTINGS)
        results.append([param.cpu(), *(tensor.cpu() for tensor in tensors.values())])
    for one, other in zip(*results, strict=True):
        # pow may differ in its last bit between the two, and 1 - beta^step makes that larger; the update is 1e-3 of a weight.
        eps = torch.finfo(one.dtype).eps
        torch.testing.assert_close(other, one, rtol=2 * eps, atol=eps * 0.1)


def test_adamw_skips_on_the_device(compiled):
    master, grad, average, square = (torch.rand(1001, device="cuda") for _ in range(4))
    before = [tensor.clone() for tensor in (master, average, square)]
    values = {"lr": 1e-3, "step": 1.0, "grad_scale": 1.0, "skip": 1.0}
    scalars = {k: torch.tensor(v, device="cuda") for k, v in values.items()}
    ops.adamw_(master, master, grad * float("nan"), average, square, **scalars, **SETTINGS)
    assert all(torch.equal(one, other) for one, other in zip(before, (master, average, square), strict=True))


def test_a_captured_graph_replays_with_new_values(compiled):
    """Step, sample and learning rate are read on the device, so one graph serves every step."""
    x, state = torch.randn(4, 8, 64, device="cuda"), torch.tensor([1, 1, 0], device="cuda")
    master, grad, average, square = (torch.rand(1024, device="cuda") for _ in range(4))
    scalars = {
        name: torch.tensor(value, device="cuda") for name, value in {"lr": 1e-3, "step": 1.0, "grad_scale": 1.0, "skip": 0.0}.items()
    }

    def step() -> torch.Tensor:
        ops.adamw_(master, master, grad, average, square, **scalars, **SETTINGS)
        return ops.dropout_add(x, x, 0.2, state, 3)

    saved = [tensor.clone() for tensor in (master, average, square)]
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for tensor, value in zip((master, average, square), saved, strict=True):
        tensor.copy_(value)
    for count in (2, 5):
        state[1] = count
        scalars["step"].fill_(float(count))
        expected = [tensor.clone() for tensor in (master, average, square)]
        ops.adamw_(expected[0], expected[0], grad, *expected[1:], **scalars, **SETTINGS)
        graph.replay()
        assert torch.equal(y, ops.dropout_add(x, x, 0.2, state.clone(), 3))
        assert all(torch.equal(one, other) for one, other in zip(expected, (master, average, square), strict=True))


def test_fake_tensors_and_opcheck_on_the_device(compiled):
    x = torch.randn(2, 3, 5, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.megactl.dropout_add, (x, x, 0.4, torch.tensor([1, 2, 3], device="cuda"), 3, 0, 0))
