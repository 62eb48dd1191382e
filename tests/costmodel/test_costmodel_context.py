"""Memory under context parallelism: a layer keeps 1 / cp, and what attention itself keeps depends on the method."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megactl.config.schema import Model
from megactl.costmodel.memory import Layout, estimate_memory, layer_activations

MODEL = Model(num_layers=2, hidden_size=64, num_heads=8, vocab_size=100, max_positions=256, attention="unfused", attention_dropout=0.1)
LAYOUT = Layout(seq_length=256, micro_batch_size=2, num_microbatches=1, precision="bf16")
HEAD_ROWS = 2 * 256 * 8


def own(method: str, cp: int) -> int:
    """Bytes of a layer beyond those of selective recomputation: what attention itself keeps."""
    layout = replace(LAYOUT, context_parallel=cp, context_method=method)
    return layer_activations(MODEL, layout) - layer_activations(MODEL, replace(layout, recompute="selective"))


def test_a_ring_keeps_log_sum_exp_and_no_scores():
    # As tests/parity/test_context_traffic.py counts it: one number in fp32 for each row of each head.
    assert own("ring", 4) == 4 * HEAD_ROWS // 4


def test_all_to_all_keeps_the_scores_of_its_heads():
    # Probabilities before and after dropout, in bf16, of all queries and keys and a quarter of the heads.
    assert own("all-to-all", 4) == 2 * 2 * HEAD_ROWS * 256 // 4 == own("ring", 1) // 4


@pytest.mark.parametrize("method", ["ring", "all-to-all"])
@pytest.mark.parametrize("architecture", ["gpt", "bert"])
def test_fused_attention_leaves_a_share_of_everything(method: str, architecture: str):
    model = replace(MODEL, attention="auto", attention_dropout=0.0, architecture=architecture)
    whole, part = (layer_activations(model, replace(LAYOUT, context_parallel=cp, context_method=method)) for cp in (1, 4))
    mask = 2 * 2 * 256 if architecture == "bert" and method == "ring" else 0
    assert part == (whole - mask) // 4


def test_the_optimizer_is_shared_by_the_ranks_of_a_sequence():
    one, four = (estimate_memory(MODEL, replace(LAYOUT, context_parallel=cp, zero=1)) for cp in (1, 4))
    assert four.optimizer == -(-one.optimizer // 4) and four.weights == one.weights
    assert four.total < one.total
