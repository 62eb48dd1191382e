"""What ZeRO 2 and 3 saved loads at any stage and layout, and the other way round: weights by shares, tiles as parts of one tensor."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from rank_parts import held, parts_of, remember  # noqa: E402

from megactl.config.schema import Model, Parallel, Run, Training  # noqa: E402
from megactl.engine.checkpoint import SingleProcess, load, load_full, save  # noqa: E402
from megactl.engine.state import pieces_to_load, pieces_to_save  # noqa: E402

SMALL = {"num_layers": 4, "hidden_size": 32, "num_heads": 4, "ffn_size": 96, "vocab_size": 50, "max_positions": 16}
MODELS = {"gpt": Model(**SMALL), "bert": Model(architecture="bert", sentence_head=True, norm_position="post", **SMALL)}


def layout(tp: int = 1, pp: int = 1, dp: int = 1, **others) -> Parallel:
    """Degrees and what is shared; the threshold lets small parameters stay whole."""
    return Parallel(
        tensor_parallel=tp, pipeline_parallel=pp, data_parallel=dp, bucket_size=2000, **{"persistence_threshold": 200, **others}
    )


def run_of(model: Model, parallel: Parallel, *, seed: int, precision: str) -> Run:
    """A run of a model in a layout."""
    return Run(model=model, parallel=parallel, training=Training(seq_length=16, seed=seed, precision=precision))


MOVES = [
    (layout(dp=2, zero=3), layout(dp=4, zero=1)),
    (layout(tp=2, dp=2, zero=2), layout(pp=2, dp=2, zero=3, tile=2)),
    (layout(dp=2, zero=3, tile=4, split_layers=True, persistence_threshold=0), layout(tp=2, zero=0)),
    (layout(zero=0), layout(dp=3, zero=3, split_layers=True)),
    (layout(tp=2, pp=2, dp=2, zero=3, tile=2), layout(tp=2, dp=2, zero=3, tile=4)),
]


@pytest.mark.parametrize(("name", "precision"), [("gpt", "bf16"), ("bert", "fp32")])
@pytest.mark.parametrize(("saved", "loaded"), MOVES)
def test_stages_and_tiles_move_to_others(tmp_path, kit, name, precision, saved, loaded):
    model, pieces = MODELS[name], []
    for part, mesh in parts_of(run_of(model, saved, seed=1, precision=precision)):
        remember(part)
        pieces += pieces_to_save([part], mesh)
    path = save(
        tmp_path, step=1, pieces=pieces, header=kit.header() | {"precision": precision}, group=SingleProcess(), keep=0, protect=None
    )
    other, same = (parts_of(run_of(model, loaded, seed=seed, precision=precision)) for seed in (2, 1))
    for (part, _), (expected, _) in zip(other, same, strict=True):
        remember(expected)
        load(path, pieces_to_load([part]))
        assert all(torch.equal(one, other) for one, other in zip(held(part), held(expected), strict=True))


def test_tiles_have_the_names_and_shapes_of_one_linear(tmp_path, kit):
    found = []
    for parallel in (layout(zero=0), layout(dp=2, zero=3, tile=4, persistence_threshold=0)):
        run = run_of(MODELS["gpt"], parallel, seed=1, precision="fp32")
        pieces = [piece for part, mesh in parts_of(run) for piece in pieces_to_save([part], mesh)]
        root = tmp_path / str(len(found))
        found.append(load_full(save(root, step=1, pieces=pieces, header=kit.header(), group=SingleProcess(), keep=0, protect=None)))
    one, tiled = found
    assert one.keys() == tiled.keys() and all(torch.equal(one[name], tiled[name]) for name in one)
