"""Faults to build into the engine, each of which the comparison must notice: the proof that it can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

from torch import Tensor, zeros_like

from megactl.engine import (
    data_parallel,
    flat,
    functional,
    loss_scale,
    parallelize,
    pipeline,
    tensor_parallel,
    training_step,
    zero,
)
from megactl.engine.collectives import all_reduce
from megactl.engine.models import transformer
from megactl.engine.models.layers import Linear
from parity.faults import Mutation, changed, no_gather, nothing, patched
from parity.mutations_context import CONTEXT
from parity.mutations_llama import LLAMA
from parity.mutations_offload import OFFLOAD
from parity.mutations_pipeline import PIPELINE
from parity.mutations_recompute import RECOMPUTE
from parity.mutations_sequence import SEQUENCE
from parity.mutations_zero import ZERO


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


def _logits_of_every_rank(original: Callable) -> Callable:
    """Each rank adds the exponentials of the whole vocabulary, as if what it holds were a share of it."""

    def mutated(self, tensor):
        tensor[0] *= self.tp.size
        original(self, tensor)

    return mutated


def _on_the_first_rank(original: Callable) -> Callable:
    """Tensors that are divided, taken for copies."""

    def mutated(model, prefix, module, leaf, parameter, mesh, reader):
        spec = original(model, prefix, module, leaf, parameter, mesh, reader)
        return replace(spec, counted=spec.counted and mesh.tp.rank == 0)

    return mutated


def _a_unit_early(original: Callable) -> Callable:
    """The notice of a unit's backward comes before its gradients: those of the unit below leave with it."""
    return lambda self, unit: original(self, max(unit - 1, 0))


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


_GPT_MUTATIONS = {
    "tied gradients are not summed": Mutation(
        patched(training_step, "reduce_tied", nothing), (1, 2, 1), "gradient in step 1 embedding.tokens.weight", {"tied": True}
    ),
    "input gradients of layers are not summed": Mutation(
        patched(tensor_parallel.ColumnParallelLinear, "_start_reduce", nothing), (2, 1, 1), "gradient in step 1"
    ),
    "the input gradient of the head is not summed": Mutation(
        patched(tensor_parallel.VocabParallelHead, "_start_reduce", nothing), (2, 1, 1), "gradient in step 1"
    ),
    "padding counts in the softmax": Mutation(
        patched(tensor_parallel.VocabParallelHead, "__init__", _padding_in_softmax), (2, 1, 1), "loss on rank 0, step 1"
    ),
    "every rank's logits count in the softmax": Mutation(
        patched(tensor_parallel._VocabReduce, "sum", _logits_of_every_rank), (2, 1, 1), "loss on rank 0, step 1"
    ),
    "divided tensors enter the norm on the first rank alone": Mutation(
        patched(flat, "_spec", _on_the_first_rank), (2, 1, 1), "norm on rank 0, step 1"
    ),
    "a bucket leaves before its gradients are there": Mutation(
        patched(data_parallel.GradientReducer, "_launch_above", _a_unit_early), (1, 1, 2), "gradient in step 1", {"bucket": 1}
    ),
    "later micro-batches overwrite": Mutation(
        patched(pipeline._Step, "_micro_batch", changed(accumulate=False)), (1, 2, 1), "gradient in step 1", {"micro_batches": 3}
    ),
    "the first micro-batch adds to the last step": Mutation(
        patched(pipeline._Step, "_micro_batch", changed(accumulate=True)), (1, 2, 1), "gradient in step 2", {"micro_batches": 3}
    ),
    "documents see each other": Mutation(
        patched(pipeline._Step, "_micro_batch", changed(attention_mask=None)), (1, 1, 2), "loss on rank 1", {"documents": "reset"}
    ),
    "attention dropout starts at head 0 on every rank": Mutation(
        patched(parallelize, "apply_tensor_parallel", _head_zero), (2, 1, 1), "loss on rank 0, step 1", {"dropout": 0.1}
    ),
    "dropout sites are numbered within the stage": Mutation(
        patched(transformer, "Block", _sites_of_the_stage), (1, 2, 1), "loss on rank 0, step 1", {"dropout": 0.1}
    ),
    "dropout keys do not know the replica": Mutation(
        patched(training_step.TrainingStep, "_inputs", _own_samples), (1, 1, 2), "loss on rank 0, step 1", {"dropout": 0.1}
    ),
    "gradients are not summed over replicas": Mutation(
        patched(data_parallel.GradientReducer, "_launch_above", nothing), (1, 1, 2), "gradient in step 1"
    ),
    "gradients are averaged over replicas": Mutation(
        patched(data_parallel.GradientReducer, "_launch", _mean_over_replicas), (1, 1, 2), "gradient in step 1"
    ),
    "updated slices are not gathered": Mutation(patched(zero, "all_gather", no_gather), (1, 1, 2), "weight", {"zero": 1}),
    "copies enter the norm on every rank": Mutation(patched(flat, "_spec", changed(counted=True)), (2, 1, 1), "norm on rank 0, step 1"),
    "the norm is that of the rank": Mutation(
        patched(training_step.TrainingStep, "_totals", _total(0, _own_norm)), (1, 2, 1), "unequal losses or norms"
    ),
    "an overflow is not noticed": Mutation(
        patched(training_step.TrainingStep, "_totals", _total(0, lambda step: 1.0)), (1, 1, 2), "skipped on rank 1", {"overflow": True}
    ),
    "a skipped step counts as an update": Mutation(
        patched(training_step.TrainingStep, "_update", _count_skipped), (1, 1, 2), "weight", {"overflow": True}
    ),
    "an overflow is each rank's own": Mutation(
        patched(training_step.TrainingStep, "_update", _own_overflow), (1, 2, 1), "skipped on rank 0", {"overflow": True, "scale": 2.0**40}
    ),
    "a skipped step counts as an update under a loss scale": Mutation(
        patched(training_step.TrainingStep, "_update", _count_skipped), (1, 1, 2), "weight", {"overflow": True, "scale": 2.0**40}
    ),
    "the norm is that of the scaled gradients": Mutation(
        patched(loss_scale.LossScale, "unscaled", lambda original: lambda self, factor: factor),
        (1, 1, 2),
        "norm on rank 0, step 1",
        {"scale": 2.0**40},
    ),
    "the loss scale does not fall": Mutation(
        patched(loss_scale.LossScale, "update", nothing), (1, 1, 2), "loss scale on rank 0", {"overflow": True, "scale": 2.0**40}
    ),
    "masked tokens count in the mean": Mutation(
        patched(training_step.TrainingStep, "_totals", _total(3, _all_labels)), (1, 1, 2), "gradient in step 1", {"documents": "eod"}
    ),
    "biases and norms decay": Mutation(patched(flat, "_spec", changed(decay=True)), (1, 1, 2), "weight"),
}

_BERT_MUTATIONS = {
    "padding is looked at": Mutation(
        patched(pipeline, "attention_mask", nothing), (1, 1, 2), "parts of the loss on rank 1, step 1", {"padding": True}
    ),
    "one token type": Mutation(patched(pipeline._Step, "_micro_batch", _one_token_type), (1, 2, 1), "loss on rank 0, step 1"),
    "each replica divides by its own tokens": Mutation(
        patched(training_step.TrainingStep, "_loss_gradient", _own_counts), (1, 1, 2), "gradient in step 1"
    ),
    "the sentence loss is divided by tokens": Mutation(
        patched(training_step.TrainingStep, "_loss_gradient", _tokens_count_sentences), (1, 2, 1), "gradient in step 1 head.sentence"
    ),
    "the vocabulary's bias is whole on each rank": Mutation(
        patched(tensor_parallel.VocabParallelHead, "__init__", _whole_bias), (2, 1, 1), "gradient in step 1 head.decoder.bias on rank 1"
    ),
    "the sentence head is counted by each rank": Mutation(
        patched(flat, "_spec", _sentence_head_counted), (2, 1, 1), "norm on rank 0, step 1"
    ),
    "input gradients of whole layers are summed": Mutation(
        patched(tensor_parallel, "_parallel_form", _summed_whole_linears), (2, 1, 1), "gradient in step 1 layers.1"
    ),
    "BERT's tied gradients are not summed": Mutation(
        patched(training_step, "reduce_tied", nothing), (1, 2, 1), "gradient in step 1 embedding.tokens.weight", {"tied": True}
    ),
}

_FOR_BERT = {name: replace(fault, settings={"model": "bert", **fault.settings}) for name, fault in _BERT_MUTATIONS.items()}
MUTATIONS = _GPT_MUTATIONS | OFFLOAD | PIPELINE | RECOMPUTE | ZERO | LLAMA | CONTEXT | SEQUENCE | _FOR_BERT
