"""adamw_ against torch.optim.AdamW and against its reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops
from megactl.engine.ops.reference import adamw as reference

SETTINGS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
NAMES = ("param", "master", "grad", "exp_avg", "exp_avg_sq")


def state(n: int, dtype: torch.dtype = torch.float32, low: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A segment in the middle of training; the low copy is poisoned, since the step must write all of it."""
    tensors = {"master": torch.randn(n, dtype=dtype), "grad": torch.randn(n, dtype=dtype) * 0.1}
    tensors |= {"exp_avg": torch.randn(n, dtype=dtype) * 0.1, "exp_avg_sq": torch.rand(n, dtype=dtype) * 0.01}
    tensors["param"] = tensors["master"] if low is None else torch.full((n,), float("nan"), dtype=low)
    return tensors


def scalars(dtype: torch.dtype, lr: float = 1e-3, step: int = 3, grad_scale: float = 1.0, skip: float = 0.0) -> dict[str, torch.Tensor]:
    values = {"lr": lr, "step": float(step), "grad_scale": grad_scale, "skip": skip}
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}


def copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A deep copy in which param is still the master where it was."""
    fresh = {name: tensor.clone() for name, tensor in tensors.items()}
    if tensors["param"] is tensors["master"]:
        fresh["param"] = fresh["master"]
    return fresh


def positional(tensors: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> tuple:
    """The arguments of the operator itself, below the Python face."""
    low = None if tensors["param"] is tensors["master"] else tensors["param"]
    rest = (values[name] for name in ("lr", "step", "grad_scale", "skip"))
    return (tensors["master"], low, *(tensors[name] for name in NAMES[2:]), *rest, *SETTINGS.values())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_torch_over_many_steps(backend, dtype, rtol):
    n, grad_scale = 1003, 0.5
    weight = torch.randn(n, dtype=dtype)
    theirs = weight.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    mine = {"master": weight.clone(), "exp_avg": torch.zeros(n, dtype=dtype), "exp_avg_sq": torch.zeros(n, dtype=dtype)}
    for step in range(1, 21):
        lr = 0.01 / step
        grad = torch.randn(n, dtype=dtype)
        optimizer.param_groups[0]["lr"] = lr
        theirs.grad = grad * grad_scale
        optimizer.step()
        ops.adamw_(mine["master"], **mine, grad=grad, **scalars(dtype, lr, step, grad_scale), **SETTINGS)
    # The update is compared, not the weight, which would hide it.
    torch.testing.assert_close(mine["master"] - weight, theirs.detach() - weight, rtol=rtol * 10, atol=rtol)
    torch.testing.assert_close(mine["exp_avg_sq"], optimizer.state[theirs]["exp_avg_sq"], rtol=rtol, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200), st.sampled_from([None, torch.bfloat16, torch.float16]), st.sampled_from([1, 2, 1000]), st.sampled_from([1.0, 0.37])
)
def test_compiled_equals_the_reference_bit_for_bit(n, low, step, grad_scale):
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None
    one = state(n, torch.float32, low)
    other = copy(one)
    values = scalars(torch.float32, 1e-3, step, grad_scale)
    torch.ops.megactl.adamw_(*positional(one, values))
    reference.adamw_(*positional(other, values))
    for name in NAMES:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("low", [None, torch.float32, torch.bfloat16, torch.float16])
def test_float64_equals_the_reference(compiled, low):
    one = state(100_001, torch.float64, low)
    other = copy(one)
    values = scalars(torch.float64, grad_scale=0.3)
    torch.ops.megactl.adamw_(*positional(one, values))
    reference.adamw_(*positional(other, values))
    for name in NAMES:
        eps = torch.finfo(one[name].dtype).eps
        torch.testing.assert_close(one[name], other[name], rtol=4 * eps, atol=4 * eps * 1e-3)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_copy_is_the_rounded_master(backend, low):
    tensors = state(5000, torch.float32, low)
    tensors["master"][:8] = torch.tensor([0.0, -0.0, 1e-7, -3e-8, 7e4, -7e4, 3e38, 6.1e-5])
    ops.adamw_(**tensors, **scalars(torch.float32), **SETTINGS)
    assert torch.equal(tensors["param"], tensors["master"].to(low))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_rounding_to_low_agrees_with_torch_on_every_kind_of_number(compiled, low):
    """An update of zero leaves the master as it is, so the copy shows the conversion alone."""
    edges = torch.arange(0, 2**32, 65_521).to(torch.int64).sub(2**31).to(torch.int32).view(torch.float32)
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(low).float()
    middles = (halves.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 1 << 12, 4097, 1 << 15, 32767])).view(torch.float32)
    values = torch.cat([edges, halves, middles.flatten()])
    n = values.numel()
    tensors = {"master": values.clone(), "param": torch.full((n,), 1.0, dtype=low)}
    tensors |= {name: torch.zeros(n) for name in NAMES[2:]}
    ops.adamw_(**tensors, **scalars(torch.float32, lr=0.0), **SETTINGS)
    expected = values.to(low)
    same = (tensors["param"].view(torch.int16) == expected.view(torch.int16)) | (tensors["param"].isnan() & expected.isnan())
    assert same.all(), values[~same][:5]


def test_skip_leaves_everything_untouched(backend):
    tensors = state(1000, torch.float32, torch.bfloat16)
    tensors["grad"].fill_(float("inf"))
    tensors["param"].fill_(1.0)
    before = copy(tensors)
    ops.adamw_(**tensors, **scalars(torch.float32, skip=1.0), **SETTINGS)
    for name in NAMES:
        assert torch.equal(tensors[name], before[name]), name


def test_segments_of_a_larger_buffer(backend):
    """Segments are views at odd offsets; what lies around them must not change."""
    buffers = {name: torch.full((1000,), 7.0) for name in NAMES[1:]}
    tensors = {name: buffer[13:510] for name, buffer in buffers.items()}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    ops.adamw_(tensors["master"], **tensors, **scalars(torch.float32), **SETTINGS)
    ops.adamw_(expected["master"], **expected, **scalars(torch.float32), **SETTINGS)
    for name, buffer in buffers.items():
        assert (buffer[:13] == 7).all() and (buffer[510:] == 7).all()
        assert torch.equal(tensors[name], expected[name])
    assert not torch.equal(tensors["master"], torch.full_like(tensors["master"], 7.0))


def test_refusals(backend):
    good = state(10, torch.float32, torch.bfloat16)
    wrong = [
        {"grad": torch.randn(1)},
        {"grad": torch.randn(10).bfloat16()},
        {"exp_avg": torch.randn(20)[::2]},
        {"master": torch.randn(20)[::2]},
        {"master": good["master"].half()},
        {"param": good["master"].clone()},
        {"param": good["param"][:5]},
        {"lr": torch.tensor(0.1, dtype=torch.float64)},
        {"skip": torch.zeros(1)},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="must"):
            ops.adamw_(**{**good, **scalars(torch.float32), **SETTINGS, **change})


def test_opcheck(compiled):
    for low in (None, torch.bfloat16):
        torch.library.opcheck(torch.ops.megactl.adamw_, positional(state(10, torch.float32, low), scalars(torch.float32)))


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_torch_compile_in_one_graph(backend, low):
    def function(tensors, values):
        values["step"].add_(1)
        ops.adamw_(**tensors, **values, **SETTINGS)
        return tensors["master"] * 2

    one = state(64, torch.float32, low)
    other = copy(one)
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    values, same_values = scalars(torch.float32), scalars(torch.float32)
    for _ in range(2):
        assert torch.equal(traced(one, values), function(other, same_values))
    for name in NAMES:
        assert torch.equal(one[name], other[name]), name


def test_compiled_checks_hold_without_the_python_face(compiled):
    good = state(10)
    for name, bad in (("grad", torch.randn(9)), ("exp_avg", torch.randn(10).double()), ("exp_avg_sq", torch.randn(20)[::2])):
        with pytest.raises(RuntimeError, match=name):
            torch.ops.megactl.adamw_(*positional({**good, name: bad}, scalars(torch.float32)))
    with pytest.raises(RuntimeError, match="scalar tensors"):
        torch.ops.megactl.adamw_(*positional(good, scalars(torch.float64)))
