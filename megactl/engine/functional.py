"""The gradient path: every operation that owns weights, with a hand-written backward.

A parameter that lives in a `FlatParameters` buffer has an attribute `main_grad`, a view of one flat buffer in the main
dtype (fp32; fp64 in verification runs). Backward then writes the weight gradient straight into that view, overwriting it
in the first micro-batch of a step and adding in the later ones, and returns None to autograd, so `.grad` is never made.
Data parallelism, ZeRO, clipping and the parity tests read that one buffer. Without `main_grad` (a plain module in a
notebook) the same functions return ordinary gradients.

Input and weight gradients are separate calls, so that a schedule can run them at different times (`WeightQueue`), and so that
the reduction of the input gradient over tensor-parallel ranks travels while the weight gradient is computed.

Shapes: x [..., in], weight [out, in], bias [out], ids [...] of int64.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor
from torch.autograd import Function

from megactl.engine import ops


class Handle(Protocol):
    """Something under way that must be waited for, such as an asynchronous collective."""

    def wait(self) -> Any:
        """Return once the result may be read."""


# Starts an in-place reduction of its argument and returns a handle, or None when nothing has to be done.
StartReduce = Callable[[Tensor], Handle | None]


class TokenShards(Protocol):
    """How the tokens [b, s] lie over ranks that each hold some of them (sequence parallelism)."""

    @property
    def shape(self) -> tuple[int, int]:
        """That of this rank's tokens."""

    def start_gather(self, x: Tensor) -> tuple[Tensor, Handle]:
        """This rank's tokens to those of all ranks, [b, s, n], there once the handle is waited for."""

    def start_scatter(self, x: Tensor) -> tuple[Tensor | None, Handle | None]:
        """[b, s, n] summed over the ranks, this rank's tokens of it, there once the handle is waited for."""


WeightWork = Callable[[], Tensor | None]


class WeightQueue:
    """Weight gradients of one micro-batch on one stage that its backward has put off: I fills the queue, W runs it.

    A work keeps its operation's input and output gradient alive until it has run, and nothing else that is as large. So it must not
    refer to the autograd context, and takes the input detached, which otherwise holds the context of what made it.
    """

    def __init__(self) -> None:
        self._works: deque[Callable[[], Any]] = deque()

    def add(self, work: Callable[[], Any]) -> None:
        """Put off `work`; works run in the order in which they came, which is that of the backward."""
        self._works.append(work)

    def run(self) -> None:
        """Do what was put off, letting go of each work's tensors as soon as it is done."""
        # Outside a backward autograd would record what is written into the buffers.
        with torch.no_grad():
            while self._works:
                self._works.popleft()()

    def __len__(self) -> int:
        return len(self._works)


class WeightOptions(TypedDict):
    """How the weight gradients of one micro-batch are made: keyword arguments of every operation that owns weights."""

    accumulate: bool
    deferred: WeightQueue | None


def weight_work(deferred: WeightQueue | None, *works: WeightWork) -> list[Tensor | None]:
    """Run the weight gradients of one operation, or put them off where there is a queue. One work a weight; returns what autograd gets.

    Every Function that owns weights computes their gradients through this. Put off, a work must have a buffer to write to.
    """
    if deferred is None:
        return [work() for work in works]
    for work in works:
        deferred.add(work)
    return [None] * len(works)


def write_gradient(target: Tensor, gradient: Tensor, accumulate: bool) -> None:
    """Put `gradient` into `target` (same shape, maybe another dtype): overwrite, or add when `accumulate`."""
    if accumulate:
        target.add_(gradient)
    else:
        target.copy_(gradient)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a linear's input: grad [..., out] @ weight [out, in]."""
    return grad @ weight


def weight_gradient(grad: Tensor, x: Tensor, target: Tensor | None, accumulate: bool) -> Tensor | None:
    """Gradient of a linear's weight, [out, in]: into `target` when there is one, else returned."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    if target is None:
        return grad.t() @ x
    if target.dtype != grad.dtype and target.is_cuda:
        # The product is summed in fp32 inside the GEMM and never rounded to 16 bits on its way to the buffer.
        torch.addmm(target, grad.t(), x, target.dtype, beta=int(accumulate), out=target)
    elif target.dtype != grad.dtype:
        # CPUs have no such GEMM. The inputs are exact in the wider type.
        weight_gradient(grad.to(target.dtype), x.to(target.dtype), target, accumulate)
    elif accumulate:
        target.addmm_(grad.t(), x)
    else:
        torch.mm(grad.t(), x, out=target)
    return None


def bias_gradient(grad: Tensor, target: Tensor | None, accumulate: bool) -> Tensor | None:
    """Gradient of a bias, [out]: the sum of grad [..., out] over everything but the last dimension."""
    grad = grad.reshape(-1, grad.shape[-1])
    if target is None:
        return grad.sum(0)
    if accumulate:
        target.add_(grad.sum(0, dtype=target.dtype))
    else:
        torch.sum(grad, 0, dtype=target.dtype, out=target)
    return None


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, accumulate, deferred, start_reduce, unread, gather, scatter):
        # Of gathered tokens only this rank's are kept; backward gathers them again.
        ctx.save_for_backward(x, weight)
        ctx.targets = getattr(weight, "main_grad", None), getattr(bias, "main_grad", None)
        ctx.has_bias, ctx.accumulate, ctx.deferred, ctx.start_reduce = bias is not None, accumulate, deferred, start_reduce
        ctx.gather, ctx.scatter = gather, scatter
        if unread:
            return x.new_zeros(()).expand(*(x.shape[:-1] if scatter is None else scatter.shape), weight.shape[0])
        y = torch.nn.functional.linear(gathered(x, gather), weight, bias)
        return y if scatter is None else arrived(*scatter.start_scatter(y))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        whole = gathered(grad, ctx.scatter)
        # Put off, the weight gradient keeps this rank's tokens of the output gradient, and gathers them again.
        late = partial(gathered, grad, ctx.scatter) if ctx.scatter is not None and ctx.deferred is not None else None
        bias_work = partial(bias_gradient, whole, ctx.targets[1], ctx.accumulate) if ctx.has_bias else None
        return *product_gradients(ctx, whole, x, weight, bias_work, late), *[None] * 6


def product_gradients(
    ctx, grad: Tensor, x: Tensor, weight: Tensor, bias_work: WeightWork | None, late_grad: Callable[[], Tensor] | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias from that of the product, [b, s, out].

    The order is what hides communication: the tokens come together while the input gradient is computed, and its reduction travels
    while the weight gradient is. `late_grad` gives the product's gradient to a weight gradient that is put off.
    """
    tokens = _start_tokens(x.detach(), ctx.gather, ctx.deferred)
    grad_x, handle = _start_input_gradient(ctx, grad, weight)
    if tokens is None and late_grad is None:
        works = [partial(weight_gradient, grad, x.detach(), ctx.targets[0], ctx.accumulate)]
    else:
        grads, inputs = late_grad or partial(_same, grad), tokens or partial(_same, x.detach())
        works = [partial(_late_weight_gradient, grads, inputs, ctx.targets[0], ctx.accumulate)]
    works += [] if bias_work is None else [bias_work]
    grad_weight, grad_bias = (*weight_work(ctx.deferred, *works), None)[:2]
    if handle is not None:
        handle.wait()
    return grad_x, grad_weight, grad_bias


def _start_tokens(x: Tensor, gather: TokenShards | None, deferred: WeightQueue | None) -> Callable[[], Tensor] | None:
    """What gives the tokens of all ranks: on their way from here on, or gathered when a weight gradient that is put off wants them."""
    if gather is None:
        return None
    return partial(gathered, x, gather) if deferred is not None else partial(arrived, *gather.start_gather(x))


def _late_weight_gradient(grad: Callable[[], Tensor], x: Callable[[], Tensor], target: Tensor | None, accumulate: bool) -> Tensor | None:
    return weight_gradient(grad(), x(), target, accumulate)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def arrived(tensor: Tensor, handle: Handle) -> Tensor:
    """The tensor, once it is there."""
    handle.wait()
    return tensor


def gathered(x: Tensor, tokens: TokenShards | None) -> Tensor:
    """The tokens of all ranks where each has some of them; x itself where `tokens` is None."""
    return x if tokens is None else arrived(*tokens.start_gather(x))


def _start_input_gradient(ctx, grad: Tensor, weight: Tensor) -> tuple[Tensor | None, Handle | None]:
    """The input gradient, where one is wanted, with its reduction on the way."""
    if not ctx.needs_input_grad[0]:
        return None, None
    grad_x = input_gradient(grad, weight)
    if ctx.gather is not None:
        return ctx.gather.start_scatter(grad_x)
    return grad_x, ctx.start_reduce(grad_x) if ctx.start_reduce else None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    accumulate: bool = False,
    deferred: WeightQueue | None = None,
    start_reduce: StartReduce | None = None,
    unread: bool = False,
    gather: TokenShards | None = None,
    scatter: TokenShards | None = None,
) -> Tensor:
    """y = x @ weight.T + bias. `start_reduce` begins a reduction of the input gradient while the weight gradient is computed.

    unread: y is wanted for its backward alone, which reads x and weight; its values are zeros then, and the product is not computed.
    gather: x is this rank's tokens, and y of all tokens. scatter: x is of all tokens, and y, summed over the ranks, this rank's
    tokens; for a linear without bias, which would be summed too.
    """
    assert scatter is None or bias is None
    return _Linear.apply(x, weight, bias, accumulate, deferred, start_reduce, unread, gather, scatter)


class _LinearGelu(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, approximate, accumulate, deferred, start_reduce, gather):
        product = torch.nn.functional.linear(gathered(x, gather), weight)
        ctx.save_for_backward(x, weight, bias, product)
        ctx.targets = getattr(weight, "main_grad", None), getattr(bias, "main_grad", None)
        ctx.approximate, ctx.accumulate, ctx.deferred, ctx.start_reduce = approximate, accumulate, deferred, start_reduce
        ctx.gather = gather
        return ops.bias_gelu_forward(product, bias, approximate)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, product = ctx.saved_tensors
        grad, grad_bias = ops.bias_gelu_backward(grad, product, bias, ctx.approximate)
        bias_work = partial(_put, ctx.targets[1], grad_bias, bias, ctx.accumulate)
        return *product_gradients(ctx, grad, x, weight, bias_work), None, None, None, None, None


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    approximate: str,
    *,
    accumulate: bool = False,
    deferred: WeightQueue | None = None,
    start_reduce: StartReduce | None = None,
    gather: TokenShards | None = None,
) -> Tensor:
    """gelu(x @ weight.T + bias), `approximate` "tanh" or "none" (erf). Saved for backward: x and the product, not the activation.

    `start_reduce` and `gather` as in `linear`.
    """
    return _LinearGelu.apply(x, weight, bias, approximate, accumulate, deferred, start_reduce, gather)


class _Bias(Function):
    @staticmethod
    def forward(ctx, x, bias, accumulate: bool, deferred: WeightQueue | None):
        ctx.target, ctx.accumulate, ctx.deferred = getattr(bias, "main_grad", None), accumulate, deferred
        return x + bias

    @staticmethod
    def backward(ctx, grad):
        (grad_bias,) = weight_work(ctx.deferred, partial(bias_gradient, grad, ctx.target, ctx.accumulate))
        return grad, grad_bias, None, None


def add_bias(x: Tensor, bias: Tensor, *, accumulate: bool = False, deferred: WeightQueue | None = None) -> Tensor:
    """x + bias, for a linear whose product is reduced over ranks before the bias may be added."""
    return _Bias.apply(x, bias, accumulate, deferred)


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, epsilon: float, accumulate: bool, deferred: WeightQueue | None):
        y, mean, rstd = ops.layer_norm_forward(x, weight, bias, epsilon)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.targets = getattr(weight, "main_grad", None), getattr(bias, "main_grad", None)
        ctx.accumulate, ctx.deferred = accumulate, deferred
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        return (*_layer_norm_backward(ctx, grad, x, weight, bias, mean, rstd, None), None, None, None)


def _layer_norm_backward(ctx, grad, x, weight, bias, mean, rstd, grad_sum) -> tuple[Tensor, Tensor | None, Tensor | None]:
    grad_x, grad_weight, grad_bias = ops.layer_norm_backward(grad, x, weight, mean, rstd, grad_sum)
    weight_target, bias_target = ctx.targets
    # Both gradients come out of the pass that makes the input gradient; only their way into the buffer can wait.
    grad_weight, grad_bias = weight_work(
        ctx.deferred,
        partial(_put, weight_target, grad_weight, weight, ctx.accumulate),
        partial(_put, bias_target, grad_bias, bias, ctx.accumulate),
    )
    return grad_x, grad_weight, grad_bias


def _put(target: Tensor | None, gradient: Tensor, parameter: Tensor, accumulate: bool) -> Tensor | None:
    """An fp32 gradient of a small parameter into its buffer, or, where there is none, to autograd in the parameter's dtype."""
    if target is None:
        return gradient.to(parameter.dtype)
    write_gradient(target, gradient, accumulate)
    return None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, *, accumulate: bool = False, deferred: WeightQueue | None = None
) -> Tensor:
    """LayerNorm over the last dimension."""
    return _LayerNorm.apply(x, weight, bias, epsilon, accumulate, deferred)


class _AddLayerNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, epsilon: float, accumulate: bool, deferred: WeightQueue | None):
        y, total, mean, rstd = ops.add_layer_norm_forward(x, residual, weight, bias, epsilon)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        ctx.targets = getattr(weight, "main_grad", None), getattr(bias, "main_grad", None)
        ctx.accumulate, ctx.deferred = accumulate, deferred
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, grad, grad_total):
        grad_x, grad_weight, grad_bias = _layer_norm_backward(ctx, grad, *ctx.saved_tensors, grad_total)
        return grad_x, grad_x, grad_weight, grad_bias, None, None, None


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    *,
    accumulate: bool = False,
    deferred: WeightQueue | None = None,
) -> tuple[Tensor, Tensor]:
    """(LayerNorm(x + residual), x + residual) in one pass over memory, and their gradients in another."""
    return _AddLayerNorm.apply(x, residual, weight, bias, epsilon, accumulate, deferred)


class _Embedding(Function):
    @staticmethod
    def forward(ctx, ids, weight, first_row: int | None, accumulate: bool, deferred: WeightQueue | None):
        local, outside = ids, None
        if first_row is not None:
            local = ids - first_row
            outside = (local < 0) | (local >= weight.shape[0])
            local = local.masked_fill(outside, 0)
        y = torch.nn.functional.embedding(local, weight)
        if outside is not None:
            y.masked_fill_(outside.unsqueeze(-1), 0)
        ctx.save_for_backward(local, outside)
        ctx.rows, ctx.target, ctx.accumulate = weight.shape[0], getattr(weight, "main_grad", None), accumulate
        ctx.deferred = deferred
        return y

    @staticmethod
    def backward(ctx, grad):
        work = partial(_table_gradient, grad, *ctx.saved_tensors, ctx.rows, ctx.target, ctx.accumulate)
        return None, *weight_work(ctx.deferred, work), None, None, None


def _table_gradient(
    grad: Tensor, local: Tensor, outside: Tensor | None, rows: int, target: Tensor | None, accumulate: bool
) -> Tensor | None:
    """Gradient of a table of `rows`: grad [..., hidden] added at the rows `local`, but for those `outside`; as `weight_gradient` does."""
    if outside is not None:
        grad = grad.masked_fill(outside.unsqueeze(-1), 0)
    flat = grad.reshape(-1, grad.shape[-1])
    table = flat.new_zeros(rows, flat.shape[-1]) if target is None else target
    if target is not None and not accumulate:
        table.zero_()
    _add_rows(table, local.reshape(-1), flat)
    return table if target is None else None


# Up to this many rows a table's gradient is a product with the one-hot matrix of its ids.
_FEW_ROWS = 16


def _add_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """target[rows[i]] += values[i], in an order that is the same in every run."""
    values = values.to(target.dtype)
    if target.shape[0] <= _FEW_ROWS:
        # index_put_ adds the values of one row one after the other: with two token types, half of all tokens.
        one_hot = rows == torch.arange(target.shape[0], device=rows.device).unsqueeze(1)
        target.addmm_(one_hot.to(target.dtype), values)
    elif target.is_cuda:
        # index_add_ on CUDA uses atomics, whose order changes between runs; index_put_ sorts first.
        target.index_put_((rows,), values, accumulate=True)
    else:
        target.index_add_(0, rows, values)


def embedding(
    ids: Tensor, weight: Tensor, *, first_row: int | None = None, accumulate: bool = False, deferred: WeightQueue | None = None
) -> Tensor:
    """Rows of `weight` [rows, hidden] by id. For a vocabulary shard give its first row: ids it does not hold yield zeros."""
    return _Embedding.apply(ids, weight, first_row, accumulate, deferred)


class VocabReduce(Protocol):
    """The two reductions over vocabulary shards that a cross entropy needs; both work in place."""

    def maximum(self, tensor: Tensor) -> None:
        """Reduce by maximum."""

    def sum(self, tensor: Tensor) -> None:
        """Reduce by sum."""


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits, labels, mask, first_row: int, num_rows: int, reduce: VocabReduce | None, overwrite: bool):
        logits = logits.contiguous()
        top, total, target = ops.cross_entropy_forward(logits, labels, first_row, num_rows)
        if reduce is not None:
            own = top.clone()
            reduce.maximum(top)
            # A shard without vocabulary rows has a maximum of minus infinity and adds nothing.
            sums = torch.stack([total * (own - top).exp(), target])
            reduce.sum(sums)
            total, target = sums
        scale = torch.empty_like(total).copy_(mask)
        ctx.save_for_backward(logits, labels, top, total, scale)
        ctx.first_row, ctx.num_rows, ctx.overwrite = first_row, num_rows, overwrite
        return ((total.log() - (target - top)) * scale).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, labels, top, total, scale = ctx.saved_tensors
        # In place, so that autograd refuses a second backward, whose logits may be gone.
        scale.mul_(grad)
        gradient = ops.cross_entropy_backward_ if ctx.overwrite else ops.cross_entropy_backward
        return gradient(logits, labels, top, total, scale, ctx.first_row, ctx.num_rows), *[None] * 6


def cross_entropy_sum(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    first_row: int = 0,
    num_rows: int | None = None,
    reduce: VocabReduce | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Sum over tokens of mask * cross entropy, a 0-d tensor of at least fp32.

    logits [b, s, columns] hold the vocabulary rows first_row .. first_row + num_rows, then padding; labels [b, s]; mask [b, s].
    Backward may run once. With `overwrite` it writes the gradient over the logits, instead of taking as much memory again: for callers
    who do not look at them afterwards. Autograd refuses operations that still need their values.
    """
    rows = logits.shape[-1] if num_rows is None else num_rows
    # A leaf's values belong to whoever made it; torch.compile plans the memory itself.
    overwrite = overwrite and not logits.is_leaf and not torch.compiler.is_compiling()
    return _CrossEntropy.apply(logits, labels, mask, first_row, rows, reduce, overwrite)


def in_training_buffers(weight: Tensor) -> bool:
    """Whether `weight` lives in a `FlatParameters` buffer, so that a training step owns what is computed from it."""
    return hasattr(weight, "main_grad")
