"""Predicted checkpoint sizes: seed 003's breakdown of the 181B model, and sums that must hold for any layout."""

from __future__ import annotations

import csv
from math import ceil
from pathlib import Path

import pytest

from megactl.config.schema import Model
from megactl.costmodel.checkpoint import SYSTEMS, estimate_checkpoint, listed_size, padded_as_megatron, state_bytes, stored_elements
from megactl.costmodel.parameters import total_parameters

TABLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "seed-tables" / "003_19_checkpoint_breakdown_181b.csv"
GPT_181B = Model(num_layers=64, hidden_size=15360, num_heads=32, vocab_size=50257)
TIB, GIB = 2**40, 2**30


def up(number: float, digits: int) -> float:
    """Rounded up, as du -h does."""
    return ceil(number * 10**digits - 1e-9) / 10**digits


@pytest.mark.skipif(not TABLE.exists(), reason="the seeds' tables are not beside the repository")
def test_seed_003s_breakdown_of_the_181b_model():
    rows = {row["part"]: row for row in csv.DictReader(TABLE.open())}
    estimate = estimate_checkpoint(GPT_181B, precision="fp16", tp=4, pp=64, seq_length=1024)
    layers, states = rows["pp_layer_states"], rows["optimizer_states"]
    # The table's TB are TiB, and every figure is rounded up, as ls -h and du -h do.
    assert up(estimate.parts["weights"] / TIB, 2) == float(layers["total_tb"])
    assert up(estimate.optimizer / TIB, 1) == float(states["total_tb"])
    assert up(estimate.total / TIB, 1) == float(rows["total_stated"]["total_tb"])
    groups = {group.name: group for group in estimate.files if group.system == "deepspeed"}
    layer, optimizer = groups["layer_*-model_*-model_states.pt"], groups["mp_rank_*_model_states.pt (optimizer)"]
    for group, row in ((layer, layers), (optimizer, states)):
        assert group.count == int(row["files_multiplied_by_seed"])
        assert listed_size(group.each) == f"{float(row['per_file_gb'])}G"
    assert int(layers["bytes_per_param_stated"]) == 2 and int(states["bytes_per_param_stated"]) == 12
    assert estimate.total == 14 * estimate.parameters == 14 * total_parameters(GPT_181B, seq_length=1024)


@pytest.mark.parametrize(("precision", "total"), [("fp16", 14), ("bf16", 14), ("fp32", 12), ("fp64", 24)])
def test_bytes_a_parameter(precision, total):
    assert sum(state_bytes(precision).values()) == total
    assert ("master" in state_bytes(precision)) == (precision in ("fp16", "bf16"))


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("tp", "pp", "dp", "zero"), [(1, 1, 1, 0), (2, 1, 2, 1), (2, 4, 1, 0), (1, 2, 4, 1), (4, 4, 2, 1)])
def test_files_add_up(untied, tp, pp, dp, zero):
    model = Model(num_layers=8, hidden_size=64, num_heads=4, vocab_size=1000, untie_embeddings=untied)
    estimate = estimate_checkpoint(model, precision="bf16", tp=tp, pp=pp, dp=dp, zero=zero, seq_length=128)
    sums = {system: sum(group.total for group in estimate.files if group.system == system) for system in SYSTEMS}
    assert sums["megactl"] == estimate.total
    # Padding, replicated parameters and the tied head's copies only add.
    assert estimate.total <= sums["deepspeed"] <= sums["megatron"] < 1.5 * estimate.total
    for group in estimate.files:
        assert 0 < group.each <= group.largest and group.count > 0 and group.total <= group.count * group.largest
    stored = stored_elements(padded_as_megatron(model, tp), "megatron", tp=tp, pp=pp, seq_length=128)
    assert sums["megatron"] == 14 * stored.weights


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0"), (1023, "1023"), (1024, "1.0K"), (1025, "1.1K"), (10 * 1024, "10K"), (10 * 1024 + 1, "11K"), (1415000000, "1.4G"),
     (9 * GIB + 1, "9.1G"), (int(9.95 * GIB), "10G"), (2 * TIB, "2.0T")],
)  # fmt: skip
def test_sizes_as_ls_prints_them(size, shown):
    assert listed_size(size) == shown
