"""Host bytes by hand, and what they take off the device's estimate."""

from __future__ import annotations

import pytest

from megactl.config.schema import Model
from megactl.costmodel.memory import Layout, estimate_stage
from megactl.costmodel.offload import LANES, PIECE, host_bytes

MODEL = Model(num_layers=8, hidden_size=1024, num_heads=16, vocab_size=51200, max_positions=512)
P = 10**9


def of(what: str, *, zero: int = 0, replicas: int = 1, weight: int = 2, largest: int = PIECE) -> int:
    targets = frozenset(what.split(","))
    return host_bytes(targets, parameters=P, zero=zero, replicas=replicas, weight=weight, main=4, largest=largest)


@pytest.mark.parametrize(
    ("settings", "state", "staged"),
    [
        ({"what": "optimizer"}, 12 * P, 6),
        ({"what": "optimizer", "replicas": 4}, 12 * P, 6),
        ({"what": "optimizer", "replicas": 4, "zero": 1}, 3 * P, 6),
        ({"what": "optimizer", "weight": 4}, 12 * P, 4),
        ({"what": "optimizer,parameters", "zero": 3, "replicas": 4}, 14 * P // 4, 4),
        ({"what": "optimizer,parameters", "zero": 3, "weight": 4}, 12 * P, 4),
        ({"what": "parameters", "zero": 3, "replicas": 4}, P // 2, 0),
        ({"what": "parameters", "zero": 3, "weight": 4}, 4 * P, 0),
        ({"what": "activations"}, 0, 0),
        ({"what": "optimizer", "largest": 1000}, 12 * P, 6 * 1000 / PIECE),
    ],
)
def test_bytes_by_hand(settings, state, staged):
    assert of(**settings) == state + int(LANES * PIECE * staged)


def estimate(what: str, **settings):
    base = {"seq_length": 512, "micro_batch_size": 1, "num_microbatches": 1, "precision": "bf16", "zero": 3, "recompute": "full"}
    # All weights are shared out; small ones that are not stay on the device.
    base["persistence_threshold"] = 0
    return estimate_stage(MODEL, Layout(**base | settings, offload=frozenset(what.split(",")) - {""}), 0)


def test_what_the_host_takes_the_device_has_not():
    none, optimizer, both = (estimate(what) for what in ("", "optimizer", "optimizer,parameters"))
    assert (none.host, none.optimizer, none.weights) == (0, 12 * none.parameters, 2 * none.parameters)
    assert (optimizer.optimizer, optimizer.weights) == (0, none.weights) and both.weights == both.optimizer == 0
    assert none.total - optimizer.total == 12 * none.parameters and optimizer.total - both.total == 2 * none.parameters
    alone = estimate("optimizer,parameters,activations")
    assert alone.host - both.host == 8 * 2 * 512 * 1024 and alone.activations == both.activations - 8 * 2 * 512 * 1024
