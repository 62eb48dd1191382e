"""Wrong numbers that users of other systems reported, one test each: the layout that had the fault equals one process here.

Each test runs the case of a fault of the table of mutations, which is that issue's fault built into this engine (`of` finds it by name):
`test_mutations.py` shows that the comparison sees it in this very case. Resuming, and what users read of a run, are in
`tests/train/test_upstream_runs.py`.

Issues that cannot happen here, for want of what they are about:

    NVIDIA/Megatron-LM 7452    1 (label smoothing), 3 and 4 (multi-token prediction), 6 (cross-attention), 7 (LLaVA), 8 (learnable attention
                               sinks): not built. The mechanisms of 4, 6, 7 and 8 (another replica's group, a norm that misses shards) are
                               tested below. 5, 10 and 11 have not been looked at: their text was not at hand.
    NVIDIA/Megatron-LM 3670    several optimizer instances: not built; that a reduction follows the gradients it sums is tested below
    pytorch/pytorch 160285     experts and their parallelism: not built
    pytorch/torchtitan 1056    rowwise float8: not built
"""

from __future__ import annotations

import contextlib
import math
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megactl.config.schema import Run
from megactl.engine.data_parallel import GradientReducer
from megactl.engine.zero import ShardedOptimizer
from parity.cases import Case, Plan, with_settings
from parity.comparison import deviations, differing_bits, unequal_copies
from parity.corpus import VOCAB_SIZE, Corpus
from parity.harness import Parity
from parity.jobs import RankResult, train
from parity.mutations import MUTATIONS
from parity.pool import Pools, Worker

TOLERANCE = 1e-9
FP32_TOLERANCE = 1e-5
LLAMA = {"positions": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False}


def of(*names: str) -> list[Case]:
    """The cases in which these faults are seen."""
    return [MUTATIONS[name].case() for name in names]


def cases(*chosen: object) -> pytest.MarkDecorator:
    """One test for each Case, or pytest.param of one."""
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def later(case: Case) -> object:
    """A case that waits for the night: its mechanism is in another one of the same test."""
    return pytest.param(case, marks=pytest.mark.nightly)


# Overlap of communication and computation


@cases(
    *of("updated slices are not gathered", "gathered weights outlive the step", "the weights of the step before are gathered"),
    Case(tp=2, dp=2, zero=1, bucket=1, sp=True, steps=5),
    Case(dp=2, zero=2, bucket=1, micro_batches=3, steps=5),
)
def test_megatron_lm_663_an_overlapped_gather_brings_the_weights_of_this_step(parity: Parity, case: Case):
    """The loss did not fall with --overlap-param-gather: forward ran with weights from before the update.

    The loss of each step is that of a process which holds the weights whole, and it moves by far more than the bound.
    """
    assert not parity.deviations(case, TOLERANCE)
    losses = parity.reference(case).losses
    assert all(abs(one - other) > 1e-3 for one, other in pairwise(losses))


@cases(
    *of("a prefetched unit is freed before use", "the weights of the step before are gathered"),
    later(Case(dp=4, zero=3, prefetch=2, split_layers=True, norm="post", tied=False, steps=4)),
    Case(pp=2, dp=2, zero=3, vpp=2, prefetch=2, micro_batches=2, recompute="full"),
    Case(dp=2, zero=3, prefetch=2, model="bert", micro_batches=3),
)
def test_megatron_lm_950_weights_are_gathered_in_whatever_order_they_are_read(parity: Parity, case: Case):
    """Buckets were gathered in the order of the buffer. Where forward ran in another order, a bucket's old weights were used.

    Two buckets ahead, in backward order, through recomputation and through stages that take turns, each loss and gradient is right.
    """
    assert not parity.deviations(case, TOLERANCE)


@cases(
    *of("a bucket leaves before its gradients are there", "buckets leave before W"),
    later(Case(tp=2, dp=2, zero=1, bucket=1, sp=True, micro_batches=3)),
)
def test_megatron_lm_3670_a_bucket_is_reduced_after_its_gradients(parity: Parity, case: Case):
    """A reduction began before the hook on another stream had scaled the gradients (fixed by #3693).

    With a bucket for each unit, reduced as early as can be, gradients are right, and the same to the bit as without overlap.
    """
    results = parity.engine(case)
    assert not deviations(results, parity.reference(case), TOLERANCE)
    assert differing_bits(results, parity.engine(with_settings(case, overlap=False))) == []


def test_megatron_lm_3670_the_stream_that_reduces_waits_for_the_one_that_computes():
    """The same on a GPU, where order is between streams: a reduction on a stream of its own first waits for the caller's."""
    calls = mock.Mock()
    calls.stream.return_value = contextlib.nullcontext()
    reducer = SimpleNamespace(_beside=calls.beside, _reduce=calls.reduce)
    with mock.patch.multiple(torch.cuda, current_stream=lambda: "computes", stream=calls.stream):
        GradientReducer._launch(reducer, SimpleNamespace(sums_tokens=True))
    assert [call[0] for call in calls.mock_calls] == ["beside.wait_stream", "stream", "reduce"]
    assert calls.beside.wait_stream.call_args == mock.call("computes") and calls.stream.call_args == mock.call(calls.beside)


@cases(*of("a lone replica's gradients are added to themselves"), Case(zero=3, offload="optimizer,parameters", micro_batches=3, bucket=1))
def test_megatron_lm_6660_gradients_of_a_lone_replica_are_added_once(parity: Parity, case: Case):
    """In Megatron-FSDP a data-parallel group of one made the shard the bucket itself: gradients doubled with every micro-batch."""
    assert not parity.deviations(case, TOLERANCE)


# Tied embeddings


@cases(
    *of("tied gradients are not summed", "only one tied copy gets the sum"),
    Case(pp=2, dp=2, zero=1, bucket=1, micro_batches=3, steps=5),
    later(Case(pp=2, tp=2, zero=0, micro_batches=3, overlap=False, model="bert")),
)
def test_megatron_lm_656_a_tied_head_stays_tied(parity: Parity, case: Case):
    """Embedding and output matrix, which were to be one, were seen to drift apart while training with the distributed optimizer.

    After several updates the copies of the first and the last stage are equal to the bit, and equal to the one weight of one process.
    """
    results = parity.engine(case)
    assert not deviations(results, parity.reference(case), TOLERANCE)
    copies = case.tp * case.dp * (1 if case.schedule == "zb-v" else 2)
    assert unequal_copies(results, "embedding.tokens.weight", copies) == []


@cases(
    *of("shares of a tied copy meet other shares"),
    Case(pp=2, dp=2, zero=2, bucket=1, micro_batches=3),
    later(Case(pp=2, dp=2, zero=3, split="3,1", threshold=100)),
)
def test_megatron_lm_844_shares_of_a_tied_gradient_meet_their_counterparts(parity: Parity, case: Case):
    """The two copies lay at different places of their stages' buffers, so a rank added its share of one to another share of the other.

    Here a tied weight has a bucket of its own, cut alike in both stages; the stages below hold different amounts of everything else.
    """
    assert not parity.deviations(case, TOLERANCE)


# Context parallelism


@cases(
    *of(
        "gradients of a divided sequence are summed over dp alone",
        "the loss is multiplied by the ranks of a sequence",
        "each rank of a sequence divides by its own tokens",
    ),
    Case(cp=2, dp=2, zero=1, documents="eod", scale=2.0**40, micro_batches=3),
    later(Case(cp=4, cp_method="all-to-all", documents="eod", zero=2)),
)
def test_megatron_lm_673_context_parallelism_does_not_scale_the_gradient(parity: Parity, case: Case):
    """The loss was multiplied by cp while gradients were averaged, or not, over the ranks of a sequence (again in #906; 9 of #7452).

    Ranks hold unequal numbers of tokens that count, so neither a sum for a mean nor a mean of means would pass.
    """
    assert not parity.deviations(case, TOLERANCE)


@cases(*of("each rank of a sequence takes the mean of its own tokens"), later(Case(cp=2, dp=2, model="bert", micro_batches=1)))
def test_megatron_lm_1764_a_rank_whose_tokens_are_all_masked_is_no_nan(parity: Parity, case: Case):
    """Where all tokens on one rank were masked, its loss was 0 / 0 and so was everyone's."""
    assert not parity.deviations(case, TOLERANCE)
    first = parity.corpus(case).batch(0, 1).loss_mask.view(case.cp, -1).sum(1)
    assert first[0] > 0 == first[1], "no rank is without tokens in this case"


@cases(
    *of("a later stage's angles are those of whole sequences"),
    Case(cp=2, pp=2, vpp=2, **LLAMA, kv_heads=4, micro_batches=2, zero=2),
    later(Case(cp=2, pp=2, schedule="zb-v", **LLAMA, cp_method="all-to-all", micro_batches=3, dropout=0.1)),
    later(Case(cp=2, pp=2, dp=2, **LLAMA, zero=3, documents="reset", micro_batches=3)),
)
def test_torchtitan_771_every_stage_cuts_its_angles(parity: Parity, case: Case):
    """Rotary angles were cut along the sequence in the model, but the stages had tables of their own: PP with CP did not converge."""
    assert not parity.deviations(case, TOLERANCE)


# Tensor and sequence parallelism


@cases(
    *of("padding counts in the softmax"),
    Case(tp=4, tied=False),
    later(Case(tp=2, dp=2, zero=3, bucket=1, tied=False)),
    Case(tp=2, model="bert", sp=True),
)
def test_megatron_lm_1736_a_vocabulary_that_tp_does_not_divide_gives_the_loss_of_one_process(parity: Parity, case: Case):
    """The loss at tp 2 was not that of one GPU; where tp did not divide the vocabulary, #1754 measured half of it as error.

    The reference has no padding at all; the padded rows have no part in the softmax, no gradient, and stay zero through the updates.
    """
    assert VOCAB_SIZE % 4 and len(parity.reference(case).weights["embedding.tokens.weight"]) == VOCAB_SIZE
    results = parity.engine(case)
    assert not deviations(results, parity.reference(case), TOLERANCE)
    assert all(result.facts["padding_weight"] == result.facts["padding_gradient"] == 0.0 for result in results)


def test_megatron_lm_7452_2_the_loss_is_not_off_by_the_logarithm_of_tp(parity: Parity):
    """Logits that had been gathered went through the cross entropy of shards: the loss was too large by log(tp), gradients wrong."""
    name = "every rank's logits count in the softmax"
    (case,) = of(name)
    assert not parity.deviations(case, TOLERANCE)
    wrong = parity.engine(case, mutation=name)[0].losses[0] - parity.reference(case).losses[0]
    assert wrong == pytest.approx(math.log(2), rel=1e-9), "the fault is not the one that was reported"


@cases(
    *of("tokens are gathered over the ranks of another replica", "shares of saved inputs change places"),
    Case(tp=2, dp=2, recompute="full", partition=True, micro_batches=3, dropout=0.1),
)
def test_megatron_lm_7452_4_6_7_tokens_and_saved_inputs_come_from_the_own_replica(parity: Parity, case: Case):
    """Gathers over the global tensor-parallel group, where a module had been given another, mixed the tokens of replicas."""
    assert not parity.deviations(case, TOLERANCE)


@cases(
    *of("divided tensors enter the norm on the first rank alone", "copies enter the norm on every rank"),
    Case(tp=2, dp=2, zero=3, threshold=100, **LLAMA, kv_heads=4),
    Case(tp=2, pp=2, sp=True, model="bert"),
)
def test_megatron_lm_7452_8_the_norm_counts_each_gradient_once(parity: Parity, case: Case):
    """Attention sinks, divided by heads, were not marked as divided: the norm that clips had those of one rank only."""
    assert case.clip and not parity.deviations(case, TOLERANCE)


@cases(
    *of("gradients of RMSNorm are not summed over the tensor-parallel ranks"),
    later(Case(tp=2, dp=2, zero=2, **LLAMA, sp=True, micro_batches=3, dropout=0.1)),
    Case(tp=2, normalization="rmsnorm", norm="post"),
)
@pytest.mark.parametrize("ops", ["compiled", "torch"])
def test_torchtitan_497_rmsnorm_under_tp_equals_one_process(parity: Parity, case: Case, ops: str):
    """A compiled RMSNorm gave bad loss curves under TP, while it was right alone and in its unit test."""
    assert not parity.deviations(case, TOLERANCE, ops=ops)


# Pipeline parallelism


@cases(
    *of("gradients are a sum over micro-batches"),
    Case(pp=2, dp=2, zero=2, schedule="gpipe", micro_batches=3),
    Case(pp=2, dp=2, zero=3, micro_batches=4, recompute="full"),
    later(Case(pp=2, dp=2, zero=3, micro_batches=4, ramp=True)),
)
def test_torchtitan_771_zero_with_a_pipeline_equals_one_process(parity: Parity, case: Case):
    """FSDP with PP differed from FSDP alone, and with recomputation from without: gradients were not divided by the micro-batches.

    Fewer, as many and more micro-batches than stages give the gradient of the whole batch, with recomputation and without.
    """
    assert not parity.deviations(case, TOLERANCE)


def test_torchtitan_771_fp32_parameters_with_fsdp_pp_and_cp(parity: Parity):
    """FSDP with PP and CP failed where parameters stayed in float32."""
    case = Case(cp=2, pp=2, zero=3, **LLAMA, precision="fp32", micro_batches=3)
    assert not parity.deviations(case, FP32_TOLERANCE)


def _in_filled_memory(worker: Worker, run: Run, corpus: Corpus, plan: Plan, faulty: bool) -> RankResult:
    """What the rank does where torch fills new memory with NaN; `faulty` takes the optimizer's moments as they come."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(8).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
        fault = mock.patch.object(ShardedOptimizer, "_new_state", lambda self, n: torch.empty(n, dtype=self.flat.main_dtype))
        with fault if faulty else contextlib.nullcontext():
            return train(worker, run, corpus, plan)
    finally:
        torch.use_deterministic_algorithms(False)


@cases(
    Case(pp=2, dp=2, zero=3, micro_batches=3, dropout=0.1),
    Case(pp=2, dp=2, zero=1, schedule="zb-v", micro_batches=3, bucket=1),
    later(Case(pp=2, tp=2, sp=True, vpp=2, micro_batches=2, **LLAMA)),
    Case(pp=2, cp=2, zero=2, micro_batches=3, attention="unfused"),
)
def test_torchtitan_771_deterministic_algorithms_give_no_nan(parity: Parity, pools: Pools, case: Case):
    """With training.deterministic, FSDP and PP gave NaN within five steps: torch then fills new memory, and something read it.

    Every number is the same to the bit, so nothing reads what nobody has written; where something does, it is seen.
    """
    arguments = case.run(), parity.corpus(case), case.plan()
    assert differing_bits(pools.run(case.world_size, _in_filled_memory, *arguments, False), parity.engine(case)) == []


def test_torchtitan_771_memory_that_is_read_unwritten_is_seen(parity: Parity, pools: Pools):
    """The test above can fail: moments that nobody has set to zero."""
    case = Case(dp=2, zero=1)
    results = pools.run(2, _in_filled_memory, case.run(), parity.corpus(case), case.plan(), True)
    assert all(math.isnan(result.losses[1]) for result in results)


@cases(
    *of("the loss stays on the last stage", "the last rank reports the loss of a V"),
    Case(tp=2, pp=2, documents="eod"),
    later(Case(pp=2, cp=2, vpp=2, micro_batches=2, documents="eod")),
)
def test_torchtitan_547_every_rank_knows_the_loss(parity: Parity, case: Case):
    """Under PP the first rank, which prints, had no loss and wrote -1 (again in #931 and #1232, for a V on the other ranks)."""
    results, reference = parity.engine(case), parity.reference(case)
    assert not deviations(results, reference, TOLERANCE)
    assert results[0].losses == pytest.approx(reference.losses, rel=TOLERANCE) and results[0].losses == results[-1].losses
