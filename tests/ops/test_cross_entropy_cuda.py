"""Cross entropy on CUDA: against float64 on the CPU, the same bits in every run, replayable from a captured graph."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megactl.engine import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATISTICS = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7}
GRADIENT = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 1e-6}
INF, NAN = float("inf"), float("nan")


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    right = right.double()
    return ((found.cpu().double() - right).norm() / right.norm().clamp(min=1e-30)).item()


def check(logits: torch.Tensor, labels: torch.Tensor, held: int, first: int = 0) -> None:
    """Forward and backward of `logits` (on the CPU) as they come out on the device, odd places of memory included."""
    dtype, (rows, columns) = logits.dtype, logits.shape
    scale = torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32))
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf[:, :held], labels, reduction="none")
    (losses * scale.double()).sum().backward()
    for offset in (0, 1):
        base = torch.full((rows * columns + offset,), NAN, dtype=dtype, device="cuda")
        mine = base[offset:].view(rows, columns)
        mine.copy_(logits)
        where, on = (labels + first).cuda(), scale.cuda()
        maximum, total, target = ops.cross_entropy_forward(mine, where, first, held)
        assert torch.equal(maximum.cpu(), logits[:, :held].amax(-1).to(maximum.dtype))
        assert torch.equal(target.cpu(), logits.gather(1, labels[:, None])[:, 0].to(target.dtype))
        assert error(total.log() - (target - maximum), losses.detach()) < 2 * STATISTICS[dtype]
        assert error(ops.cross_entropy(mine, where, first, held), losses.detach()) < 2 * STATISTICS[dtype]
        torch.full_like(mine, NAN)
        found = ops.cross_entropy_backward(mine, where, maximum, total, on, first, held)
        assert error(found[:, :held], leaf.grad[:, :held]) < GRADIENT[dtype] and not found[:, held:].any()
        ops.cross_entropy_backward_(mine, where, maximum, total, on, first, held)
        assert torch.equal(mine, found)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "held", "padding"), [(1, 1, 0), (5, 7, 2), (33, 1000, 24), (3, 1025, 6), (17, 4097, 0), (9, 50257, 47)])
def test_against_float64_on_the_cpu(compiled, dtype, rows, held, padding):
    torch.manual_seed(rows)
    for spread in (0.5, 20.0):
        logits = (spread * torch.randn(rows, held + padding)).to(dtype)
        logits[:, held:] = NAN
        check(logits, torch.randint(held, (rows,)), held, first=3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_infinity_masks_and_labels_outside(compiled, dtype):
    logits = torch.randn(6, 3000).to(dtype)
    logits[0, 17], logits[1, 2999], logits[2, 5], logits[3] = NAN, INF, -INF, -INF
    labels = torch.tensor([1, 2, 3, 4, -(2**63), 3000])
    on, where = logits.cuda(), labels.cuda()
    for row, (one, other) in enumerate(zip(ops.cross_entropy(on, where).cpu(), ops.cross_entropy(logits, labels), strict=True)):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=2e-6, atol=1e-6, msg=str(row))
    maximum, total, target = ops.cross_entropy_forward(on, where)
    assert not target[4:].any()
    scale = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=total.dtype, device="cuda")
    found = ops.cross_entropy_backward(on, where, maximum, total, scale).cpu()
    assert not found[:2].any() and not found[3].any() and found[2, 5] == 0 and torch.isfinite(found).all()
    torch.testing.assert_close(found[4].double(), torch.softmax(logits[4].double(), 0), rtol=1e-2, atol=1e-6)


def test_shards_without_rows_and_empty_batches(compiled):
    logits, labels = torch.full((3, 100), NAN, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
    maximum, total, target = ops.cross_entropy_forward(logits, labels, 0, 0)
    assert (maximum == -INF).all() and not total.any() and not target.any()
    ones = torch.ones(3, device="cuda")
    assert not ops.cross_entropy_backward(logits, labels, ones, ones, ones, 0, 0).any()
    empty = torch.randn(0, 5, device="cuda", requires_grad=True)
    ops.cross_entropy(empty, torch.zeros(0, dtype=torch.int64, device="cuda")).sum().backward()
    assert empty.grad.shape == (0, 5)


def test_the_shape_of_gpt_345m_every_run_alike(compiled):
    logits = 3 * torch.randn(4096, 50304, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(50257, (4096,), device="cuda")
    runs = []
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        losses = ops.cross_entropy(leaf, labels, 0, 50257)
        losses.sum().backward()
        runs.append((losses.detach(), leaf.grad))
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))
    leaf = logits[:512, :50257].double().requires_grad_()
    right = F.cross_entropy(leaf, labels[:512], reduction="none")
    right.sum().backward()
    assert error(runs[0][0][:512], right.detach().cpu()) < 1e-6
    assert error(runs[0][1][:512, :50257], leaf.grad.cpu()) < 2**-8 and not runs[0][1][:, 50257:].any()


def test_more_than_2_to_31_logits(compiled):
    rows, columns = 43_000, 50_304
    logits = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
    labels = torch.full((rows,), 7, device="cuda")
    logits[-1, 7] = 11.0
    losses = ops.cross_entropy(logits, labels)
    maximum, total, _ = ops.cross_entropy_forward(logits, labels)
    ops.cross_entropy_backward_(logits, labels, maximum, total, torch.ones_like(total))
    right = torch.log(torch.exp(torch.tensor(11.0).double()) + columns - 1) - 11
    torch.testing.assert_close(losses[-1].cpu().double(), right, rtol=1e-5, atol=1e-6)
    assert (losses[:-1] - losses[0]).abs().max() == 0 and (logits[:, 7] < 0).all() and (logits[-1, 8:] > 0).all()


def test_a_captured_graph_replays_with_new_values(compiled):
    logits = torch.randn(64, 5003, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(5003, (64,), device="cuda")
    scale = torch.rand(64, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        maximum, total, target = ops.cross_entropy_forward(logits, labels)
        return maximum, total, target, ops.cross_entropy_backward(logits, labels, maximum, total, scale)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        logits.normal_()
        labels.random_(0, 5003)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


def test_opcheck_and_compile_on_the_device(compiled):
    logits = torch.randn(5, 90, device="cuda", requires_grad=True)
    labels = torch.randint(90, (5,), device="cuda")
    torch.library.opcheck(torch.ops.megactl.cross_entropy, (logits, labels, 0, 90))

    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.cross_entropy(x * 2, labels).sum()

    (one,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(logits), logits)
    (other,) = torch.autograd.grad(function(logits), logits)
    torch.testing.assert_close(one, other)
