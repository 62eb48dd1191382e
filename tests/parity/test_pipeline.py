"""Pipelines with backward in two parts, several stages a rank, other splits: each equals one process to 1e-9, and its faults are seen."""

from __future__ import annotations

from unittest import mock

import pytest

from megactl.engine import training_step
from megactl.schedules import Kind, Schedule, build, generate
from parity.cases import Case
from parity.comparison import differing_bits
from parity.harness import Parity
from parity.jobs import RankResult, train
from parity.pool import Pools, Worker

TOLERANCE = 1e-9


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


TWO_PARTS = [
    Case(micro_batches=3, dropout=0.1),
    Case(dp=2, zero=1, bucket=1, micro_batches=3),
    Case(pp=2, dp=2, zero=1, micro_batches=3, dropout=0.1, bucket=1),
    Case(tp=2, pp=2, micro_batches=3, model="bert", norm="post"),
    Case(pp=2, micro_batches=3, precision="bf16"),
]


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("case", TWO_PARTS, ids=show)
def test_backward_in_two_parts_is_the_same_bit_for_bit(parity: Parity, pools: Pools, case: Case, delay: int):
    """The same operations in the same order for each weight, only later."""
    split = pools.run(case.world_size, train_in_two_parts, case, parity.corpus(case), delay)
    assert differing_bits(split, parity.engine(case)) == []


STAGES = [
    Case(pp=2, vpp=2, micro_batches=2, dropout=0.1),
    Case(pp=2, vpp=2, micro_batches=3, model="bert", norm="post", dropout=0.1),
    Case(pp=2, vpp=2, dp=2, zero=1, micro_batches=4, documents="eod", bucket=1, tied=False),
    Case(pp=4, vpp=2, micro_batches=6, documents="reset", dropout=0.1),
    Case(pp=2, vpp=2, tp=2, micro_batches=2, dropout=0.1),
    Case(pp=2, schedule="zb-h1", micro_batches=3, dropout=0.1),
    Case(pp=2, dp=2, zero=1, schedule="zb-h1", micro_batches=4, bucket=1, model="bert"),
    Case(pp=4, schedule="zb-h1", micro_batches=4, documents="reset", tied=False),
    Case(pp=2, schedule="zb-h2", micro_batches=3, model="bert", norm="post"),
    Case(pp=4, schedule="zb-h2", micro_batches=8, dropout=0.1),
    Case(pp=2, schedule="zb-v", micro_batches=2),
    Case(pp=2, schedule="zb-v", micro_batches=4, dropout=0.1, documents="reset"),
    Case(pp=2, dp=2, zero=1, schedule="zb-v", micro_batches=3, bucket=1, dropout=0.1),
    Case(pp=2, tp=2, schedule="zb-v", micro_batches=3, model="bert", norm="post", dropout=0.1),
    Case(pp=4, schedule="zb-v", micro_batches=5, tied=False, documents="eod"),
]


@pytest.mark.parametrize("case", STAGES, ids=show)
def test_schedules_equal_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)
