"""Parameter counts against the seed's formula, the published table, and each other."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megactl.config.schema import Model
from megactl.costmodel.parameters import (
    SHARDED_PARTS,
    padded_vocab,
    parameter_parts,
    rank_parameters,
    seed_formula,
    split_layers,
    stage_parts,
    total_parameters,
)
from megactl.errors import ConfigError

SHARED = Path(__file__).resolve().parents[3] / "shared"
TABLE = SHARED / "data" / "seed-tables" / "aux_msize_architectures.csv"
GPT_1_3B = Model(num_layers=24, hidden_size=2048, num_heads=16, vocab_size=50257)


@pytest.mark.skipif(not TABLE.exists(), reason="the published tables are not beside the repository")
def test_rows_of_the_published_table() -> None:
    rows = list(csv.DictReader(TABLE.open()))
    assert rows
    for row in rows:
        hidden, layers, seq, vocab = (int(row[key]) for key in ("hidden", "layers", "seq", "vocab"))
        model = Model(num_layers=layers, hidden_size=hidden, num_heads=int(row["heads"]), vocab_size=vocab)
        expected = int(row["params_formula"])
        assert total_parameters(model, seq_length=seq) == expected
        assert seed_formula(num_layers=layers, hidden_size=hidden, vocab_size=vocab, seq_length=seq) == expected
        # The table pads to 128 x tp, as Megatron does.
        padded = replace(model, vocab_size=int(row["vocab_padded_tp4"]))
        assert total_parameters(padded, seq_length=seq) == int(row["params_padded_vocab_tied"])


def test_gpt2_small_is_the_published_124439808() -> None:
    model = Model(num_layers=12, hidden_size=768, num_heads=12, vocab_size=50257, max_positions=1024)
    assert total_parameters(model) == 124_439_808
    parts = parameter_parts(model)
    assert parts["word_embeddings"] == 50257 * 768 and parts["output_head"] == 0
    assert parts["position_embeddings"] == 1024 * 768
    assert total_parameters(replace(model, untie_embeddings=True)) == 124_439_808 + 50257 * 768


def test_bert_base_is_the_published_109482240() -> None:
    """The encoder with its pooler (Hugging Face's bert-base-uncased), and with the heads of pre-training 110106428."""
    model = Model(
        architecture="bert", norm_position="post", num_layers=12, hidden_size=768, num_heads=12, vocab_size=30522, max_positions=512
    )
    parts = parameter_parts(model)
    assert sum(parts.values()) == total_parameters(model) == 110_106_428
    classes = 2 * 768 + 2
    assert total_parameters(model) - parts["mlm_head"] - parts["output_bias"] - classes == 109_482_240
    assert total_parameters(replace(model, sentence_head=False)) == 110_106_428 - parts["sentence_head"]


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("changes", [{}, {"untie_embeddings": True}, {"ffn_size": 80}, {"sentence_head": False}], ids=str)
def test_counts_are_those_of_the_model_that_is_built(architecture: str, norm: str, changes: dict[str, object]) -> None:
    torch = pytest.importorskip("torch")
    from megactl.engine.models import MODELS

    config = Model(
        num_layers=3, hidden_size=32, num_heads=4, vocab_size=101, max_positions=17, architecture=architecture, norm_position=norm
    )
    config = replace(config, **changes)
    with torch.device("meta"):
        model = MODELS[architecture](config)
    assert sum(p.numel() for p in model.parameters()) == total_parameters(config)


@given(
    architecture=st.sampled_from(["gpt", "bert"]),
    norm=st.sampled_from(["pre", "post"]),
    layers=st.integers(1, 4),
    pp=st.integers(1, 4),
    tp=st.sampled_from([1, 2, 4, 8]),
    vocab=st.integers(1, 1000),
    untied=st.booleans(),
)
def test_ranks_together_hold_the_model(architecture: str, norm: str, layers: int, pp: int, tp: int, vocab: int, untied: bool) -> None:
    """Sharded parts of all tp ranks add up; the rest is held tp times; a tied head is a second copy under pipelining."""
    model = Model(
        num_layers=layers * pp, hidden_size=64, num_heads=8, vocab_size=vocab, max_positions=10, untie_embeddings=untied,
        architecture=architecture, norm_position=norm,
    )  # fmt: skip
    whole = parameter_parts(replace(model, vocab_size=padded_vocab(vocab, tp)))
    stages = [stage_parts(model, tp=tp, num_stages=pp, stage=stage) for stage in range(pp)]
    held = {part: sum(stage[part] for stage in stages) for part in whole}
    h = 64
    row_biases = {"attention": layers * pp * h, "mlp": layers * pp * h}
    for part in whole:
        kept_whole = row_biases.get(part, 0 if part in SHARDED_PARTS else whole[part])
        expected = (whole[part] - kept_whole) // tp + kept_whole
        if part == "output_head" and not untied and pp > 1:
            expected = whole["word_embeddings"] // tp
        assert held[part] == expected, part
    assert rank_parameters(model, tp=tp, pp=pp) == tuple(sum(stage.values()) for stage in stages)
    assert padded_vocab(vocab, tp) % 128 == 0 and padded_vocab(vocab, tp) % tp == 0
    assert vocab <= padded_vocab(vocab, tp) < vocab + 128


def test_padded_vocabulary() -> None:
    assert [padded_vocab(50257, tp) for tp in (1, 4, 8)] == [50304, 50304, 50304]
    assert padded_vocab(50257, 3) == 50304 and padded_vocab(50304, 1) == 50304
    assert padded_vocab(50257, 5) == 50560 == 79 * 640


def test_layers_are_split_evenly_or_refused() -> None:
    assert split_layers(6, 3) == (range(0, 2), range(2, 4), range(4, 6))
    assert split_layers(5, 1) == (range(0, 5),)
    rule = "num_layers = 24: must be a multiple of the 7 stages; set pipeline_parallel to 6 or num_layers to 28"
    with pytest.raises(ConfigError, match=rule):
        split_layers(24, 7)
    with pytest.raises(ConfigError, match="num_layers = 4"):
        split_layers(4, 0)
    with pytest.raises(ConfigError, match="pipeline_parallel to 4 or num_layers to 8"):
        split_layers(4, 8)


def counts(num_layers: int, num_stages: int, split: str) -> list[int]:
    stages = split_layers(num_layers, num_stages, split)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    return [len(stage) for stage in stages]


def test_layers_are_split_as_told() -> None:
    assert counts(24, 4, "5,7,7,5") == [5, 7, 7, 5]
    assert counts(24, 4, " 5, 7 ,7,5") == [5, 7, 7, 5]
    assert counts(22, 4, "embedding,head") == [5, 6, 6, 5]
    assert counts(23, 4, "embedding") == [5, 6, 6, 6]
    assert counts(23, 4, "head") == [6, 6, 6, 5]
    # What is left goes to late stages, which hold few micro-batches, but not to the last one, which has the logits.
    assert counts(24, 4, "embedding,head") == [5, 7, 7, 5]
    assert counts(25, 4, "embedding,head") == [6, 7, 7, 5]
    assert counts(24, 4, "head") == [6, 6, 7, 5]
    # The embedding and the head are work enough for a stage; in between one without layers would do nothing.
    assert counts(4, 4, "embedding,head") == [0, 2, 2, 0]
    assert counts(4, 4, "0,2,2,0") == [0, 2, 2, 0]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("2,0,1,1", "leaves stage 1 without layers.*such as --pp-split 1,1,1,1"),
        ("1,1,1", "has 3 numbers for 4 stages.*such as --pp-split 1,1,1,1"),
        ("1,1,1,2", "has 5 layers, and the model has 4"),
        ("1,1,2,-0", "must be numbers of layers, or embedding, head or both"),
        ("embedding,embedding", "must be numbers of layers"),
        ("embedding,4", "must be numbers of layers"),
        ("", "must be numbers of layers"),
    ],
)
def test_splits_that_do_not_fit(split: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_layers(4, 4, split)


def test_a_model_too_small_for_its_stages() -> None:
    with pytest.raises(ConfigError, match="use fewer stages than the 1 layers"):
        split_layers(1, 4, "embedding,head")
    with pytest.raises(ConfigError, match="such as --pp-split 0,1,1,0"):
        split_layers(2, 4, "1,0,0,1")


@pytest.mark.parametrize(("schedule", "vpp"), [("1f1b", 2), ("1f1b", 4), ("zb-v", 1)])
def test_a_rank_holds_all_its_virtual_stages(schedule: str, vpp: int) -> None:
    model = Model(num_layers=32, hidden_size=64, num_heads=8, vocab_size=500, max_positions=10)
    num_stages = 4 * (2 if schedule == "zb-v" else vpp)
    stages = [sum(stage_parts(model, tp=2, num_stages=num_stages, stage=stage).values()) for stage in range(num_stages)]
    held = rank_parameters(model, tp=2, pp=4, schedule=schedule, virtual_pipeline=vpp)
    assert sum(held) == sum(stages)
    # The V brings the last stage, with the head, back to the first rank.
    expected = stages[0] + stages[-1] if schedule == "zb-v" else sum(stages[::4])
    assert held[0] == expected and held[0] != held[3]


def test_what_is_not_known_or_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size: is not known"):
        total_parameters(Model(), seq_length=8)
    with pytest.raises(ConfigError, match="max_positions: is not known"):
        total_parameters(GPT_1_3B)
    with pytest.raises(ConfigError) as error:
        rank_parameters(replace(GPT_1_3B, ffn_size=100), tp=3, pp=1, seq_length=8)
    assert len(error.value.problems) == 3
