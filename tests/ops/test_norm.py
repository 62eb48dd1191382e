"""LayerNorm and RMSNorm: values and gradients against float64, what they leave unread, and what torch makes of the operators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops
from megactl.engine.ops.reference import norm as reference

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-5
# Relative error of a whole tensor: a few roundings of the arithmetic, and one of the result.
BOUND = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
WIDE_BOUND = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to the expected tensor's."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item() if expected.numel() else 0.0


def inputs(rows: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    rows_of = {name: draw(rows, columns, dtype=dtype) for name in ("x", "residual", "grad_y", "grad_sum")}
    return {**rows_of, **{name: draw(columns, dtype=weight_dtype or dtype) for name in ("weight", "bias")}}


def exact(kind: str, t: dict[str, torch.Tensor], added: bool) -> dict[str, torch.Tensor]:
    """Everything in float64 by torch's own functions and autograd, from the inputs as they are rounded."""
    total = t["x"] + t["residual"] if added else t["x"]
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in (total, t["weight"], t["bias"]))
    shape = weight.shape
    functions = torch.nn.functional
    y = functions.layer_norm(x, shape, weight, bias, EPSILON) if kind == "layer_norm" else functions.rms_norm(x, shape, weight, EPSILON)
    y.backward(t["grad_y"].double())
    grad_x = x.grad + t["grad_sum"].double() if added else x.grad
    found = {"y": y.detach(), "grad_x": grad_x, "grad_weight": weight.grad, "sum": total, "mean": x.detach().mean(-1)}
    if kind == "layer_norm":
        return {**found, "grad_bias": bias.grad, "rstd": 1 / torch.sqrt((x - x.mean(-1, True)).detach().square().mean(-1) + EPSILON)}
    return {**found, "rstd": 1 / torch.sqrt(x.detach().square().mean(-1) + EPSILON)}


def poison(*shapes: tuple[int, ...]) -> None:
    """Leave NaN in memory that an allocation of such a size is likely to be given next."""
    for shape in shapes:
        torch.full(shape, float("nan"), dtype=torch.float64)


def computed(kind: str, t: dict[str, torch.Tensor], added: bool) -> dict[str, torch.Tensor]:
    """The same by the forward and backward operators."""
    parameters = (t["weight"], t["bias"]) if kind == "layer_norm" else (t["weight"],)
    poison(t["x"].shape, t["weight"].shape)
    if added:
        y, total, *statistics = getattr(ops, f"add_{kind}_forward")(t["x"], t["residual"], *parameters, EPSILON)
    else:
        y, *statistics = getattr(ops, f"{kind}_forward")(t["x"], *parameters, EPSILON)
        total = t["x"]
    poison(t["x"].shape, t["weight"].shape)
    backward = getattr(ops, f"{kind}_backward")
    gradients = backward(t["grad_y"], total, t["weight"], *statistics, t["grad_sum"] if added else None)
    names = ["rstd"] if kind == "rms_norm" else ["mean", "rstd"]
    found = dict(zip(names, statistics, strict=True)) | dict(zip(["grad_x", "grad_weight", "grad_bias"], gradients, strict=False))
    return {"y": y, "sum": total, **found}


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in found.items():
        narrow = name in ("y", "sum", "grad_x")
        assert tensor.dtype == (dtype if narrow else wide) and tensor.shape == expected[name].shape and tensor.is_contiguous(), name
        # The mean and the gradient of a weight may be small beside what they are sums of.
        floor = (1e-12 if dtype == torch.float64 else 1e-6) if name in ("mean", "grad_weight", "grad_bias", "grad_x") else 1e-14
        size = expected[name].double().norm().item()
        bound = (BOUND if narrow else WIDE_BOUND)[dtype] * size + floor * math.sqrt(expected[name].numel()) * 4
        assert (tensor.double() - expected[name].double()).norm().item() <= bound, (name, error(tensor, expected[name]))


KINDS = ["layer_norm", "rms_norm"]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.integers(0, 90),
    st.integers(1, 300),
    st.integers(0, 99),
)
def test_compiled_against_float64(kind, added, dtype, float_weight, rows, columns, seed):
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None
    t = inputs(rows, columns, dtype, torch.float32 if float_weight else dtype, seed)
    check(computed(kind, t, added), exact(kind, t, added), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 2), (8, 1024), (257, 129), (67, 1027), (2, 20_001), (700, 64), (0, 7)])
def test_against_float64(backend, kind, added, dtype, shape):
    t = inputs(*shape, dtype)
    check(computed(kind, t, added), exact(kind, t, added), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_any_layout(backend, kind, dtype):
    """Inputs that are not contiguous or start between two vectors give what dense ones give, bit for bit."""
    t = inputs(20, 37, dtype)
    expected = computed(kind, t, True)
    transposed = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2] for name, tensor in t.items()
    }
    moved = {name: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape) for name, tensor in t.items()}
    for other in (transposed, moved):
        found = computed(kind, other, True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_leading_dimensions(backend):
    x, weight, bias = torch.randn(2, 3, 5, 8), torch.randn(8), torch.randn(8)
    y, mean, rstd = ops.layer_norm_forward(x, weight, bias, EPSILON)
    assert y.shape == x.shape and mean.shape == rstd.shape == (2, 3, 5)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,), weight, bias, EPSILON))
    single, mean, _ = ops.layer_norm_forward(x[0, 0, 0], weight, bias, EPSILON)
    assert mean.shape == () and torch.equal(single, y[0, 0, 0])


@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (-3e5, 2.0), (1.0, 1e-4)])
def test_rows_far_from_zero(backend, mean, std):
    """The difference of mean square and squared mean has no correct digit here, and the rounding of the mean alone is 1e-4 of std."""
    t = inputs(40, 1024, torch.float32)
    t["x"] = (t["x"] * std + mean).float()
    expected, found = exact("layer_norm", t, False), computed("layer_norm", t, False)
    for name in ("y", "grad_x", "grad_weight", "grad_bias", "rstd"):
        assert error(found[name], expected[name]) < 3e-6, name


def test_large_and_small_values(backend):
    for scale, dtype in ((1e15, torch.float32), (1e-12, torch.float32), (2e4, torch.float16)):
        t = inputs(6, 100, dtype)
        t["x"] = t["x"].clamp(-3, 3) * scale
        for kind in KINDS:
            assert error(computed(kind, t, False)["y"], exact(kind, t, False)["y"]) < BOUND[dtype]
    # x + residual leaves float16's range only where it does in torch.
    t = inputs(2, 8, torch.float16)
    t["x"][0, 0] = t["residual"][0, 0] = 60000.0
    y, total = ops.add_layer_norm(t["x"], t["residual"], t["weight"], t["bias"], EPSILON)
    assert torch.equal(total, t["x"] + t["residual"]) and total[0, 0].isinf() and y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_spoils_its_row_as_in_torch(backend, kind, value):
    t = inputs(5, 130, torch.float32)
    t["x"][2, 7] = value
    found, expected = computed(kind, t, False), exact(kind, t, False)
    for name in ("y", "grad_x", "grad_weight"):
        assert torch.equal(found[name].isnan(), expected[name].isnan()), name


def test_constant_rows(backend):
    for value in (0.0, 0.1, 1e4):
        x = torch.full((3, 77), value)
        y, _, rstd = ops.layer_norm_forward(x, torch.ones(77), torch.full((77,), 2.0), EPSILON)
        torch.testing.assert_close(y, torch.full_like(y, 2.0))
        torch.testing.assert_close(rstd, torch.full_like(rstd, EPSILON**-0.5))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(compiled, kind, dtype):
    t = inputs(300, 517, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(computed(kind, t, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_many_rows_add_up_in_float32(compiled):
    """Gradients of one sign, so that a long sum in one float32 would be off by more than the bound."""
    t = inputs(40_000, 16, torch.float32)
    t["grad_y"] = t["grad_y"].abs()
    found, expected = computed("layer_norm", t, False), exact("layer_norm", t, False)
    assert error(found["grad_bias"], expected["grad_bias"]) < 2e-7


def faces(kind: str, added: bool):
    """The differentiable face as a function of tensors alone."""
    face = getattr(ops, f"add_{kind}" if added else kind)
    return lambda *tensors: face(*tensors, EPSILON)


def leaves(kind: str, added: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    t = inputs(4, 6, dtype)
    names = ("x", *(("residual",) if added else ()), "weight", *(("bias",) if kind == "layer_norm" else ()))
    return tuple(t[name].view(2, 2, 6).requires_grad_() if t[name].dim() == 2 else t[name].requires_grad_() for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [False, True])
def test_gradients(backend, kind, added):
    assert torch.autograd.gradcheck(faces(kind, added), leaves(kind, added))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("float_weight", [False, True])
def test_gradients_have_the_dtypes_of_what_they_belong_to(backend, kind, dtype, float_weight):
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves(kind, True)]
    if float_weight:
        tensors[2:] = [tensor.detach().float().requires_grad_() for tensor in tensors[2:]]
    y, total = faces(kind, True)(*tensors)
    (y.float().square().sum() + total.float().sum()).backward()
    assert all(tensor.grad.dtype == tensor.dtype and tensor.grad.shape == tensor.shape for tensor in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_either_output_may_go_unused(backend, kind):
    tensors = leaves(kind, True)
    y, total = faces(kind, True)(*tensors)
    both = torch.autograd.grad(y.square().sum() + 3 * total.sum(), tensors, retain_graph=True)
    only_y = torch.autograd.grad(y.square().sum(), tensors, retain_graph=True)
    only_sum = torch.autograd.grad(3 * total.sum(), tensors[:2])
    for one in (0, 1):
        torch.testing.assert_close(only_y[one] + only_sum[one], both[one])
    assert torch.equal(only_sum[0], torch.full_like(only_sum[0], 3.0))


def test_without_gradients_the_result_is_the_same_and_needs_none(backend):
    tensors = leaves("layer_norm", True)
    with torch.no_grad():
        found = ops.add_layer_norm_forward(*tensors, EPSILON)
    for one, other in zip(found, ops.add_layer_norm_forward(*tensors, EPSILON), strict=True):
        assert torch.equal(one, other) and not one.requires_grad


def test_statistics_need_no_gradient(backend):
    _, mean, rstd = ops.layer_norm_forward(*leaves("layer_norm", False), EPSILON)
    assert not mean.requires_grad and not rstd.requires_grad


def test_second_derivatives_are_refused_not_zero(compiled):
    x, *parameters = leaves("rms_norm", False)
    (grad,) = torch.autograd.grad(ops.rms_norm(x, *parameters, EPSILON).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="MEGACTL_OPS=torch"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", FLOATS)
def test_reference_and_compiled_agree(compiled, dtype):
    t = inputs(33, 190, dtype)
    for kind in KINDS:
        for added in (False, True):
            names = {"x": t["x"], "weight": t["weight"]} | ({"residual": t["residual"]} if added else {})
            names |= {"bias": t["bias"]} if kind == "layer_norm" else {}
            name = f"add_{kind}_forward" if added else f"{kind}_forward"
            for one, other in zip(
                getattr(ops, name)(**names, epsilon=EPSILON), getattr(reference, name)(**names, epsilon=EPSILON), strict=True
            ):
                assert error(one, other) < 2 * BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(compiled, dtype):
    for kind in KINDS:
        for added in (False, True):
            operator = getattr(torch.ops.megactl, f"add_{kind}_forward" if added else f"{kind}_forward")
            torch.library.opcheck(operator, (*leaves(kind, added, dtype), EPSILON))
        x, residual, weight, *_ = (tensor.detach() for tensor in leaves(kind, True, dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        statistics = [torch.rand(2, 2, dtype=wide) for _ in range(2 if kind == "layer_norm" else 1)]
        for grad_sum in (None, residual):
            torch.library.opcheck(getattr(torch.ops.megactl, f"{kind}_backward"), (x, residual, weight, *statistics, grad_sum))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_in_one_graph(backend, kind):
    plain = faces(kind, True)

    def function(x, residual, *parameters):
        y, total = plain(x * 2, residual, *parameters)
        return y * 3 + total

    torch._dynamo.reset()  # graphs are kept by code object, and which operators are in use is a constant to them
    # aot_eager traces forward and backward as every backend does, without the C++ compiler a later backend stage needs.
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = leaves(kind, True, torch.float32)
    expected = function(*tensors)
    gradients = torch.autograd.grad(expected.square().sum(), tensors)
    y = traced(*tensors)
    torch.testing.assert_close(y, expected)
    for one, other in zip(torch.autograd.grad(y.square().sum(), tensors), gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_refusals(backend):
    x, weight = torch.randn(3, 4), torch.randn(4)
    wrong = [
        {"x": torch.ones(3, 4, dtype=torch.int64)},
        {"x": torch.tensor(1.0)},
        {"x": torch.randn(3, 0), "weight": torch.randn(0), "bias": torch.randn(0)},
        {"weight": torch.randn(5)},
        {"weight": torch.randn(1, 4)},
        {"bias": torch.randn(3)},
        {"weight": weight.half()},
        {"weight": weight.half(), "bias": weight.half()},
        {"residual": torch.randn(3, 5)},
        {"residual": x.double()},
        {"epsilon": -1e-5},
        {"epsilon": float("nan")},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="must"):
            ops.add_layer_norm(**{"x": x, "residual": x, "weight": weight, "bias": weight, "epsilon": EPSILON, **change})
    statistic = torch.randn(3)
    for change in ({"grad_y": x.double()}, {"mean": torch.randn(4)}, {"rstd": statistic.double()}, {"grad_sum": torch.randn(4, 3)}):
        with pytest.raises(ValueError, match="must"):
            ops.layer_norm_backward(**{"grad_y": x, "x": x, "weight": weight, "mean": statistic, "rstd": statistic, **change})


def test_compiled_checks_hold_without_the_python_face(compiled):
    x, weight, op = torch.randn(3, 4), torch.randn(4), torch.ops.megactl
    with pytest.raises(RuntimeError, match="contiguous"):
        op.rms_norm_forward(x.t(), torch.randn(3), EPSILON)
    with pytest.raises(RuntimeError, match="last dimension"):
        op.rms_norm_forward(x, torch.randn(5), EPSILON)
    with pytest.raises(RuntimeError, match="float32 beside a 16-bit x"):
        op.rms_norm_forward(x.double(), weight, EPSILON)
    with pytest.raises(RuntimeError, match="elements"):
        op.add_rms_norm_forward(x, torch.randn(3, 3), weight, EPSILON)
    with pytest.raises(RuntimeError, match="one a row"):
        op.rms_norm_backward(x, x, weight, torch.randn(4), None)
    with pytest.raises(RuntimeError, match="negative"):
        op.rms_norm_forward(x, weight, -1.0)
