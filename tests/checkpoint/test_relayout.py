"""What was saved in one layout loads in any other: random tensors in random cuts, and the cuts that tensor parallelism and ZeRO make."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from rank_parts import parts_of  # noqa: E402

from megactl.config.schema import Model, Parallel, Run, Training  # noqa: E402
from megactl.engine.checkpoint import Piece, SingleProcess, load, load_full, save  # noqa: E402
from megactl.engine.models import MODELS  # noqa: E402
from megactl.engine.state import pieces_to_load, pieces_to_save  # noqa: E402
from megactl.storage.pieces import Region, clip  # noqa: E402

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


@st.composite
def cuts(draw, shape) -> list[Region]:
    """A random partition of a tensor: a grid of rectangles, each whole or in flat ranges."""
    rectangles = [()]
    for extent in shape:
        edges = [0, *sorted(draw(st.sets(st.integers(1, extent - 1), max_size=2))), extent] if extent > 1 else [0, extent]
        rectangles = [(*rectangle, edge) for rectangle in rectangles for edge in pairwise(edges)]
    regions = []
    for rectangle in rectangles:
        elements = Region(rectangle).elements
        inner = draw(st.sets(st.integers(1, elements - 1), max_size=3)) if elements > 1 else set()
        if inner or draw(st.booleans()):
            edges = [0, *sorted(inner), elements]
            regions += [Region(rectangle, edge) for edge in pairwise(edges)]
        else:
            regions.append(Region(rectangle))
    return regions


@st.composite
def problems(draw):
    """Shapes, a cut to save by, a cut to load by, and the rank of each saved piece."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    saved = [draw(cuts(shape)) for shape in shapes]
    owners = [[draw(st.integers(0, 2)) for _ in regions] for regions in saved]
    return shapes, saved, owners, [draw(cuts(shape)) for shape in shapes], draw(st.booleans())


def piece(name, kind, shape, region, tensor):
    return Piece(name, kind, shape, region.rectangle, region.flat_range, tensor)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_any_cut_loads_as_any_other(kit, problem):
    shapes, saved, owners, loaded, verify = problem
    tensors = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}

    def pieces(rank):
        return [
            piece(name, "exp_avg", shape, region, kit.take(tensors[name], region))
            for name, shape, regions, ranks in zip(tensors, shapes, saved, owners, strict=True)
            for region, owner in zip(regions, ranks, strict=True)
            if owner == rank
        ]

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        root = Path(folder)
        results = kit.run_threads(
            3, lambda group: save(root, step=1, pieces=pieces(group.rank), header=kit.header(), group=group, keep=0, protect=None)
        )
        assert results == [root / "step-00000001"] * 3
        requests = [
            piece(name, "exp_avg", shape, region, torch.full(region.shape, torch.nan))
            for name, shape, regions in zip(tensors, shapes, loaded, strict=True)
            for region in regions
        ]
        load(results[0], requests, verify=verify)
        for request in requests:
            assert torch.equal(request.tensor, kit.take(tensors[request.name], request.region))
        full = load_full(results[0], "exp_avg")
        assert full.keys() == tensors.keys() and all(torch.equal(full[name], tensors[name]) for name in tensors)


def zero_pieces(kit, tensor, name, axis, tp, dp, kind="master"):
    """A tensor split by `axis` over tp ranks, each part's row-major elements over dp ranks: {(t, d): piece}. axis None: replicated over tp.

    The split axis is padded to a multiple of tp, as vocabularies are; padding is clipped away.
    """
    shape, found = tuple(tensor.shape), {}
    for t in range(1 if axis is None else tp):
        box = [(0, extent) for extent in shape]
        if axis is not None:
            part = -(-shape[axis] // tp)
            box[axis] = (t * part, (t + 1) * part)
        size = Region(tuple(box)).elements
        share = -(-size // dp)
        for d in range(dp):
            flat = (min(size, d * share), min(size, (d + 1) * share))
            region = clip(Region(tuple(box), flat), shape) if flat[0] < flat[1] else None
            if region is not None:
                found[t, d] = piece(name, kind, shape, region, kit.take(tensor, region))
    return found


@pytest.mark.parametrize(("saved", "loaded"), [((1, 1), (2, 3)), ((4, 2), (2, 1)), ((2, 4), (4, 3)), ((3, 1), (1, 5)), ((2, 2), (2, 2))])
def test_tensor_parallel_and_zero_layouts(tmp_path, kit, saved, loaded):
    tensors = {"embedding.weight": (torch.randn(50, 6), 0), "qkv.weight": (torch.randn(24, 12), 0), "proj.weight": (torch.randn(12, 24), 1)}
    tensors |= {"norm.weight": (torch.randn(13), None), "qkv.bias": (torch.randn(24), 0)}

    def cut(tp, dp):
        return [p for name, (tensor, axis) in tensors.items() for p in zero_pieces(kit, tensor, name, axis, tp, dp).values()]

    pieces = cut(*saved)
    path = kit.run_threads(
        2, lambda group: save(tmp_path, step=1, pieces=pieces[group.rank :: 2], header=kit.header(), group=group, keep=0, protect=None)
    )[0]
    requests = cut(*loaded)
    expected = [request.tensor.clone() for request in requests]
    for request in requests:
        request.tensor.fill_(torch.nan)
    load(path, requests)
    assert all(torch.equal(request.tensor, value) for request, value in zip(requests, expected, strict=True))


def run_of(model, layout, seed):
    """A run in (tp, pp, dp, zero, settings of the pipeline)."""
    tp, pp, dp, zero, *pipeline = layout
    degrees = {"tensor_parallel": tp, "pipeline_parallel": pp, "data_parallel": dp, "zero": zero, "bucket_size": 2000}
    return Run(model=model, parallel=Parallel(**degrees, **dict(*pipeline)), training=Training(seq_length=16, seed=seed))


def states_of(part):
    """Copies of a part's weights and, for each bucket, of what it holds of the moments."""
    return [part.flat.params.clone(), *(kind.clone() for state in part.optimizer.states for kind in (state.exp_avg, state.exp_avg_sq))]


MODELS_TO_MOVE = {
    "gpt": Model(num_layers=4, hidden_size=32, num_heads=4, vocab_size=50, max_positions=16),
    "bert": Model(architecture="bert", sentence_head=True, num_layers=4, hidden_size=32, num_heads=4, vocab_size=200, max_positions=16),
    "bert-post": Model(
        architecture="bert", norm_position="post", untie_embeddings=True, num_layers=4, hidden_size=32, num_heads=4, vocab_size=50,
        max_positions=16,
    ),
}  # fmt: skip


V, INTERLEAVED, UNEVEN = {"schedule": "zb-v"}, {"virtual_pipeline": 2}, {"pipeline_split": "3,1"}
LAYOUT_PAIRS = [
    ((2, 1, 2, 1), (1, 4, 1, 0)),
    ((1, 2, 1, 0), (4, 1, 2, 1)),
    ((1, 2, 2, 1, INTERLEAVED), (2, 1, 1, 0)),
    ((2, 2, 1, 0, V), (1, 2, 2, 1, INTERLEAVED)),
    ((1, 2, 1, 0, UNEVEN), (1, 2, 2, 1, V)),
]


@pytest.mark.parametrize("name", MODELS_TO_MOVE)
@pytest.mark.parametrize(("saved", "loaded"), LAYOUT_PAIRS)
def test_models_move_between_layouts(tmp_path, kit, name, saved, loaded):
    """Weights and moments saved in one layout are, loaded in another, what that layout would have drawn itself."""
    pieces, model = [], MODELS_TO_MOVE[name]
    for part, mesh in parts_of(run_of(model, saved, seed=1)):
        for state in part.optimizer.states:
            state.exp_avg.copy_(state.param), state.exp_avg_sq.copy_(state.param.square())
        pieces += pieces_to_save([part], mesh)
    held = [(piece.name, piece.kind, piece.region) for piece in pieces]
    assert len(set(held)) == len(held), "each piece once"
    path = save(tmp_path, step=1, pieces=pieces, header=kit.header(), group=SingleProcess(), keep=0, protect=None)
    names = set()
    for (part, _), (expected, _) in zip(parts_of(run_of(model, loaded, seed=2)), parts_of(run_of(model, loaded, seed=1)), strict=True):
        for state in expected.optimizer.states:
            state.exp_avg.copy_(state.param), state.exp_avg_sq.copy_(state.param.square())
        load(path, pieces_to_load([part]))
        assert all(torch.equal(one, other) for one, other in zip(states_of(part), states_of(expected), strict=True))
        names |= part.flat.names
    with torch.device("meta"):
        whole = MODELS[model.architecture](model)
    assert names == {whole.canonical_name(own) for own, _ in whole.named_parameters()} == {piece.name for piece in pieces}


def test_the_usual_resume_reads_only_its_own_file(tmp_path, kit):
    weight = torch.randn(8, 4)
    halves = [piece("w", "weight", (8, 4), Region(((4 * r, 4 * r + 4), (0, 4))), weight[4 * r : 4 * r + 4]) for r in range(2)]
    path = kit.run_threads(
        2, lambda group: save(tmp_path, step=1, pieces=[halves[group.rank]], header=kit.header(), group=group, keep=0, protect=None)
    )[0]
    (path / "rank-00001.safetensors").unlink()
    target = piece("w", "weight", (8, 4), halves[0].region, torch.zeros(4, 4))
    load(path, [target])
    assert torch.equal(target.tensor, weight[:4])
