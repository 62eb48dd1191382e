"""adamw_many_ is adamw_ for each tensor, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megactl.engine import ops

SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
SIZES = [5, 0, 1, 40_000, 33, 1003, 0]
LISTS = ("params", "masters", "grads", "exp_avgs", "exp_avg_sqs")


def lists(sizes, dtype=torch.float32, lows=(None,)) -> dict[str, list[torch.Tensor]]:
    """Tensors in the middle of training; the type of copy number i is lows[i % len(lows)], None for none."""
    made = {"masters": [torch.randn(n, dtype=dtype) for n in sizes], "grads": [torch.randn(n, dtype=dtype) * 0.1 for n in sizes]}
    made["exp_avgs"] = [torch.randn(n, dtype=dtype) * 0.1 for n in sizes]
    made["exp_avg_sqs"] = [torch.rand(n, dtype=dtype) * 0.01 for n in sizes]
    kinds = [lows[i % len(lows)] for i in range(len(sizes))]
    made["params"] = [
        master if low is None else torch.full_like(master, float("nan"), dtype=low)
        for master, low in zip(made["masters"], kinds, strict=True)
    ]
    return made


def scalars(dtype=torch.float32, **changes) -> dict[str, torch.Tensor]:
    values = {"lr": 1e-3, "step": 3.0, "grad_scale": 0.7, "skip": 0.0, **changes}
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}


def copy(tensors: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    fresh = {name: [tensor.clone() for tensor in each] for name, each in tensors.items()}
    fresh["params"] = [
        new if old is master else new_param
        for old, master, new, new_param in zip(tensors["params"], tensors["masters"], fresh["masters"], fresh["params"], strict=True)
    ]
    return fresh


def assert_equal(one, other) -> None:
    for name in LISTS:
        for i, (a, b) in enumerate(zip(one[name], other[name], strict=True)):
            assert torch.equal(a, b), (name, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lows", [(None,), (torch.bfloat16,), (None, torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("decays", [0.1, [0.1, 0.0, 0.01, 0.1, 0.0, 0.3, 0.1]])
def test_equals_one_by_one(backend, dtype, lows, decays):
    one = lists(SIZES, dtype, lows)
    other = copy(one)
    ops.adamw_many_(**one, **scalars(dtype), **SETTINGS, weight_decay=decays)
    for i in range(len(SIZES)):
        decay = decays if isinstance(decays, float) else decays[i]
        ops.adamw_(*(other[name][i] for name in LISTS), **scalars(dtype), **SETTINGS, weight_decay=decay)
    assert_equal(one, other)
    assert not any(param.isnan().any() for param in one["params"])


def test_more_tensors_than_one_launch_takes(backend):
    one = lists([n % 5 for n in range(600)])
    other = copy(one)
    ops.adamw_many_(**one, **scalars(), **SETTINGS, weight_decay=0.1)
    for tensors in zip(*(other[name] for name in LISTS), strict=True):
        ops.adamw_(*tensors, **scalars(), **SETTINGS, weight_decay=0.1)
    assert_equal(one, other)


def test_threads_share_the_tensors(compiled):
    one = lists([70_000, 3, 0, 70_001, 12])
    other, threads = copy(one), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ops.adamw_many_(**one, **scalars(), **SETTINGS, weight_decay=0.1)
        torch.set_num_threads(1)
        ops.adamw_many_(**other, **scalars(), **SETTINGS, weight_decay=0.1)
    finally:
        torch.set_num_threads(threads)
    assert_equal(one, other)


def test_many_skip_leaves_everything_untouched(backend):
    one = lists(SIZES, lows=(None, torch.bfloat16))
    for tensor in (*one["grads"], *one["params"]):
        tensor.fill_(2.0)
    other = copy(one)
    ops.adamw_many_(**one, **scalars(skip=1.0), **SETTINGS, weight_decay=0.1)
    assert_equal(one, other)


def test_views_of_buffers_and_no_tensors(backend):
    buffers = {name: torch.rand(1000) for name in LISTS[1:]}
    untouched = {name: buffer.clone() for name, buffer in buffers.items()}
    one = {name: [buffer[1:100], buffer[333:800]] for name, buffer in buffers.items()}
    ops.adamw_many_(one["masters"], **one, **scalars(), **SETTINGS, weight_decay=0.1)
    for name, buffer in buffers.items():
        for around in (slice(0, 1), slice(100, 333), slice(800, 1000)):
            assert torch.equal(buffer[around], untouched[name][around])
        assert name == "grads" or not torch.equal(buffer[333:800], untouched[name][333:800])
    ops.adamw_many_([], [], [], [], [], **scalars(), **SETTINGS, weight_decay=0.1)


def test_many_opcheck(compiled):
    for lows in ((None,), (torch.bfloat16,)):
        one = lists([3, 5], lows=lows)
        copies = [] if lows == (None,) else one["params"]
        rest = (*scalars().values(), *SETTINGS.values(), [0.1, 0.0])
        arguments = (one["masters"], copies, *(one[name] for name in LISTS[2:]), *rest)
        torch.library.opcheck(torch.ops.megactl.adamw_many_, arguments)


def test_many_torch_compile_in_one_graph(backend):
    def function(tensors, values):
        ops.adamw_many_(**tensors, **values, **SETTINGS, weight_decay=0.1)
        return tensors["masters"][0] * 2

    one = lists([30, 7], lows=(torch.bfloat16,))
    other = copy(one)
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(one, scalars()), function(other, scalars()))
    assert_equal(one, other)


def test_many_refusals(backend):
    good = lists([4, 4])
    wrong = [
        {"grads": good["grads"][:1]},
        {"grads": [good["grads"][0], torch.ones(3)]},
        {"masters": [good["masters"][0], torch.ones(4).half()]},
        {"exp_avgs": [good["exp_avgs"][0], torch.ones(8)[::2]]},
        {"params": [good["masters"][0], torch.ones(4)]},
        {"weight_decay": [0.1]},
        {"lr": torch.tensor(0.1, dtype=torch.float64)},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="must"):
            ops.adamw_many_(**{**good, **scalars(), **SETTINGS, "weight_decay": 0.1, **change})


def test_many_checks_hold_without_the_python_face(compiled):
    good = lists([4, 4])
    rest = (*scalars().values(), *SETTINGS.values())
    operator = torch.ops.megactl.adamw_many_
    for name, bad, decays, named in (
        ("grads", [torch.ones(4)], [0.1, 0.1], "length"),
        ("grads", good["grads"], [0.1], "length"),
        ("grads", [torch.ones(4), torch.ones(3)], [0.1, 0.1], "grad"),
        ("masters", [torch.ones(4), torch.ones(4).double()], [0.1, 0.1], "masters"),
    ):
        changed = {**good, name: bad}
        with pytest.raises(RuntimeError, match=named):
            operator(changed["masters"], [], *(changed[each] for each in LISTS[2:]), *rest, decays)
