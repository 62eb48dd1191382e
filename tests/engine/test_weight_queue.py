"""Weight gradients that are put off: the same bits as others, written when the queue runs, from no more tensors than they need."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from megactl.config.schema import Model  # noqa: E402
from megactl.engine import functional  # noqa: E402
from megactl.engine.models import MODELS  # noqa: E402
from megactl.engine.models.layers import MicroBatch, Targets  # noqa: E402

B, S, IN, OUT, ROWS = 2, 5, 6, 7, 11
IDS = torch.tensor([[3, 3, 0, 10, 3], [7, 0, 3, 10, 10]])


def add_layer_norm(x, weight, bias, **options):
    y, total = functional.add_layer_norm(x, x.flip(0), weight, bias, 1e-5, **options)
    return y + 2 * total


# name: (the function, shape of its input or None, shapes of its weights)
CASES = {
    "linear": (functional.linear, (B, S, IN), [(OUT, IN), (OUT,)]),
    "linear without bias": (functional.linear, (B, S, IN), [(OUT, IN)]),
    "linear_gelu": (partial(functional.linear_gelu, approximate="tanh"), (B, S, IN), [(OUT, IN), (OUT,)]),
    "add_bias": (functional.add_bias, (B, S, IN), [(IN,)]),
    "layer_norm": (partial(functional.layer_norm, epsilon=1e-5), (B, S, IN), [(IN,), (IN,)]),
    "add_layer_norm": (add_layer_norm, (B, S, IN), [(IN,), (IN,)]),
    "embedding": (lambda weight, **options: functional.embedding(IDS, weight, **options), None, [(ROWS, IN)]),
    "embedding shard": (lambda weight, **options: functional.embedding(IDS, weight, first_row=3, **options), None, [(ROWS, IN)]),
}


def run(name, accumulate, deferred):
    """(the input's gradient, the buffers before the queue runs, the buffers at the end), always from the same numbers."""
    torch.manual_seed(3)
    function, shape, weights = CASES[name]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True)] if shape else []
    parameters = [nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in weights]
    for parameter in parameters:
        parameter.main_grad = torch.randn(parameter.shape, dtype=torch.float64)
    y = function(*inputs, *parameters, accumulate=accumulate, deferred=deferred)
    y.backward(torch.randn(y.shape, dtype=torch.float64))
    before = [parameter.main_grad.clone() for parameter in parameters]
    if deferred is not None:
        deferred.run()
    assert all(parameter.grad is None for parameter in parameters)
    return [x.grad for x in inputs], before, [parameter.main_grad for parameter in parameters]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_put_off_gradient_is_the_same_bit_for_bit(name, accumulate):
    queue = functional.WeightQueue()
    whole, split = run(name, accumulate, None), run(name, accumulate, queue)
    for one, other in zip((*whole[0], *whole[2]), (*split[0], *split[2]), strict=True):
        assert torch.equal(one, other)
    for untouched, written in zip(split[1], split[2], strict=True):
        assert not torch.equal(untouched, written), "backward itself must not have written the buffer"
    assert len(queue) == 0


def small_model(**settings) -> nn.Module:
    model = MODELS["gpt"](Model(num_layers=2, hidden_size=16, num_heads=2, vocab_size=ROWS, max_positions=S, init_std=0.2, **settings))
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
        parameter.main_grad = torch.full_like(parameter, torch.nan, requires_grad=False)
    return model


def backward(model, deferred):
    batch = MicroBatch(torch.tensor([1, 1, 0]), torch.arange(S).expand(B, S), deferred=deferred)
    logits = model(IDS, batch)
    model.loss_sums(logits, Targets(IDS.roll(-1, 1), torch.ones(B, S))).sum().backward()


@pytest.mark.parametrize("settings", [{}, {"untie_embeddings": True}, {"hidden_dropout": 0.1}, {"norm_position": "post"}], ids=str)
def test_a_whole_model_is_the_same_bit_for_bit(settings):
    """Tied too: the head's work comes first and overwrites, the embedding's adds."""
    whole, split, queue = small_model(**settings), small_model(**settings), functional.WeightQueue()
    backward(whole, None)
    backward(split, queue)
    assert all(parameter.main_grad.isnan().all() for parameter in split.parameters())
    queue.run()
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.equal(one.main_grad, other.main_grad)


def kept_bytes(queue: functional.WeightQueue, but: set[int]) -> int:
    """Bytes of the storages that the queue's works refer to, each once, without those in `but`."""
    found, seen, todo = {}, set(), list(queue._works)
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        else:
            todo += gc.get_referents(item) if isinstance(item, (partial, tuple, list, dict)) else []
    return sum(size for address, size in found.items() if address not in but)


def test_a_layer_keeps_the_input_and_the_gradient_of_each_matrix_and_no_more():
    """Without dropout, per token in widths of h: inputs h (qkv), h (output), h (up), 4h (down); gradients 3h, h, 4h, h."""
    h, b, s = 64, 2, 32
    model = MODELS["gpt"](Model(num_layers=1, hidden_size=h, num_heads=2, vocab_size=64, max_positions=s))
    layer = model.layers["0"]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
        parameter.main_grad = torch.zeros_like(parameter, requires_grad=False)
    queue = functional.WeightQueue()
    batch = MicroBatch(torch.tensor([1, 1, 0]), torch.arange(s).expand(b, s), deferred=queue)
    x = torch.randn(b, s, h, requires_grad=True)
    layer(x, batch).backward(torch.randn(b, s, h))
    buffers = {parameter.main_grad.untyped_storage().data_ptr() for parameter in layer.parameters()}
    weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    # Sums that come out of the backward itself: four of the norms' weights and biases, one of the up matrix's bias.
    small = 4 * h + 4 * h
    assert kept_bytes(queue, buffers | weights) == 4 * (b * s * h * (7 + 9) + small)


def test_the_autograd_contexts_are_gone_before_the_weight_gradients_are_computed():
    """Put-off works that held a context, or an input with its history, would keep all that was saved: here products under GELUs."""
    queue, x, contexts = functional.WeightQueue(), torch.randn(B, S, IN, requires_grad=True), []
    for _ in range(2):
        weight, bias = nn.Parameter(torch.randn(IN, IN)), nn.Parameter(torch.randn(IN))
        for parameter in (weight, bias):
            parameter.main_grad = torch.zeros_like(parameter, requires_grad=False)
        x = functional.linear_gelu(x, weight, bias, "tanh", deferred=queue)
        contexts.append(weakref.ref(x.grad_fn))
    x.sum().backward()
    del x
    gc.collect()
    assert [context() for context in contexts] == [None, None] and len(queue) == 4
