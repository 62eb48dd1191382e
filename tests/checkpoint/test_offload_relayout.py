"""Checkpoints do not know where the optimizer and the parameters were: saved with --offload, loaded without, and the other way round."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from dataclasses import replace  # noqa: E402

from rank_parts import held, parts_of, remember  # noqa: E402

from megactl.config.schema import Memory, Model, Parallel, Run, Training  # noqa: E402
from megactl.engine.checkpoint import SingleProcess, load, save  # noqa: E402
from megactl.engine.state import pieces_to_load, pieces_to_save  # noqa: E402

MODEL = Model(num_layers=4, hidden_size=32, num_heads=4, ffn_size=96, vocab_size=50, max_positions=16)


def setup(precision: str, what: str | None, seed: int, zero: int, **degrees: int) -> Run:
    names = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "dp": "data_parallel"}
    parallel = Parallel(zero=zero, bucket_size=2000, persistence_threshold=200, **{names[key]: n for key, n in degrees.items()})
    parallel = replace(parallel, data_parallel=degrees.get("dp", 1))
    return Run(
        model=MODEL, parallel=parallel, training=Training(seq_length=16, seed=seed, precision=precision), memory=Memory(offload=what)
    )


BOTH = "optimizer,parameters"
MOVES = [
    (("optimizer", {"zero": 1, "dp": 2}), (None, {"zero": 0})),
    ((None, {"zero": 1, "dp": 2}), ("optimizer", {"zero": 1, "dp": 3})),
    ((BOTH, {"zero": 3}), (None, {"zero": 3, "dp": 2})),
    ((None, {"zero": 2, "dp": 2, "tp": 2}), (BOTH, {"zero": 3, "dp": 2, "pp": 2})),
    (("parameters", {"zero": 3, "dp": 2}), (BOTH, {"zero": 3})),
    ((BOTH, {"zero": 3, "dp": 2}), ("parameters", {"zero": 3, "dp": 2})),
]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("saved", "loaded"), MOVES)
def test_what_was_elsewhere_is_found(tmp_path, kit, precision, saved, loaded):
    pieces = []
    for part, mesh in parts_of(setup(precision, saved[0], 1, **saved[1])):
        remember(part)
        pieces += pieces_to_save([part], mesh)
    header = kit.header() | {"precision": precision}
    path = save(tmp_path, step=1, pieces=pieces, header=header, group=SingleProcess(), keep=0, protect=None)
    # In fp32 the weight is its own master, wherever it lies.
    assert ("master" in {piece.kind for piece in pieces}) == (precision == "bf16")
    ranks = zip(parts_of(setup(precision, loaded[0], 2, **loaded[1])), parts_of(setup(precision, loaded[0], 1, **loaded[1])), strict=True)
    for (part, _), (expected, _) in ranks:
        remember(expected)
        load(path, pieces_to_load([part]))
        assert all(torch.equal(one, other) for one, other in zip(held(part), held(expected), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weights_alone_reach_the_masters_on_the_host(tmp_path, kit, precision):
    pieces = [piece for part, mesh in parts_of(setup(precision, None, 1, zero=0)) for piece in pieces_to_save([part], mesh)]
    header = kit.header() | {"precision": precision}
    path = save(tmp_path, step=1, pieces=pieces, header=header, group=SingleProcess(), keep=0, protect=None)
    (part, _), (expected, _) = (*parts_of(setup(precision, BOTH, 2, zero=3)), *parts_of(setup(precision, BOTH, 1, zero=3)))
    load(path, pieces_to_load([part], optimizer=False))
    assert all(torch.equal(a.master, b.master) for a, b in zip(part.optimizer.states, expected.optimizer.states, strict=True))
