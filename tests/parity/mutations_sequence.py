"""Faults of sequence parallelism: sums of what ranks hold whole, which tokens a rank has, what is gathered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import ones_like
from torch.distributed import get_world_size

from megactl.engine import data_parallel, functional, parallelize, sequence_parallel, sharded_gradients
from megactl.engine.collectives import all_gather, all_reduce
from megactl.engine.models import bert
from megactl.engine.models.layers import Dropout, Linear
from parity.faults import Mutation, nothing, patched, twice


def _ranks_reversed(original: Callable) -> Callable:
    def mutated(self, x):
        whole, handle = original(self, x)
        handle.wait()
        return whole.view(self.tp.size, -1).flip(0).view_as(whole), handle

    return mutated


def _from_everywhere(original: Callable) -> Callable:
    """A gather over all ranks in place of this replica's: its first shares are another replica's."""

    def mutated(self, x):
        whole, handle = original(self, x)
        handle.wait()
        shares = x.new_empty(get_world_size(), x.numel())
        all_gather(shares.view(-1), x.contiguous().view(-1), None)
        return whole.view(self.tp.size, -1).copy_(shares[: self.tp.size]).view_as(whole), handle

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


_FAULTS: dict[str, Mutation] = {
    "gradients of norms are not summed over the tensor-parallel ranks": Mutation(
        patched(data_parallel.GradientReducer, "_sum_partial", nothing), (2, 1, 1), "gradient in step 1"
    ),
    "gradients of norms are not summed where gradients are sharded": Mutation(
        patched(sharded_gradients.ShardedReducer, "_sum_tokens", nothing), (2, 1, 2), "gradient in step 1", {"zero": 2}
    ),
    "gradients of norms are summed twice": Mutation(
        patched(data_parallel.GradientReducer, "_sum_partial", twice), (2, 1, 2), "gradient in step 1 final_norm.weight", {"zero": 1}
    ),
    "dropout does not know which tokens it is given": Mutation(
        patched(sequence_parallel.RankDropout, "forward", lambda original: Dropout.forward), (2, 1, 1), "loss on rank 0", {"dropout": 0.1}
    ),
    "tokens are gathered in another order": Mutation(
        patched(sequence_parallel.RankTokens, "start_gather", _ranks_reversed), (2, 1, 1), "loss on rank 0, step 1"
    ),
    "tokens are gathered over the ranks of another replica": Mutation(
        patched(sequence_parallel.RankTokens, "start_gather", _from_everywhere), (2, 1, 2), "loss on rank 0, step 1"
    ),
    "gradients of RMSNorm are not summed over the tensor-parallel ranks": Mutation(
        patched(data_parallel.GradientReducer, "_sum_partial", nothing),
        (2, 1, 1),
        "gradient in step 1 layers.0.attention_norm.weight",
        {"normalization": "rmsnorm"},
    ),
    "the input is not gathered again": Mutation(
        patched(functional, "_start_tokens", _ones), (2, 1, 1), "gradient in step 1 layers.0.attention.qkv.weight"
    ),
    "every rank takes the positions of the first": Mutation(
        patched(sequence_parallel.RankTokens, "rows", lambda original: lambda self, table: table.reshape(1, -1)[:, : self.count]),
        (2, 1, 1),
        "loss on rank 0, step 1",
        {"documents": "reset"},
    ),
    "the first token's gradient is summed over the ranks": Mutation(
        patched(sequence_parallel._FirstTokens, "backward", _summed_gradient), (2, 1, 1), "gradient in step 1 layers", {"model": "bert"}
    ),
    "the sentence head's gradients are summed": Mutation(
        patched(bert.SentenceHead, "of_sequences", lambda original: False),
        (2, 1, 1),
        "gradient in step 1 head.sentence",
        {"model": "bert"},
    ),
    "BERT's dense layer is not summed": Mutation(
        patched(parallelize, "mark_partial_gradients", _but_linears), (2, 1, 1), "gradient in step 1 head.dense", {"model": "bert"}
    ),
}

SEQUENCE = {name: replace(fault, settings={"sp": True, **fault.settings}) for name, fault in _FAULTS.items()}
