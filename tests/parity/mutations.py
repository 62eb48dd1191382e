"""Faults to build into the engine, each of which the comparison must notice: the proof that it can fail."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from unittest import mock

from torch import Tensor, ones_like, zeros_like

from megactl.engine import (
    boundary,
    data_parallel,
    flat,
    functional,
    loss_scale,
    parallelize,
    pipeline,
    sequence_parallel,
    tensor_parallel,
    training_step,
    zero,
)
from megactl.engine.collectives import all_reduce
from megactl.engine.models import bert, transformer
from megactl.engine.models.layers import Dropout, Linear


@dataclass(frozen=True)
class Mutation:
    """A fault; the layout (tp, pp, dp) that suffers from it; what the deviation is called; other settings the case needs."""

    fault: Callable[[], AbstractContextManager]
    layout: tuple[int, int, int]
    seen_as: str
    settings: dict[str, object] = field(default_factory=dict)


def _patched(owner: object, name: str, make: Callable) -> Callable[[], AbstractContextManager]:
    """A fault that replaces `owner.name` by make(original). The name must exist: a fault that no longer applies must not pass."""
    return lambda: mock.patch.object(owner, name, make(getattr(owner, name)))


def _nothing(original: Callable) -> Callable:
    return lambda *arguments, **options: None


def _changed(**values: object) -> Callable:
    """The original's result (a dataclass) with other values."""
    return lambda original: lambda *arguments, **options: replace(original(*arguments, **options), **values)


def _no_gather(original: Callable) -> Callable:
    return lambda *arguments, **options: SimpleNamespace(wait=lambda: None)


def _mean_over_replicas(original: Callable) -> Callable:
    def mutated(self, bucket):
        self.flat.grads[bucket.start : bucket.stop] /= self.replicas.size
        return original(self, bucket)

    return mutated


def _head_zero(original: Callable) -> Callable:
    def mutated(model, tp, **options):
        original(model, tp, **options)
        for module in model.modules():
            if hasattr(module, "first_head"):
                module.first_head = 0

    return mutated


def _sites_of_the_stage(original: Callable) -> Callable:
    """Layers that number their dropouts within their stage, of two layers each."""
    return lambda config, index, **options: original(config, index % 2, **options)


def _own_samples(original: Callable) -> Callable:
    """Dropout keys that count each replica's samples for itself."""

    def mutated(self, *arguments, **options):
        inputs = original(self, *arguments, **options)
        inputs.rng[:, 2] -= self.mesh.dp.rank * self.run.training.micro_batch_size
        return inputs

    return mutated


def _total(index: int, value: Callable) -> Callable:
    """Totals of a step with one of them replaced by value(step)."""

    def make(original: Callable) -> Callable:
        def mutated(self, *arguments):
            totals = original(self, *arguments)
            totals[index] = value(self)
            return totals

        return mutated

    return make


def _all_labels(step: training_step.TrainingStep) -> int:
    return step.run.training.global_batch_size * step.run.training.seq_length


def _own_norm(step: training_step.TrainingStep) -> Tensor:
    return step.parts[0].optimizer.norm_squared()


def _count_skipped(original: Callable) -> Callable:
    def mutated(self, *arguments):
        counted = self.adam_step + 1
        outcome = original(self, *arguments)
        self.adam_step.copy_(counted)
        return outcome

    return mutated


def _own_overflow(original: Callable) -> Callable:
    """Whether to skip, and the scale with it, decided on each rank by its own gradients."""

    def mutated(self, totals, *arguments):
        own = self.parts[0].optimizer.norm_squared()
        totals[0] = totals[0].where(totals[0].isfinite(), own)
        return original(self, totals, *arguments)

    return mutated


def _padding_in_softmax(original: Callable) -> Callable:
    def mutated(self, *arguments):
        original(self, *arguments)
        self.num_rows = self.weight.shape[0]

    return mutated


def _one_token_type(original: Callable) -> Callable:
    def mutated(self, *arguments):
        made = original(self, *arguments)
        return replace(made, token_types=zeros_like(made.token_types))

    return mutated


def _own_counts(original: Callable) -> Callable:
    """Terms of the losses counted in this replica alone, as a mean over replicas of their means would."""

    def mutated(self, held, size):
        with mock.patch.object(training_step, "all_reduce", lambda counts, group: counts.mul_(self.mesh.dp.size)):
            return original(self, held, size)

    return mutated


def _tokens_count_sentences(original: Callable) -> Callable:
    """One ratio for both losses."""
    return lambda self, *arguments: original(self, *arguments)[:1].expand(2)


def _whole_bias(original: Callable) -> Callable:
    def mutated(self, *arguments):
        original(self, *arguments)
        del self.split_dim["bias"]

    return mutated


def _sentence_head_counted(original: Callable) -> Callable:
    def mutated(*arguments):
        spec = original(*arguments)
        return replace(spec, counted=True) if ".sentence." in spec.name else spec

    return mutated


def _summed_whole_linears(original: Callable) -> Callable:
    """Layers that every rank holds whole, with the reduction of the input gradient that divided ones need."""

    def mutated(module, tp, *rest):
        if isinstance(module, Linear) and module.split is None:
            module.forward = lambda x, micro_batch: functional.linear(
                x, module.weight, module.bias, accumulate=micro_batch.accumulate,
                start_reduce=lambda grad: all_reduce(grad, tp.group, async_op=True),
            )  # fmt: skip
        return original(module, tp, *rest)

    return mutated


def _twice(original: Callable) -> Callable:
    def mutated(self, bucket, **options):
        original(self, bucket)
        return original(self, bucket, **options)

    return mutated


def _ranks_reversed(original: Callable) -> Callable:
    def mutated(self, x):
        whole, handle = original(self, x)
        handle.wait()
        return whole.view(self.tp.size, -1).flip(0).view_as(whole), handle

    return mutated


def _ones(original: Callable) -> Callable:
    """Ones in place of the tokens that come together for a weight gradient."""

    def mutated(x, gather, deferred):
        tokens = original(x, gather, deferred)
        return tokens and (lambda: ones_like(tokens()))

    return mutated


def _summed_gradient(original: Callable) -> Callable:
    def mutated(ctx, grad):
        grad = grad.clone()
        all_reduce(grad, ctx.tokens.tp.group)
        return original(ctx, grad)

    return mutated


def _but_linears(original: Callable) -> Callable:
    def mutated(model):
        original(model)
        for module in model.modules():
            if isinstance(module, Linear):
                module.partial_gradients = frozenset()

    return mutated


def _armed_early(original: Callable) -> Callable:
    """Buckets that leave when a unit's input gradient is there, of a backward that puts its weight gradients off."""

    def mutated(self, queue):
        if queue is not None:
            self.arm()

    return mutated


def _twice(original: Callable) -> Callable:
    def mutated(*arguments):
        original(*arguments)
        original(*arguments)

    return mutated


def _first_copy_alone(original: Callable) -> Callable:
    """The sum reaches only the copy that the norm counts."""

    def mutated(optimizers, embedding):
        tied = [state.grad for optimizer in optimizers for state in optimizer.states if state.bucket.tied]
        before = tied[-1].clone() if tied else None
        original(optimizers, embedding)
        if tied:
            tied[-1].copy_(before)

    return mutated


def _next_share(original: Callable) -> Callable:
    """Each rank sends the share of its neighbour."""
    return lambda self, tensor: tensor.contiguous().view(self.shares, -1)[(self.tp.rank + 1) % self.shares]


def _before_it_is_filled(original: Callable) -> Callable:
    """The second part of a backward that runs before the first."""

    def mutated(self, action, received):
        if (action.virtual_stage, action.microbatch) in self.split:
            self.live[action.virtual_stage, action.microbatch].deferred.run()
        original(self, action, received)
        if (action.virtual_stage, action.microbatch) in self.deferred:
            self.deferred[action.virtual_stage, action.microbatch] = functional.WeightQueue()

    return mutated


def _first_input_gradient(original: Callable) -> Callable:
    """Every micro-batch but the last overwrites."""

    def mutated(self, part, m):
        return replace(original(self, part, m), accumulate=m == self.schedule.num_microbatches - 1)

    return mutated


def _last_rank_reports(original: property) -> property:
    return property(lambda self: float(self.mesh.tp.rank == 0 and self.mesh.pp.rank == self.mesh.pp.size - 1))


_PIPELINE_MUTATIONS = {
    "W runs before its I": Mutation(
        _patched(pipeline._Step, "_backward", _before_it_is_filled),
        (1, 2, 1),
        "gradient in step 1",
        {"schedule": "zb-h1", "micro_batches": 3},
    ),
    "the first W adds to the last step": Mutation(
        _patched(pipeline._Step, "_micro_batch", _changed(accumulate=True)),
        (1, 2, 1),
        "gradient in step 2",
        {"schedule": "zb-h1", "micro_batches": 3},
    ),
    "later Ws overwrite": Mutation(
        _patched(pipeline._Step, "_micro_batch", _first_input_gradient),
        (1, 2, 1),
        "gradient in step 1",
        {"schedule": "zb-v", "micro_batches": 3},
    ),
    "buckets leave before W": Mutation(
        _patched(data_parallel.GradientReducer, "defer_to", _armed_early),
        (1, 2, 2),
        "gradient in step 1",
        {"schedule": "zb-h1", "bucket": 1, "micro_batches": 3},
    ),
    "a tied copy is summed twice": Mutation(
        _patched(training_step, "reduce_tied", _twice), (1, 2, 1), "gradient in step 1 embedding.tokens.weight", {"schedule": "zb-v"}
    ),
    "two tied copies on one rank are not summed": Mutation(
        _patched(training_step, "reduce_tied", _nothing), (1, 2, 1), "gradient in step 1 embedding.tokens.weight", {"schedule": "zb-v"}
    ),
    "only one tied copy gets the sum": Mutation(
        _patched(training_step, "reduce_tied", _first_copy_alone),
        (1, 2, 1),
        "gradient in step 1 embedding.tokens.weight",
        {"schedule": "zb-v"},
    ),
    "the last rank reports the loss of a V": Mutation(
        _patched(training_step.TrainingStep, "_reports_loss", _last_rank_reports),
        (1, 2, 1),
        "loss on rank 0, step 1",
        {"schedule": "zb-v"},
    ),
    "scatter-gather mixes up the shares": Mutation(
        _patched(boundary.Boundary, "to_send", _next_share), (2, 2, 1), "loss on rank 0, step 1", {"micro_batches": 3}
    ),
}

_GPT_MUTATIONS = {
    "tied gradients are not summed": Mutation(
        _patched(training_step, "reduce_tied", _nothing), (1, 2, 1), "gradient in step 1 embedding.tokens.weight", {"tied": True}
    ),
    "input gradients of layers are not summed": Mutation(
        _patched(tensor_parallel.ColumnParallelLinear, "_start_reduce", _nothing), (2, 1, 1), "gradient in step 1"
    ),
    "the input gradient of the head is not summed": Mutation(
        _patched(tensor_parallel.VocabParallelHead, "_start_reduce", _nothing), (2, 1, 1), "gradient in step 1"
    ),
    "padding counts in the softmax": Mutation(
        _patched(tensor_parallel.VocabParallelHead, "__init__", _padding_in_softmax), (2, 1, 1), "loss on rank 0, step 1"
    ),
    "later micro-batches overwrite": Mutation(
        _patched(pipeline._Step, "_micro_batch", _changed(accumulate=False)), (1, 2, 1), "gradient in step 1", {"micro_batches": 3}
    ),
    "the first micro-batch adds to the last step": Mutation(
        _patched(pipeline._Step, "_micro_batch", _changed(accumulate=True)), (1, 2, 1), "gradient in step 2", {"micro_batches": 3}
    ),
    "documents see each other": Mutation(
        _patched(pipeline._Step, "_micro_batch", _changed(attention_mask=None)), (1, 1, 2), "loss on rank 1", {"documents": "reset"}
    ),
    "attention dropout starts at head 0 on every rank": Mutation(
        _patched(parallelize, "apply_tensor_parallel", _head_zero), (2, 1, 1), "loss on rank 0, step 1", {"dropout": 0.1}
    ),
    "dropout sites are numbered within the stage": Mutation(
        _patched(transformer, "Block", _sites_of_the_stage), (1, 2, 1), "loss on rank 0, step 1", {"dropout": 0.1}
    ),
    "dropout keys do not know the replica": Mutation(
        _patched(training_step.TrainingStep, "_inputs", _own_samples), (1, 1, 2), "loss on rank 0, step 1", {"dropout": 0.1}
    ),
    "gradients are not summed over replicas": Mutation(
        _patched(data_parallel.GradientReducer, "_launch_above", _nothing), (1, 1, 2), "gradient in step 1"
    ),
    "gradients are averaged over replicas": Mutation(
        _patched(data_parallel.GradientReducer, "_launch", _mean_over_replicas), (1, 1, 2), "gradient in step 1"
    ),
    "updated slices are not gathered": Mutation(_patched(zero, "all_gather", _no_gather), (1, 1, 2), "weight", {"zero": 1}),
    "copies enter the norm on every rank": Mutation(_patched(flat, "_spec", _changed(counted=True)), (2, 1, 1), "norm on rank 0, step 1"),
    "the norm is that of the rank": Mutation(
        _patched(training_step.TrainingStep, "_totals", _total(0, _own_norm)), (1, 2, 1), "unequal losses or norms"
    ),
    "an overflow is not noticed": Mutation(
        _patched(training_step.TrainingStep, "_totals", _total(0, lambda step: 1.0)), (1, 1, 2), "skipped on rank 1", {"overflow": True}
    ),
    "a skipped step counts as an update": Mutation(
        _patched(training_step.TrainingStep, "_update", _count_skipped), (1, 1, 2), "weight", {"overflow": True}
    ),
    "an overflow is each rank's own": Mutation(
        _patched(training_step.TrainingStep, "_update", _own_overflow), (1, 2, 1), "skipped on rank 0", {"overflow": True, "scale": 2.0**40}
    ),
    "a skipped step counts as an update under a loss scale": Mutation(
        _patched(training_step.TrainingStep, "_update", _count_skipped), (1, 1, 2), "weight", {"overflow": True, "scale": 2.0**40}
    ),
    "the norm is that of the scaled gradients": Mutation(
        _patched(loss_scale.LossScale, "unscaled", lambda original: lambda self, factor: factor),
        (1, 1, 2),
        "norm on rank 0, step 1",
        {"scale": 2.0**40},
    ),
    "the loss scale does not fall": Mutation(
        _patched(loss_scale.LossScale, "update", _nothing), (1, 1, 2), "loss scale on rank 0", {"overflow": True, "scale": 2.0**40}
    ),
    "masked tokens count in the mean": Mutation(
        _patched(training_step.TrainingStep, "_totals", _total(3, _all_labels)), (1, 1, 2), "gradient in step 1", {"documents": "eod"}
    ),
    "biases and norms decay": Mutation(_patched(flat, "_spec", _changed(decay=True)), (1, 1, 2), "weight"),
}

_BERT_MUTATIONS = {
    "padding is looked at": Mutation(
        _patched(pipeline, "attention_mask", _nothing), (1, 1, 2), "parts of the loss on rank 1, step 1", {"padding": True}
    ),
    "one token type": Mutation(_patched(pipeline._Step, "_micro_batch", _one_token_type), (1, 2, 1), "loss on rank 0, step 1"),
    "each replica divides by its own tokens": Mutation(
        _patched(training_step.TrainingStep, "_loss_gradient", _own_counts), (1, 1, 2), "gradient in step 1"
    ),
    "the sentence loss is divided by tokens": Mutation(
        _patched(training_step.TrainingStep, "_loss_gradient", _tokens_count_sentences), (1, 2, 1), "gradient in step 1 head.sentence"
    ),
    "the vocabulary's bias is whole on each rank": Mutation(
        _patched(tensor_parallel.VocabParallelHead, "__init__", _whole_bias), (2, 1, 1), "gradient in step 1 head.decoder.bias on rank 1"
    ),
    "the sentence head is counted by each rank": Mutation(
        _patched(flat, "_spec", _sentence_head_counted), (2, 1, 1), "norm on rank 0, step 1"
    ),
    "input gradients of whole layers are summed": Mutation(
        _patched(tensor_parallel, "_parallel_form", _summed_whole_linears), (2, 1, 1), "gradient in step 1 layers.1"
    ),
    "BERT's tied gradients are not summed": Mutation(
        _patched(training_step, "reduce_tied", _nothing), (1, 2, 1), "gradient in step 1 embedding.tokens.weight", {"tied": True}
    ),
}

_SEQUENCE_MUTATIONS = {
    "gradients of norms are not summed over the tensor-parallel ranks": Mutation(
        _patched(data_parallel.GradientReducer, "_sum_partial", _nothing), (2, 1, 1), "gradient in step 1"
    ),
    "gradients of norms are summed twice": Mutation(
        _patched(data_parallel.GradientReducer, "_sum_partial", _twice), (2, 1, 2), "gradient in step 1 final_norm.weight", {"zero": 1}
    ),
    "dropout does not know which tokens it is given": Mutation(
        _patched(sequence_parallel.RankDropout, "forward", lambda original: Dropout.forward), (2, 1, 1), "loss on rank 0", {"dropout": 0.1}
    ),
    "tokens are gathered in another order": Mutation(
        _patched(sequence_parallel.RankTokens, "start_gather", _ranks_reversed), (2, 1, 1), "loss on rank 0, step 1"
    ),
    "the input is not gathered again": Mutation(
        _patched(functional, "_start_tokens", _ones), (2, 1, 1), "gradient in step 1 layers.0.attention.qkv.weight"
    ),
    "every rank takes the positions of the first": Mutation(
        _patched(sequence_parallel.RankTokens, "rows", lambda original: lambda self, table: table.reshape(1, -1)[:, : self.count]),
        (2, 1, 1),
        "loss on rank 0, step 1",
        {"documents": "reset"},
    ),
    "the first token's gradient is summed over the ranks": Mutation(
        _patched(sequence_parallel._FirstTokens, "backward", _summed_gradient), (2, 1, 1), "gradient in step 1 layers", {"model": "bert"}
    ),
    "the sentence head's gradients are summed": Mutation(
        _patched(bert.SentenceHead, "of_sequences", lambda original: False),
        (2, 1, 1),
        "gradient in step 1 head.sentence",
        {"model": "bert"},
    ),
    "BERT's dense layer is not summed": Mutation(
        _patched(parallelize, "mark_partial_gradients", _but_linears), (2, 1, 1), "gradient in step 1 head.dense", {"model": "bert"}
    ),
}

MUTATIONS = (
    _GPT_MUTATIONS
    | _PIPELINE_MUTATIONS
    | {name: replace(fault, settings={"model": "bert", **fault.settings}) for name, fault in _BERT_MUTATIONS.items()}
    | {name: replace(fault, settings={"sp": True, **fault.settings}) for name, fault in _SEQUENCE_MUTATIONS.items()}
)
