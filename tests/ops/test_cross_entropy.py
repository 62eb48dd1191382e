"""The cross entropy operators against float64 arithmetic in plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from megactl.engine import ops
from megactl.engine.ops.reference import cross_entropy as reference

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# What the arithmetic may lose, relative to the norm of the result: a few units of the type it is done in.
STATISTICS = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 4e-7, torch.float16: 4e-7}
GRADIENT = {torch.float64: 1e-14, torch.float32: 6e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-6}
INF, NAN = float("inf"), float("nan")


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is right. Half of the type's smallest number an element is no error."""
    kind = torch.finfo(found.dtype)
    difference = (found.double() - right.double()).abs() - kind.smallest_normal * kind.eps / 2
    return (difference.clamp(min=0).norm() / right.double().norm().clamp(min=1e-30)).item()


def case(dtype: torch.dtype, rows: int, columns: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    return (spread * torch.randn(rows, columns)).to(dtype), torch.randint(columns, (rows,))


def expected(logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of sum(scale * loss), float64."""
    leaf = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(leaf[..., :rows], labels, reduction="none")
    (losses * scale.double()).sum().backward()
    return losses.detach(), leaf.grad


def poison(like: torch.Tensor) -> None:
    """Leave NaN in the memory that the next tensor of this size is likely to get."""
    torch.full_like(like, NAN)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["compiled", "torch"]), st.sampled_from(FLOATS), st.integers(1, 9), st.integers(1, 1200), st.integers(0, 40), st.data()
)
def test_against_float64(implementation, dtype, rows, held, padding, data):
    if implementation == "compiled" and ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert implementation == "torch" or ops.library.load() is None
    functions = torch.ops.megactl if implementation == "compiled" else reference
    logits, _ = case(dtype, rows, held + padding, data.draw(st.sampled_from([0.1, 3.0, 30.0])))
    logits[:, held:] = NAN
    first, labels = data.draw(st.integers(0, 1000)), torch.randint(held, (rows,))
    scale = torch.randn(rows, dtype=torch.promote_types(dtype, torch.float32))
    losses, gradient = expected(logits, labels, scale, held)
    maximum, total, target = functions.cross_entropy_forward(logits, labels + first, first, held)
    assert torch.equal(maximum, logits[:, :held].amax(-1).to(maximum.dtype))
    assert torch.equal(target, logits.gather(1, labels[:, None])[:, 0].to(target.dtype))
    assert error(total, (logits[:, :held].double() - maximum.double()[:, None]).exp().sum(-1)) < STATISTICS[dtype]
    # The total is 1 at least, so a loss near zero has an error of its own: that of the total's last bit.
    missed = ((total.log() - (target - maximum)).double() - losses).norm()
    assert missed < 2 * STATISTICS[dtype] * (losses.norm() + rows**0.5)
    poison(logits)
    found = functions.cross_entropy_backward(logits, labels + first, maximum, total, scale, first, held)
    assert found.dtype == dtype and not found[:, held:].any()
    assert error(found[:, :held], gradient[:, :held]) < GRADIENT[dtype]
    functions.cross_entropy_backward_(logits, labels + first, maximum, total, scale, first, held)
    assert torch.equal(logits, found)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [511, 512, 513, 5000])
def test_face_and_gradient(backend, dtype, columns):
    logits, labels = case(dtype, 6, columns)
    logits.requires_grad_()
    losses = ops.cross_entropy(logits.view(2, 3, columns), labels.view(2, 3))
    assert losses.shape == (2, 3)
    weights = torch.rand(2, 3).to(losses.dtype)
    (losses * weights).sum().backward()
    right, gradient = expected(logits, labels, weights.flatten(), columns)
    assert error(losses.detach().flatten(), right) < 2 * STATISTICS[dtype] and error(logits.grad, gradient) < GRADIENT[dtype]


def test_shards_combine_to_the_whole(backend):
    """As tensor parallelism does it, the last shard being padding alone."""
    logits, labels = case(torch.float64, 50, 37, 50.0)
    scale = torch.rand(50, dtype=torch.float64)
    losses, gradient = expected(logits, labels, scale, 37)
    shards = [(0, 20, 20), (20, 20, 17), (40, 20, 0)]
    padded = F.pad(logits, (0, 23), value=NAN)
    parts = [ops.cross_entropy_forward(padded[:, a : a + n], labels, a, rows) for a, n, rows in shards]
    maximum = torch.stack([top for top, _, _ in parts]).amax(0)
    total = sum(total * (top - maximum).exp() for top, total, _ in parts)
    target = sum(target for _, _, target in parts)
    torch.testing.assert_close(total.log() - (target - maximum), losses, rtol=1e-13, atol=1e-13)
    found = [ops.cross_entropy_backward(padded[:, a : a + n], labels, maximum, total, scale, a, rows) for a, n, rows in shards]
    torch.testing.assert_close(torch.cat(found, -1)[:, :37], gradient, rtol=1e-11, atol=1e-14)
    assert not torch.cat(found, -1)[:, 37:].any()


@pytest.mark.parametrize("label", [-1, -100, 7, 2**62, -(2**63), 2**63 - 1])
def test_labels_outside_read_nothing(backend, label):
    logits = torch.randn(3, 7)
    labels = torch.tensor([2, label, 6])
    for first in (0, 5):
        _, total, target = ops.cross_entropy_forward(logits, labels + first if 0 <= label < 9 else labels, first)
        assert target[1] == 0 and torch.isfinite(total).all()
    ones = torch.ones(3)
    maximum, total, _ = ops.cross_entropy_forward(logits, labels)
    found = ops.cross_entropy_backward(logits, labels, maximum, total, ones)
    torch.testing.assert_close(found[1], torch.softmax(logits[1], 0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_masked_token_has_no_gradient_whatever_its_logits(backend, dtype):
    logits, labels = case(dtype, 4, 700)
    logits[1], logits[2, 5] = NAN, INF
    maximum, total, _ = ops.cross_entropy_forward(logits, labels)
    scale = torch.tensor([1.0, 0.0, 0.0, -0.0], dtype=total.dtype)
    found = ops.cross_entropy_backward(logits, labels, maximum, total, scale)
    assert not found[1:].any() and found[0].abs().sum() > 0 and torch.isfinite(found[0]).all()


@pytest.mark.parametrize("place", [0, 3, 600, 1023])
def test_nan_and_infinity_reach_the_loss_as_in_torch(backend, place):
    for value in (NAN, INF, -INF):
        logits, labels = case(torch.float32, 2, 1024)
        labels[0] = (place + 1) % 1024
        logits[0, place] = value
        losses = ops.cross_entropy(logits, labels)
        torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"), equal_nan=True)
    logits = torch.full((1, 600), -INF)
    assert ops.cross_entropy(logits, torch.tensor([3])).isnan().all()
    logits[0, 599] = 2.0  # found in the last block; the first ones hold nothing
    assert ops.cross_entropy(logits, torch.tensor([599])).item() == 0.0


def test_minus_infinity_gets_a_gradient_of_zero(backend):
    logits = torch.randn(2, 600, requires_grad=True)
    masked = logits.masked_fill(torch.arange(600) % 3 == 0, -INF)
    masked.retain_grad()
    ops.cross_entropy(masked, torch.tensor([1, 2])).sum().backward()
    assert not masked.grad[:, ::3].any() and masked.grad[:, 1::3].all()


def test_large_logits_do_not_overflow(backend):
    for dtype, spread in ((torch.float32, 1e37), (torch.float16, 2e4), (torch.float64, 1e300)):
        logits, labels = case(torch.float64, 5, 70)
        logits = (logits.clamp(-3, 3) * spread).to(dtype)
        losses = ops.cross_entropy(logits, labels)
        assert torch.isfinite(losses).all()
        assert error(losses, F.cross_entropy(logits.double(), labels, reduction="none")) < 1e-6


def test_a_large_common_offset_costs_no_accuracy(backend):
    """With the log-sum rounded to float32, gradients at 8192 would be off by 5e-4."""
    logits = (torch.randn(4, 1000) * 16).round() / 16
    labels = torch.randint(1000, (4,))
    shifted = (logits + 8192.0).requires_grad_()
    _, gradient = expected(logits, labels, torch.ones(4), 1000)
    ops.cross_entropy(shifted, labels).sum().backward()
    assert error(shifted.grad, gradient) < 1e-6


def test_one_column_and_no_rows(backend):
    logits = torch.randn(3, 1, requires_grad=True)
    losses = ops.cross_entropy(logits, torch.zeros(3, dtype=torch.int64))
    losses.sum().backward()
    assert not losses.any() and not logits.grad.any()
    empty = torch.randn(0, 5, requires_grad=True)
    losses = ops.cross_entropy(empty, torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,) and empty.grad.shape == (0, 5)


def test_a_shard_without_rows(backend):
    logits, labels = torch.full((3, 8), NAN), torch.tensor([0, 1, 2])
    maximum, total, target = ops.cross_entropy_forward(logits, labels, 0, 0)
    assert (maximum == -INF).all() and not total.any() and not target.any()
    found = ops.cross_entropy_backward(logits, labels, torch.ones(3), torch.ones(3), torch.ones(3), 0, 0)
    assert not found.any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_views_that_are_not_aligned_or_not_contiguous(backend, dtype):
    base, labels = torch.randn(1 + 5 * 999).to(dtype), torch.randint(999, (5,))
    view = base[1:].view(5, 999)
    right = ops.cross_entropy(view.clone(), labels)
    assert torch.equal(ops.cross_entropy(view, labels), right)
    wide = torch.full((5, 2000), NAN, dtype=dtype)
    wide[:, ::2][:, :999] = view
    leaf = wide.requires_grad_()
    losses = ops.cross_entropy(leaf[:, ::2][:, :999], labels)
    assert torch.equal(losses, right)
    losses.sum().backward()
    assert torch.equal(leaf.grad[:, ::2].any(0), torch.arange(1000) < 999) and not leaf.grad[:, 1::2].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_give_the_same_bits(compiled, dtype):
    logits, labels = case(dtype, 301, 777)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            maximum, total, target = ops.cross_entropy_forward(logits, labels)
            found.append((maximum, total, target, ops.cross_entropy_backward(logits, labels, maximum, total, torch.ones_like(total))))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_gradcheck(backend):
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, torch.tensor([0, 12, 8, 3]), 1, 8), logits)


def test_a_second_derivative_is_refused(compiled):
    logits = torch.randn(2, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.cross_entropy(logits, torch.tensor([1, 2])).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="MEGACTL_OPS=torch"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(compiled, dtype):
    logits, labels = case(dtype, 3, 20)
    names = torch.ops.megactl
    torch.library.opcheck(names.cross_entropy, (logits.clone().requires_grad_(), labels, 0, 17))
    torch.library.opcheck(names.cross_entropy_forward, (logits, labels, 2, 17))
    maximum, total, _ = names.cross_entropy_forward(logits, labels, 2, 17)
    rest = (labels, maximum, total, torch.rand_like(total), 2, 17)
    torch.library.opcheck(names.cross_entropy_backward, (logits, *rest))
    torch.library.opcheck(names.cross_entropy_backward_, (logits.clone(), *rest))


def test_torch_compile_in_one_graph(backend):
    def function(x, labels):
        return ops.cross_entropy(x * 2, labels, 0, 40) * 3

    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, labels = case(torch.float32, 6, 44)
    x.requires_grad_()
    expected_losses, losses = function(x, labels), traced(x, labels)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-6, atol=0)
    one, other = (torch.autograd.grad(y.square().sum(), x)[0] for y in (losses, expected_losses))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_refusals(backend):
    logits, labels = case(torch.float32, 3, 5)
    row = torch.ones(3)
    wrong = [
        (logits.long(), labels, 0, 5),
        (logits, labels.int(), 0, 5),
        (logits, labels[:2], 0, 5),
        (logits, labels, -1, 5),
        (logits, labels, 0, 6),
        (logits, labels, 0, -1),
    ]
    for arguments in wrong:
        for function in (ops.cross_entropy, ops.cross_entropy_forward):
            with pytest.raises(ValueError, match="must"):
                function(*arguments)
    for change in ({"maximum": row.double()}, {"total": row[:2]}, {"scale": row.bfloat16()}):
        with pytest.raises(ValueError, match="must"):
            ops.cross_entropy_backward(logits, labels, **{"maximum": row, "total": row, "scale": row, **change})
    with pytest.raises(ValueError, match="contiguous"):
        ops.cross_entropy_backward_(torch.randn(5, 3).t(), labels, row, row, row)


def test_compiled_checks_hold_without_the_python_face(compiled):
    logits, labels = case(torch.float32, 3, 5)
    row, names = torch.ones(3), torch.ops.megactl
    wrong = {"contiguous": (logits.t(), labels, 0, 3), "labels": (logits, labels[:2], 0, 5), "num_rows": (logits, labels, 0, 6)}
    for named, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=named):
            names.cross_entropy_forward(*arguments)
    with pytest.raises(RuntimeError, match="total"):
        names.cross_entropy_backward(logits, labels, row, row.double(), row, 0, 5)
