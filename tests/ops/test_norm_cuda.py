"""LayerNorm and RMSNorm on CUDA against float64 on the CPU: every kernel path by width, alignment and type."""

from __future__ import annotations

import pytest
import torch

from megactl.engine import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KINDS = ["layer_norm", "rms_norm"]
EPSILON = 1e-5
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
WIDE_BOUND = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
# A warp a row, a few warps, a thread block with one, two and four packs a thread, rows beyond registers, and widths that no pack divides.
SHAPES = [(1, 8), (37, 64), (3000, 256), (517, 768), (4096, 1024), (301, 2048), (130, 4096), (70, 8192), (40, 12288), (9, 40_000)]
ODD_SHAPES = [(5, 1), (33, 7), (700, 1001), (3, 50_257), (0, 64)]


def inputs(rows: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows * 7 + columns)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    rows_of = {name: draw(rows, columns, dtype=dtype) for name in ("x", "residual", "grad_y", "grad_sum")}
    return {**rows_of, **{name: draw(columns, dtype=weight_dtype or dtype) for name in ("weight", "bias")}}


def exact(kind: str, t: dict[str, torch.Tensor], added: bool) -> dict[str, torch.Tensor]:
    """By torch's own functions and autograd in float64, from the inputs as they are rounded."""
    total = t["x"] + t["residual"] if added else t["x"]
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in (total, t["weight"], t["bias"]))
    functions, shape = torch.nn.functional, weight.shape
    y = functions.layer_norm(x, shape, weight, bias, EPSILON) if kind == "layer_norm" else functions.rms_norm(x, shape, weight, EPSILON)
    y.backward(t["grad_y"].double())
    found = {"y": y.detach(), "sum": total, "grad_x": x.grad + t["grad_sum"].double() if added else x.grad, "grad_weight": weight.grad}
    return {**found, "grad_bias": bias.grad} if kind == "layer_norm" else found


def computed(kind: str, t: dict[str, torch.Tensor], added: bool) -> dict[str, torch.Tensor]:
    """The same by the forward and backward operators, into memory that held NaN."""
    parameters = (t["weight"], t["bias"]) if kind == "layer_norm" else (t["weight"],)
    for _ in range(4):
        torch.full_like(t["x"], float("nan"))
    if added:
        y, total, *statistics = getattr(ops, f"add_{kind}_forward")(t["x"], t["residual"], *parameters, EPSILON)
    else:
        y, *statistics = getattr(ops, f"{kind}_forward")(t["x"], *parameters, EPSILON)
        total = t["x"]
    torch.full_like(t["x"], float("nan"))
    torch.full((8 << 20,), float("nan"), device="cuda")
    gradients = getattr(ops, f"{kind}_backward")(t["grad_y"], total, t["weight"], *statistics, t["grad_sum"] if added else None)
    return {"y": y, "sum": total, **dict(zip(["grad_x", "grad_weight", "grad_bias"], gradients, strict=False))}


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, tensor in found.items():
        bound = (WIDE_BOUND if name in ("grad_weight", "grad_bias") else BOUND)[dtype]
        # Where a row is one element, its gradient is zero but for rounding.
        floor = (1e-12 if dtype == torch.float64 else 1e-5) * tensor.numel() ** 0.5
        wrong = (tensor.double() - expected[name].double()).norm().item()
        assert tensor.is_cuda and wrong <= bound * expected[name].double().norm().item() + floor, (name, wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES + ODD_SHAPES)
def test_against_float64(compiled, kind, added, dtype, shape):
    t = inputs(*shape, dtype)
    check(computed(kind, t, added), exact(kind, t, added), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 1024), (50, 12288), (20, 129)])
def test_float32_weights(compiled, kind, dtype, shape):
    t = inputs(*shape, dtype, torch.float32)
    check(computed(kind, t, True), exact(kind, t, True), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "moved", [("x",), ("residual", "grad_sum"), ("grad_y",), ("weight",), ("weight", "bias"), ("x", "grad_y", "weight")]
)
def test_views_that_are_not_aligned(compiled, kind, dtype, moved):
    t = inputs(65, 1024, dtype)
    for name in moved:
        t[name] = torch.cat([t[name].new_zeros(1), t[name].flatten()])[1:].view(t[name].shape)
    check(computed(kind, t, True), exact(kind, t, True), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16_384, 1024), (2048, 4096), (515, 12288), (800, 1001)])
def test_the_same_bits_in_every_run(compiled, kind, shape):
    t = inputs(*shape, torch.bfloat16)
    first = computed(kind, t, True)
    for _ in range(5):
        again = computed(kind, t, True)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("columns", [1024, 4096, 12288, 1025])
def test_rows_far_from_zero(compiled, columns):
    t = inputs(64, columns, torch.float32)
    t["x"] = t["x"] + 1e4
    found, expected = computed("layer_norm", t, False), exact("layer_norm", t, False)
    for name in ("y", "grad_x", "grad_weight"):
        assert ((found[name].double() - expected[name]).norm() / expected[name].norm()).item() < 5e-6, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_row(compiled, kind, value):
    t = inputs(70, 1024, torch.float32)
    t["x"][3, 77] = value
    # Against torch on the CPU: its fused RMSNorm on CUDA spoils the whole row.
    found, expected = computed(kind, t, False), exact(kind, {name: tensor.cpu() for name, tensor in t.items()}, False)
    for name in ("y", "grad_x", "grad_weight"):
        assert torch.equal(found[name].isnan().cpu(), expected[name].isnan()), name


def test_more_elements_than_32_bits_count(compiled):
    rows, columns = 2**21 + 3, 1024
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(columns, device="cuda")
    weight, bias = torch.ones(columns, device="cuda"), torch.zeros(columns, device="cuda")
    y, mean, rstd = ops.layer_norm_forward(x, weight, bias, EPSILON)
    expected = torch.nn.functional.layer_norm(x[-1].double(), (columns,), eps=EPSILON)
    assert ((y[-1].double() - expected).norm() / expected.norm()).item() < 4e-3 and y[:-1].abs().max().item() == 0.0
    grad_x, grad_weight, grad_bias = ops.layer_norm_backward(y, x, weight, mean, rstd)
    assert grad_x[:-1].abs().max().item() == 0.0 and grad_x[-1].isfinite().all()
    assert torch.allclose(grad_bias, y[-1].float()) and torch.allclose(grad_weight, y[-1].float().square(), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_replays_with_new_inputs(compiled, kind):
    t = inputs(512, 1024, torch.bfloat16)
    parameters = (t["weight"], t["bias"]) if kind == "layer_norm" else (t["weight"],)

    def step() -> tuple[torch.Tensor, ...]:
        y, total, *statistics = getattr(ops, f"add_{kind}_forward")(t["x"], t["residual"], *parameters, EPSILON)
        return y, total, *getattr(ops, f"{kind}_backward")(t["grad_y"], total, t["weight"], *statistics, t["grad_sum"])

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        for tensor in t.values():
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(outputs, step(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_compile_and_opcheck(compiled, kind):
    t = inputs(12, 64, torch.float32)
    names = ("x", "residual", "weight", *(("bias",) if kind == "layer_norm" else ()))
    tensors = tuple(t[name].requires_grad_() for name in names)
    face = getattr(ops, f"add_{kind}")

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        y, total = face(*tensors, EPSILON)
        return y * 3 + total

    torch._dynamo.reset()
    expected = function(*tensors)
    gradients = torch.autograd.grad(expected.square().sum(), tensors)
    y = torch.compile(function, fullgraph=True)(*tensors)
    torch.testing.assert_close(y, expected)
    for one, other in zip(torch.autograd.grad(y.square().sum(), tensors), gradients, strict=True):
        torch.testing.assert_close(one, other)
    torch.library.opcheck(getattr(torch.ops.megactl, f"add_{kind}_forward"), (*tensors, EPSILON))
