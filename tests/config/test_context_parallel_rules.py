"""Context parallelism: which lengths and heads can be shared, and that its ranks share the optimizer."""

from __future__ import annotations

import pytest

from megactl.config.layout import nearest_layout
from megactl.config.load import load
from megactl.config.validate import Resolved, resolve
from megactl.errors import ConfigError


def resolved(text: str, world: int = 4, **model: object) -> Resolved:
    """gpt-tiny (4 heads, 4 layers) with `text`, as name=value words of sections parallel, training and model."""
    loaded = load(preset="gpt-tiny", assignments=["data.mock_data=true", *text.split()])
    return resolve(loaded.run, world_size=world, origins=loaded.origins, **model)


def problems(text: str, world: int = 4) -> list[str]:
    with pytest.raises(ConfigError) as error:
        resolved(text, world)
    return [str(problem) for problem in error.value.problems]


BERT = "model.architecture=bert"
RULES = [
    (
        "parallel.context_parallel=4 training.seq_length=100",
        "--cp 4: cuts a sequence into 8 chunks, two a rank, and --seq-length 100 is no multiple of 8; use --seq-length 96 or 104",
    ),
    (
        f"parallel.context_parallel=4 training.seq_length=102 {BERT}",
        "--cp 4: cuts a sequence into 4 parts, one a rank, and --seq-length 102 is no multiple of 4; use --seq-length 100 or 104",
    ),
    (
        "parallel.context_parallel=4 training.seq_length=102 parallel.context_method=all-to-all",
        "--cp 4: cuts a sequence into 4 parts, one a rank",
    ),
    (
        "parallel.context_parallel=4 parallel.tensor_parallel=2 parallel.context_method=all-to-all",
        "--cp 4 with --cp-method all-to-all: trades tokens for heads, and must divide the 2 heads of a rank (--heads 4 (preset gpt-tiny), "
        "--tp 2); use --cp-method ring, or --cp 2",
    ),
    ("parallel.context_parallel=0", "--cp 0: must be at least 1"),
]


@pytest.mark.parametrize(("text", "message"), RULES)
def test_what_cannot_be_shared_is_said_with_numbers(text: str, message: str):
    found = problems(text, 8)
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    "text",
    [
        "parallel.context_parallel=4 training.seq_length=104",
        f"parallel.context_parallel=4 training.seq_length=100 {BERT}",
        "parallel.context_parallel=4 training.seq_length=100 parallel.context_method=all-to-all",
        "parallel.context_parallel=2 parallel.tensor_parallel=2 parallel.context_method=all-to-all",
        "parallel.context_parallel=4 parallel.tensor_parallel=2 parallel.context_method=ring",
    ],
)
def test_what_the_messages_say_to_use_is_accepted(text: str):
    assert resolved(text, 8).run.parallel.context_parallel > 1


def test_ranks_that_share_sequences_share_the_optimizer():
    derived = {item.key: (item.value, item.reason) for item in resolved("parallel.context_parallel=4").derived}
    assert derived["parallel.data_parallel"] == (1, "4 ranks / (tp 1 x pp 1 x cp 4)")
    assert derived["parallel.zero"] == (1, "cp > 1: each replica keeps a share of the optimizer")
    assert resolved("parallel.context_parallel=4 parallel.zero=1").run.parallel.zero == 1
    assert resolved("parallel.context_parallel=4 parallel.zero=0").run.parallel.zero == 0


def test_the_batch_counts_sequences_whatever_is_shared():
    run = resolved("parallel.context_parallel=2 training.micro_batch_size=3", 4).run
    assert run.parallel.data_parallel == 2 and run.training.global_batch_size == 6


def test_the_nearest_layout_has_a_cp_that_divides_the_sequence():
    run = load(
        preset="gpt-tiny",
        assignments=["data.mock_data=true", "parallel.context_parallel=8", "training.seq_length=12"],
    ).run
    assert nearest_layout(run, 6) == (1, 1, 6) and nearest_layout(run, 8) == (1, 1, 2)
