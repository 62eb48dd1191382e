"""Pipelines with backward in two parts, several stages a rank, other splits: each equals one process to 1e-9, and its faults are seen."""

from __future__ import annotations

import weakref
from functools import partial
from itertools import pairwise
from unittest import mock

import pytest

from megactl.engine import pipeline, training_step
from megactl.engine.collectives import exchange
from megactl.engine.data_parallel import GradientReducer
from megactl.engine.trace import Recorder, Span
from megactl.schedules import Kind, Schedule, build, generate, in_slots, premature
from parity.cases import Case, with_settings
from parity.comparison import deviations, differing_bits, unequal_copies
from parity.harness import Parity
from parity.jobs import RankResult, source, train
from parity.pool import Pools, Worker

TOLERANCE = 1e-9


def train_and_count(worker: Worker, case: Case, corpus) -> tuple[RankResult, int]:
    """What the rank did, and the bytes that it sent to other stages."""
    sent = 0

    def counting(sends, receives, group):
        nonlocal sent
        sent += sum(tensor.nbytes for tensor, _ in sends)
        assert all(tensor.is_contiguous() for tensor, _ in (*sends, *receives))
        return exchange(sends, receives, group)

    with mock.patch.object(pipeline, "exchange", counting):
        return train(worker, case.run(), corpus, case.plan()), sent


def trace(worker: Worker, case: Case, corpus) -> list[Span]:
    """When each computation of a step ran on this rank."""
    run = case.run()
    mesh = worker.mesh(run.parallel)
    engine, batches = training_step.TrainingStep(run, mesh), source(run, corpus, mesh)
    engine.executor.recorder = Recorder(mesh.pp.rank, mesh.device)
    engine.step(1, partial(batches, 0), global_batch_size=run.training.global_batch_size, learning_rate=0.01)
    return engine.executor.recorder.spans()


def launches(worker: Worker, case: Case, corpus) -> list[list[int]]:
    """For each stage of this rank, how much work was left on the queue when each bucket left in the only step; -1 without a queue."""
    run = case.run()
    mesh = worker.mesh(run.parallel)
    engine, batches = training_step.TrainingStep(run, mesh), source(run, corpus, mesh)
    found = {id(part.reducer): [] for part in engine.parts}
    launch = GradientReducer._launch

    def noting(self, bucket):
        found[id(self)].append(-1 if self._deferred is None else len(self._deferred))
        return launch(self, bucket)

    with mock.patch.object(GradientReducer, "_launch", noting):
        engine.step(1, partial(batches, 0), global_batch_size=run.training.global_batch_size, learning_rate=0.01)
    return list(found.values())


def kept_outputs(worker: Worker, case: Case, corpus) -> list[int]:
    """At each backward of a step on this rank: how many outputs of its stages are still there."""
    run = case.run()
    mesh = worker.mesh(run.parallel)
    engine, batches = training_step.TrainingStep(run, mesh), source(run, corpus, mesh)
    outputs, found, backward = [], [], pipeline._Step._backward
    for part in engine.parts:
        part.model.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))

    def noting(self, *arguments):
        found.append(sum(output() is not None for output in outputs))
        return backward(self, *arguments)

    with mock.patch.object(pipeline._Step, "_backward", noting):
        engine.step(1, partial(batches, 0), global_batch_size=run.training.global_batch_size, learning_rate=0.01)
    return found


def show(case: Case) -> str:
    return case.name


def in_two_parts(schedule: Schedule, delay: int) -> Schedule:
    """The schedule with each B as I, and its W `delay` backwards later on the same rank (or at the end)."""
    orders = []
    for rank in range(schedule.num_ranks):
        order, waiting = [], []
        for action in schedule.programs[rank]:
            stage, m = action.virtual_stage, action.microbatch
            order.append((Kind.I if action.kind is Kind.B else action.kind, stage, m))
            if action.kind is Kind.B:
                waiting.append((Kind.W, stage, m))
                order += [waiting.pop(0)] if len(waiting) > delay else []
        orders.append(order + waiting)
    return build("in two parts", orders, num_microbatches=schedule.num_microbatches, stage_to_rank=schedule.stage_to_rank)


def train_in_two_parts(worker: Worker, case: Case, corpus, delay: int) -> RankResult:
    made = lambda *arguments, **options: in_two_parts(generate(*arguments, **options), delay)  # noqa: E731
    with mock.patch.object(training_step, "generate", made):
        return train(worker, case.run(), corpus, case.plan())


# How many backwards later W runs: 0 is right behind its I.
TWO_PARTS = [
    (Case(micro_batches=3, dropout=0.1), 0),
    (Case(dp=2, zero=1, bucket=1, micro_batches=3), 1),
    (Case(pp=2, dp=2, zero=1, micro_batches=3, dropout=0.1, bucket=1), 2),
    (Case(tp=2, pp=2, micro_batches=3, model="bert", norm="post"), 2),
    (Case(pp=2, micro_batches=3, precision="bf16"), 1),
]


@pytest.mark.parametrize(("case", "delay"), TWO_PARTS, ids=lambda value: value.name if isinstance(value, Case) else f"later by {value}")
def test_backward_in_two_parts_is_the_same_bit_for_bit(parity: Parity, pools: Pools, case: Case, delay: int):
    """The same operations in the same order for each weight, only later."""
    split = pools.run(case.world_size, train_in_two_parts, case, parity.corpus(case), delay)
    assert differing_bits(split, parity.engine(case)) == []


STAGES = [
    Case(pp=2, vpp=2, micro_batches=3, model="bert", norm="post", dropout=0.1),
    Case(pp=2, vpp=2, dp=2, zero=1, micro_batches=4, documents="eod", bucket=1, tied=False),
    Case(pp=4, vpp=2, micro_batches=6, documents="reset", dropout=0.1),
    Case(pp=2, vpp=2, tp=2, micro_batches=2, dropout=0.1),
    Case(pp=2, schedule="zb-h1", micro_batches=3, dropout=0.1),
    Case(pp=2, schedule="zb-h2", micro_batches=3, model="bert", norm="post"),
    Case(pp=4, schedule="zb-h2", micro_batches=8, dropout=0.1),
    Case(pp=2, dp=2, zero=1, schedule="zb-v", micro_batches=3, bucket=1, dropout=0.1),
    Case(pp=2, tp=2, schedule="zb-v", micro_batches=3, model="bert", norm="post", dropout=0.1),
    Case(pp=4, schedule="zb-v", micro_batches=5, tied=False, documents="eod"),
]


SPLITS = [
    Case(pp=2, split="3,1", micro_batches=3, dropout=0.1),
    Case(pp=2, split="embedding,head", dp=2, zero=1, bucket=1, micro_batches=2, model="bert", norm="post"),
    # A first and a last stage without layers: the embedding, the head.
    Case(pp=4, split="0,2,2,0", micro_batches=4, documents="reset", dropout=0.1),
    Case(pp=2, vpp=2, split="0,3,1,0", dp=2, zero=1, bucket=1, micro_batches=4, norm="post", tied=False),
    Case(pp=2, schedule="zb-v", split="1,2,1,0", tp=2, micro_batches=3, model="bert", dropout=0.1),
]
STEPS = [
    Case(pp=2, vpp=2, micro_batches=4, ramp=True, documents="eod", dropout=0.1),
    Case(pp=2, schedule="zb-h1", micro_batches=3, ramp=True, overflow=True),
    Case(pp=2, dp=2, zero=1, schedule="zb-v", micro_batches=2, ramp=True, overflow=True, scale=2.0**40),
]
WITH_OTHERS = [
    # Recomputation fills the queue in its inner backward.
    Case(pp=2, schedule="zb-h1", micro_batches=3, recompute="full", dropout=0.1),
    Case(pp=2, schedule="zb-v", micro_batches=3, recompute="selective", attention="unfused", dropout=0.1, model="bert", norm="post"),
    # A bucket of ZeRO 2 and 3 is complete when its works are off the queue, in each micro-batch.
    Case(pp=2, dp=2, schedule="zb-h1", zero=2, micro_batches=3, bucket=1),
    Case(pp=2, dp=2, schedule="zb-v", zero=3, micro_batches=3, recompute="full", dropout=0.1),
]
NIGHTLY = [
    Case(pp=2, vpp=2, micro_batches=2, dropout=0.1),
    Case(pp=2, dp=2, zero=1, schedule="zb-h1", micro_batches=4, bucket=1, model="bert"),
    Case(pp=4, schedule="zb-h1", micro_batches=4, documents="reset", tied=False),
    Case(pp=2, schedule="zb-v", micro_batches=2),
    Case(pp=2, schedule="zb-v", micro_batches=4, dropout=0.1, documents="reset"),
    Case(pp=2, vpp=2, tp=2, micro_batches=2, recompute="full", partition=True, dropout=0.1),
    Case(pp=2, dp=2, vpp=2, zero=3, micro_batches=4, tile=2, tied=False),
    Case(pp=2, dp=2, schedule="zb-h2", zero=3, micro_batches=4, overlap=False, model="bert"),
    Case(tp=2, pp=4, vpp=2, micro_batches=6, dropout=0.1),
    Case(tp=2, pp=4, schedule="zb-h1", micro_batches=5, documents="reset"),
    Case(tp=2, pp=4, schedule="zb-h2", micro_batches=9, model="bert", dropout=0.1),
    Case(tp=2, pp=4, schedule="zb-v", micro_batches=8, model="bert", norm="post"),
    Case(tp=2, pp=2, dp=2, vpp=2, zero=1, bucket=1, micro_batches=3, dropout=0.1),
    Case(tp=2, pp=2, dp=2, schedule="zb-v", zero=1, bucket=1, micro_batches=3, dropout=0.1, ramp=True),
    Case(pp=4, dp=2, vpp=3, zero=0, micro_batches=5, tied=False),
    Case(pp=8, schedule="zb-v", micro_batches=16),
    Case(pp=8, vpp=2, micro_batches=8, scatter=False),
]


@pytest.mark.parametrize("case", [*SPLITS, *STEPS], ids=show)
def test_other_splits_and_steps_that_change_equal_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.parametrize("case", WITH_OTHERS, ids=show)
def test_schedules_with_other_techniques_equal_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("case", NIGHTLY, ids=show)
def test_more_layouts_equal_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.parametrize("case", STAGES, ids=show)
def test_schedules_equal_one_process(parity: Parity, case: Case):
    results, plan = parity.engine(case), case.plan()
    assert not deviations(results, parity.reference(case), TOLERANCE, plan.overflows, case.scales())
    # The copies of a tied embedding are equal to the bit, on two ranks or, under the V, in two stages of one.
    copies = case.tp * case.dp * (1 if case.schedule == "zb-v" else 2 if case.tied else 1)
    assert unequal_copies(results, "embedding.tokens.weight", copies) == []


SCATTERED = [
    Case(tp=2, pp=2, micro_batches=3, dropout=0.1),
    Case(tp=2, pp=2, vpp=2, micro_batches=2, model="bert"),
    Case(tp=2, pp=2, schedule="zb-v", micro_batches=2, precision="bf16"),
]


@pytest.mark.parametrize("case", SCATTERED, ids=show)
def test_scatter_gather_sends_a_share_and_changes_no_bit(parity: Parity, pools: Pools, case: Case):
    found = [pools.run(4, train_and_count, with_settings(case, scatter=on), parity.corpus(case)) for on in (True, False)]
    (shares, sent), (whole, sent_whole) = (zip(*ranks, strict=True) for ranks in found)
    assert differing_bits(shares, whole) == []
    assert all(sent) and [2 * count for count in sent] == list(sent_whole)


def test_without_tensor_parallelism_there_is_nothing_to_scatter(parity: Parity, pools: Pools):
    case = Case(pp=2, micro_batches=2)
    sent = [
        [count for _, count in pools.run(2, train_and_count, with_settings(case, scatter=on), parity.corpus(case))] for on in (True, False)
    ]
    run = case.run()
    hidden = run.training.micro_batch_size * run.training.seq_length * run.model.hidden_size * 8
    # Three steps of two micro-batches, and from the first stage an evaluation.
    assert sent[0] == sent[1] == [8 * hidden, 6 * hidden]


TRACED = [
    (Case(pp=4, micro_batches=8), 3 / 8),
    (Case(pp=4, vpp=2, micro_batches=8), 3 / (2 * 8)),
    (Case(pp=2, vpp=2, micro_batches=4), 1 / (2 * 4)),
    # (p - 1)(F + I - W) of m (F + I + W), with F = I = W.
    (Case(pp=4, schedule="zb-h1", micro_batches=8), 3 / (3 * 8)),
    (Case(pp=4, schedule="zb-h2", micro_batches=8), 0.0),
    (Case(pp=4, schedule="zb-v", micro_batches=8), 0.0),
]


@pytest.mark.parametrize(("case", "bubble"), TRACED, ids=lambda value: value.name if isinstance(value, Case) else "")
def test_the_bubble_of_what_was_executed_is_the_published_one(parity: Parity, pools: Pools, case: Case, bubble: float):
    """Counted in slots: the computations in the order in which the ranks ran them, each as soon as its inputs were there."""
    rows = pools.run(case.world_size, trace, case, parity.corpus(case))
    spans, stages = [span for row in rows for span in row], training_step.stage_ranks(case.run().parallel)
    counted = in_slots(spans, stages)
    # Slots without work between a rank's first and last computation: the next step may begin where this one has ended.
    assert counted.own_bubble / counted.ideal == pytest.approx(bubble, abs=1e-12)
    # The clock is one for all processes of a host: nothing began before what it reads was there.
    assert all(before[3] <= after[2] for row in rows for before, after in pairwise(row))
    assert premature(spans, len(stages)) == []


def test_buckets_leave_while_weight_gradients_are_computed(parity: Parity, pools: Pools):
    case = Case(pp=2, dp=2, zero=1, bucket=1, schedule="zb-h1", micro_batches=4)
    *first_stage, (one,), (other,) = pools.run(4, launches, case, parity.corpus(case))
    # Nobody waits for the first stage's input gradient, so its backward is whole. The last one sends a bucket off for each of its units:
    # head, norm, two layers, and the tied copy, which comes with the head.
    assert all(left == -1 for rank in first_stage for stage in rank for left in stage)
    assert one == other == sorted(one, reverse=True) and one[0] > 20 and one[-1] == 0 and len(set(one)) >= 4, one


@pytest.mark.parametrize("schedule", ["gpipe", "zb-v"])
def test_outputs_that_were_sent_are_not_kept(parity: Parity, pools: Pools, schedule: str):
    case = Case(pp=2, schedule=schedule, micro_batches=4)
    found = pools.run(2, kept_outputs, case, parity.corpus(case))
    assert all(len(rank) == (8 if schedule == "zb-v" else 4) for rank in found)
    # A last stage hands its logits over to the loss, which keeps them until its own backward.
    last = 0 if schedule == "zb-v" else 1
    assert not any(found[1 - last])
