"""The layout by rule of thumb, for any model and any number of GPUs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.config.schema import Model
from megactl.costmodel.layout_rule import check_layout, rule_of_thumb, suggest_layout
from megactl.errors import ConfigError

SMALL = Model(num_layers=24, hidden_size=1024, num_heads=16, vocab_size=50257)


@settings(deadline=None)
@given(node=st.sampled_from([1, 2, 4, 8, 16]), nodes=st.integers(1, 64), replicas=st.integers(1, 8))
def test_the_degrees_multiply_to_the_gpus(node: int, nodes: int, replicas: int) -> None:
    mp = node * nodes
    tensor, pipeline, data = rule_of_thumb(mp, gpus=mp * replicas, gpus_per_node=node)
    assert (tensor, pipeline, data) == (node, nodes, replicas)


def test_within_a_node_there_is_no_pipeline() -> None:
    assert rule_of_thumb(3, gpus=12, gpus_per_node=8) == (3, 1, 4)
    with pytest.raises(ConfigError, match="2 problems"):
        rule_of_thumb(9, gpus=64, gpus_per_node=8)


@settings(deadline=None)
@given(memory=st.floats(3.0, 30.0), gpus=st.sampled_from([1, 2, 4, 8, 16, 24]))
def test_a_suggestion_is_the_fewest_gpus_that_fit(memory: float, gpus: int) -> None:
    options = {"seq_length": 1024, "gpus": gpus, "gpus_per_node": 4}
    try:
        found = suggest_layout(SMALL, **options, gpu_memory_gib=memory)
    except ConfigError as error:
        assert "too few" in str(error)
        return
    assert found.needed_gib <= memory and found.model_parallel * found.data_parallel == gpus
    assert check_layout(SMALL, found.model_parallel, **options).needed_gib == found.needed_gib
    for fewer in (mp for mp in range(1, found.model_parallel) if gpus % mp == 0 and (mp <= 4 or mp % 4 == 0) and mp in (1, 2, 4, 8)):
        assert check_layout(SMALL, fewer, **options).needed_gib > memory


def test_a_model_that_no_degree_divides() -> None:
    odd = Model(num_layers=7, hidden_size=35, num_heads=5, vocab_size=100, ffn_size=35)
    assert suggest_layout(odd, seq_length=8, gpus=6, gpus_per_node=8, gpu_memory_gib=79).data_parallel == 6
    with pytest.raises(ConfigError, match="are too few"):
        suggest_layout(odd, seq_length=8, gpus=6, gpus_per_node=8, gpu_memory_gib=1)
