"""The hand-written backward of every operation that owns weights, against torch's autograd and against finite differences."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from megactl.engine import functional  # noqa: E402

B, S, IN, OUT, ROWS = 2, 5, 6, 7, 11
IDS = torch.tensor([[3, 3, 0, 10, 3], [7, 0, 3, 10, 10]])


def tensors(*shapes, dtype=torch.float64):
    """Random leaves that want gradients."""
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def layer_norm(x, weight, bias, **options):
    return functional.layer_norm(x, weight, bias, 1e-5, **options)


def embedding(weight, **options):
    return functional.embedding(IDS, weight, **options)


# name: (the function, the same in plain torch, shapes of the inputs, which of them are weights)
CASES = {
    "linear": (functional.linear, F.linear, [(B, S, IN), (OUT, IN), (OUT,)], (1, 2)),
    "linear without bias": (functional.linear, F.linear, [(B, S, IN), (OUT, IN)], (1,)),
    "linear of a matrix": (functional.linear, F.linear, [(S, IN), (OUT, IN), (OUT,)], (1, 2)),
    "add_bias": (functional.add_bias, torch.add, [(B, S, IN), (IN,)], (1,)),
    "layer_norm": (layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-5), [(B, S, IN), (IN,), (IN,)], (1, 2)),
    "embedding": (embedding, lambda w: F.embedding(IDS, w), [(ROWS, IN)], (0,)),
}


def expected(name, inputs, upstream):
    """(output, gradients) by plain torch, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = CASES[name][1](*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, upstream.double())


@pytest.mark.parametrize("name", CASES)
def test_plain_mode_equals_autograd(name):
    function, _, shapes, _ = CASES[name]
    inputs = tensors(*shapes)
    y = function(*inputs)
    upstream = torch.randn_like(y)
    plain, gradients = expected(name, inputs, upstream)
    torch.testing.assert_close(y, plain, rtol=1e-14, atol=1e-14)
    for found, right in zip(torch.autograd.grad(y, inputs, upstream), gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_plain_mode_passes_gradcheck(name):
    function, _, shapes, _ = CASES[name]
    assert torch.autograd.gradcheck(function, tensors(*shapes))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_main_grad_is_overwritten_or_added_to(name, accumulate):
    function, _, shapes, weights = CASES[name]
    inputs = tensors(*shapes)
    # NaN where the first micro-batch of a step overwrites: any element that was only added to, or left, would stay NaN.
    before = {i: torch.randn(shapes[i], dtype=torch.float64) if accumulate else torch.full(shapes[i], torch.nan) for i in weights}
    for i in weights:
        inputs[i].main_grad = before[i].double().clone()
    y = function(*inputs, accumulate=accumulate)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    _, gradients = expected(name, inputs, upstream)
    for i, right in enumerate(gradients):
        if i not in weights:
            torch.testing.assert_close(inputs[i].grad, right, rtol=1e-12, atol=1e-13)
            continue
        assert inputs[i].grad is None
        torch.testing.assert_close(inputs[i].main_grad, right + before[i] if accumulate else right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_bf16_with_an_fp32_main_grad(name, accumulate):
    function, _, shapes, weights = CASES[name]
    inputs = tensors(*shapes, dtype=torch.bfloat16)
    before = {i: torch.randn(shapes[i]) if accumulate else torch.full(shapes[i], torch.nan) for i in weights}
    for i in weights:
        inputs[i].main_grad = before[i].clone()
    y = function(*inputs, accumulate=accumulate)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    _, gradients = expected(name, inputs, upstream)
    for i in weights:
        right = gradients[i] + (before[i].double() if accumulate else 0.0)
        # bf16 rounds by up to 2^-9. On the CPU torch's LayerNorm also keeps mean and 1 / deviation in bf16.
        limit = 2**-6 if name == "layer_norm" else 2**-8
        error = (inputs[i].main_grad.double() - right).abs().max()
        assert inputs[i].main_grad.dtype == torch.float32 and error <= limit * gradients[i].abs().max()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", ["add_bias", "embedding", "linear"])
def test_sums_over_tokens_are_made_in_the_main_type(name, accumulate):
    """4099 gradients of 1: added up in bf16 they would stop at 256, rounded to bf16 they would be 4096."""
    count = 4099
    ones = torch.ones(count, 1, dtype=torch.bfloat16)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    if name == "embedding":
        parameter = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    parameter.main_grad = torch.zeros(parameter.shape)
    if name == "embedding":
        y = functional.embedding(torch.zeros(count, dtype=torch.int64), parameter, accumulate=accumulate)
    elif name == "linear":
        y = functional.linear(ones, nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16)), parameter, accumulate=accumulate)
    else:
        y = functional.add_bias(ones, parameter, accumulate=accumulate)
    y.backward(torch.ones_like(y))
    assert parameter.main_grad.item() == count


def test_a_linear_that_only_its_weight_needs():
    x, (weight,) = torch.randn(S, IN, dtype=torch.float64), tensors((OUT, IN))
    functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(OUT, IN))


def test_the_input_gradient_travels_while_the_weight_gradient_is_computed(monkeypatch):
    events = []

    class Doubled:
        def __init__(self, grad):
            self.grad = grad

        def wait(self):
            events.append("wait")
            self.grad.mul_(2)

    def start(grad):
        events.append("start")
        return Doubled(grad)

    real = functional.weight_gradient
    monkeypatch.setattr(functional, "weight_gradient", lambda *args: events.append("weight") or real(*args))
    x, weight = tensors((S, IN), (OUT, IN))
    functional.linear(x, weight, start_reduce=start).sum().backward()
    assert events == ["start", "weight", "wait"]
    torch.testing.assert_close(x.grad, 2 * weight.detach().sum(0).expand(S, IN))
    x.grad = None
    functional.linear(x, weight, start_reduce=lambda grad: None).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(S, IN))


def test_embedding_shards_add_up_to_the_whole():
    (whole,) = tensors((12, IN))
    shards = [nn.Parameter(whole.detach()[a : a + 4].clone()) for a in (0, 4, 8)]
    upstream = torch.randn(B, S, IN, dtype=torch.float64)
    parts = [functional.embedding(IDS, shard, first_row=4 * i) for i, shard in enumerate(shards)]
    assert torch.equal(sum(parts), functional.embedding(IDS, whole))
    functional.embedding(IDS, whole).backward(upstream)
    for i, part in enumerate(parts):
        part.backward(upstream)
        torch.testing.assert_close(shards[i].grad, whole.grad[4 * i : 4 * i + 4], rtol=1e-13, atol=1e-14)


def test_embedding_gradient_is_the_same_in_every_run():
    (weight,) = tensors((3, 64), dtype=torch.float32)
    ids, upstream = torch.randint(3, (500,)), torch.randn(500, 64)
    found = [torch.autograd.grad(functional.embedding(ids, weight), weight, upstream)[0] for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_tied_weight_gets_both_gradients():
    """The head's backward comes first and overwrites, the embedding's adds: as in a model that holds both."""
    (weight,) = tensors((ROWS, IN))
    labels, mask = IDS.roll(-1, 1), torch.ones(B, S, dtype=torch.float64)

    def loss(tied, *, accumulate_in_embedding):
        x = functional.embedding(IDS, tied, accumulate=accumulate_in_embedding)
        return functional.cross_entropy_sum(functional.linear(torch.tanh(x), tied), labels, mask)

    loss(weight, accumulate_in_embedding=False).backward()
    right = weight.grad
    plain = weight.detach().clone().requires_grad_()
    logits = F.linear(torch.tanh(F.embedding(IDS, plain)), plain)
    F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    torch.testing.assert_close(right, plain.grad, rtol=1e-12, atol=1e-13)
    weight.grad, weight.main_grad = None, torch.full_like(weight, torch.nan)
    loss(weight, accumulate_in_embedding=True).backward()
    torch.testing.assert_close(weight.main_grad.detach(), right, rtol=1e-12, atol=1e-13)


def reference_loss(logits, labels, mask, rows):
    losses = F.cross_entropy(logits[..., :rows].flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum()


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_equals_autograd(padding, scale):
    """Masked tokens, padded columns full of NaN, and logits whose exponential overflows."""
    logits = scale * torch.randn(B, S, ROWS + padding, dtype=torch.float64)
    logits[..., ROWS:] = torch.nan
    mask = torch.tensor([[1, 0, 1, 0.5, 1], [0, 0, 1, 1, 2]], dtype=torch.float64)
    mine, plain = (logits.clone().requires_grad_() for _ in range(2))
    found, right = functional.cross_entropy_sum(mine, IDS, mask, num_rows=ROWS), reference_loss(plain, IDS, mask, ROWS)
    torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)
    (3 * found).backward()
    (3 * right).backward()
    torch.testing.assert_close(mine.grad[..., :ROWS], plain.grad[..., :ROWS], rtol=1e-11, atol=1e-13)
    assert not mine.grad[..., ROWS:].any() and not mine.grad[0, 1].any()


def test_cross_entropy_gradient_by_finite_differences():
    logits, mask = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
    labels = torch.tensor([[2, 0, 3]])
    functional.cross_entropy_sum(logits, labels, mask).backward()
    step = 1e-6
    for index in range(logits.numel()):
        moved = torch.zeros(logits.numel(), dtype=torch.float64).index_fill(0, torch.tensor(index), step).view_as(logits)
        up, down = (functional.cross_entropy_sum(logits.detach() + sign * moved, labels, mask) for sign in (1, -1))
        assert abs((up - down).item() / (2 * step) - logits.grad.flatten()[index].item()) < 1e-8


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32():
    logits = torch.randn(B, S, ROWS).bfloat16().requires_grad_()
    plain, mask = logits.detach().double().requires_grad_(), torch.ones(B, S)
    found = functional.cross_entropy_sum(logits, IDS, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference_loss(plain, IDS, mask, ROWS), rtol=1e-6, atol=0)
    found.backward()
    reference_loss(plain, IDS, mask, ROWS).backward()
    assert logits.grad.dtype == torch.bfloat16
    assert torch.equal(logits.grad, plain.grad.float().bfloat16()) or (logits.grad - plain.grad).abs().max() < 2**-8


def test_cross_entropy_writes_its_gradient_over_logits_where_it_may():
    """And autograd says so where another operation saved them."""
    x, labels, mask = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([[2, 0, 3]]), torch.ones(1, 3)
    found = []
    for overwrite in (True, False):
        logits = 2 * x
        before = logits.detach().clone()
        loss = functional.cross_entropy_sum(logits, labels, mask, overwrite=overwrite)
        found += torch.autograd.grad(loss, logits)
        assert (found[-1].data_ptr() == logits.data_ptr()) is overwrite and torch.equal(logits.detach(), before) is not overwrite
    assert torch.equal(found[0], found[1])
    logits = 2 * x
    squares = logits.square().sum()  # backward runs from the last to the first
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + functional.cross_entropy_sum(logits, labels, mask, overwrite=True)).backward()
    leaf = (2 * x).detach().requires_grad_()
    functional.cross_entropy_sum(leaf, labels, mask, overwrite=True).backward()
    assert torch.equal(leaf.detach(), 2 * x) and leaf.grad.abs().sum() > 0


def test_cross_entropy_refuses_a_second_backward():
    """The first one may write over the logits; a second one would be wrong without a word."""
    logits = torch.randn(1, 2, 4, requires_grad=True)
    loss = functional.cross_entropy_sum(logits, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Shards:
    """The reductions over vocabulary shards, whose ranks are threads of this process."""

    def __init__(self, size):
        self.barrier, self.values = threading.Barrier(size), [None] * size

    def reducer(self, rank):
        shards = self

        class Reduce:
            def _exchange(self, tensor):
                shards.values[rank] = tensor.clone()
                shards.barrier.wait(timeout=30)
                found = torch.stack(list(shards.values))
                shards.barrier.wait(timeout=30)
                return found

            def maximum(self, tensor):
                tensor.copy_(self._exchange(tensor).amax(0))

            def sum(self, tensor):
                tensor.copy_(self._exchange(tensor).sum(0))

        return Reduce()


@pytest.mark.parametrize(
    ("width", "count"),
    [
        pytest.param(6, 2, id="the second shard ends in padding"),
        pytest.param(11, 2, id="the second shard is all padding"),
        pytest.param(4, 3, id="three shards"),
    ],
)
def test_cross_entropy_over_vocabulary_shards(width, count):
    logits = 30 * torch.randn(B, S, width * count, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 0.25, 1, 1]], dtype=torch.float64)
    plain = logits.clone().requires_grad_()
    right = reference_loss(plain, IDS, mask, ROWS)
    right.backward()
    shards, columns, losses = Shards(count), [part.clone().requires_grad_() for part in logits.split(width, -1)], [None] * count

    def run(rank):
        first = rank * width
        rows = max(0, min(width, ROWS - first))
        losses[rank] = functional.cross_entropy_sum(
            columns[rank], IDS, mask, first_row=first, num_rows=rows, reduce=shards.reducer(rank)
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for loss in losses:
        torch.testing.assert_close(loss, right, rtol=1e-13, atol=1e-13)
        loss.backward()
    torch.testing.assert_close(torch.cat([part.grad for part in columns], -1)[..., :ROWS], plain.grad[..., :ROWS], rtol=1e-11, atol=1e-13)
    assert not torch.cat([part.grad for part in columns], -1)[..., ROWS:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_equals_cpu(name):
    function, _, shapes, weights = CASES[name]
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        inputs = [nn.Parameter(tensor.detach().to(device)) for tensor in tensors(*shapes)]
        for i in weights:
            inputs[i].main_grad = torch.full_like(inputs[i], torch.nan, requires_grad=False)
        y = functional.embedding(IDS.to(device), inputs[0]) if name == "embedding" else function(*inputs)
        y.backward(torch.ones_like(y) * torch.arange(y.shape[-1], device=device))
        found.append([y.detach().cpu(), *((t.main_grad if i in weights else t.grad).cpu() for i, t in enumerate(inputs))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)


@pytest.mark.gpu
def test_embedding_gradient_is_the_same_in_every_run_on_cuda():
    """Atomic additions would come in another order each time."""
    ids, upstream = torch.randint(50, (200_000,), device="cuda"), torch.randn(200_000, 64, device="cuda")
    weight = nn.Parameter(torch.zeros(50, 64, device="cuda"))
    found = [torch.autograd.grad(functional.embedding(ids, weight), weight, upstream)[0] for _ in range(4)]
    assert all(torch.equal(found[0], other) for other in found[1:])
