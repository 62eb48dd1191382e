"""bias_gelu's CUDA kernels against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megactl.engine import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMS = ["tanh", "none"]
BOUND = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def exact(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    v = x.double() + bias.double()
    if approximate == "none":
        return v * 0.5 * torch.erfc(v * -math.sqrt(0.5))
    return v * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-2))


def draw(shape: tuple[int, ...], dtype: torch.dtype, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, bias and grad; a shift of one element leaves them unaligned."""

    def one(*sizes: int) -> torch.Tensor:
        return torch.randn(math.prod(sizes) + shift, device="cuda").to(dtype)[shift:].view(sizes)

    return one(*shape), one(shape[-1]), one(*shape)


def check(x: torch.Tensor, bias: torch.Tensor, grad: torch.Tensor, approximate: str) -> None:
    torch.full((x.numel(),), float("nan"), dtype=x.dtype, device="cuda")  # poison for the memory of the result
    y = ops.bias_gelu(x, bias, approximate)
    inputs = x.double().requires_grad_(), bias.double().requires_grad_()
    expected = exact(*inputs, approximate)
    assert error(y, expected.detach()) < BOUND[x.dtype]
    expected_x, expected_bias = torch.autograd.grad(expected, inputs, grad.double())
    torch.full((x.numel(),), float("nan"), dtype=x.dtype, device="cuda")
    grad_x, grad_bias = ops.bias_gelu_backward(grad, x, bias, approximate)
    assert error(grad_x, expected_x) < BOUND[x.dtype]
    assert grad_bias.dtype == torch.promote_types(x.dtype, torch.float32)
    assert error(grad_bias, expected_bias) < (1e-12 if x.dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 64), (33, 37), (2, 3, 264), (1000, 16), (129, 1001), (4097, 1024), (300, 12_296)])
def test_definition(compiled, dtype, approximate, shape):
    for shift in (0, 1):
        check(*draw(shape, dtype, shift), approximate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_shape_of_gpt_345m(compiled, dtype):
    check(*draw((16_384, 4096), dtype), "tanh")


def test_tails_keep_their_relative_accuracy(compiled):
    x = torch.linspace(-12, 12, 30_001, device="cuda")[:, None]
    for approximate in FORMS:
        y, expected = ops.bias_gelu(x, torch.zeros(1, device="cuda"), approximate), exact(x, torch.zeros(1, device="cuda"), approximate)
        relative = ((y.double() - expected) / expected).abs()
        near, known = (x.abs() < 3) & (x != 0), (expected.abs() > 1e-36) & (x != 0)
        assert relative[near].max() < 2e-6 and relative[known].max() < 3e-5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("approximate", FORMS)
def test_special_numbers(compiled, dtype, approximate):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 300.0, -300.0, 6e4, -6e4], device="cuda").to(dtype)
    expected = torch.nn.functional.gelu(x.double().cpu(), approximate=approximate)
    for shift in (0, 1):  # with 16-byte loads, and at an address that does not allow them
        moved = torch.cat([x[:shift], x])[shift:]
        y = ops.bias_gelu(moved, torch.zeros_like(moved), approximate).double().cpu()
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.nan_to_num(), expected.nan_to_num())
    slopes = ops.bias_gelu_backward(torch.ones_like(x), x, torch.zeros_like(x), approximate)[0]
    assert slopes[0].isnan() and torch.equal(slopes[4:].cpu(), torch.tensor([1.0, 0.0, 1.0, 0.0]).to(dtype))


def test_repeats_give_the_same_bits(compiled):
    x, bias, grad = draw((5000, 1024), torch.bfloat16)
    first = ops.bias_gelu_backward(grad, x, bias)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, ops.bias_gelu_backward(grad, x, bias), strict=True))


def test_a_captured_graph_replays_with_new_inputs(compiled):
    x, bias, grad = draw((500, 1024), torch.bfloat16)
    ops.bias_gelu_backward(grad, x, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = (ops.bias_gelu(x, bias), *ops.bias_gelu_backward(grad, x, bias))
    for _ in range(2):
        for tensor in (x, bias, grad):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        expected = (ops.bias_gelu(x, bias), *ops.bias_gelu_backward(grad, x, bias))
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


def test_empty_on_the_device(compiled):
    for shape in ((0, 64), (3, 0)):
        x, bias = torch.empty(shape, device="cuda"), torch.empty(shape[-1], device="cuda")
        grad_x, grad_bias = ops.bias_gelu_backward(x, x, bias)
        assert ops.bias_gelu(x, bias).shape == shape == grad_x.shape and torch.equal(grad_bias, torch.zeros_like(grad_bias))


def test_more_than_two_to_the_31_elements(compiled):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    columns, rows = 4096, 2**19 + 24
    x, bias = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda"), torch.zeros(columns, dtype=torch.bfloat16, device="cuda")
    x[-3:] = 2.0
    y = ops.bias_gelu(x, bias)
    assert torch.equal(y[-3:], ops.bias_gelu(x[-3:].clone(), bias)) and not y[:-3].any()
    grad_x, grad_bias = ops.bias_gelu_backward(x, x, bias)
    last = ops.bias_gelu_backward(x[-3:].clone(), x[-3:].clone(), bias)
    assert torch.equal(grad_x[-3:], last[0]) and not grad_x[:-3].any()
    torch.testing.assert_close(grad_bias, last[1])


def test_autograd_opcheck_and_compile_on_the_device(compiled):
    x, bias, _ = (tensor.requires_grad_() for tensor in draw((6, 64), torch.float32))
    torch.library.opcheck(torch.ops.megactl.bias_gelu, (x, bias, True))
    traced = torch.compile(lambda x, bias: ops.bias_gelu(x * 2, bias, "none").sin(), fullgraph=True)
    one, other = (torch.autograd.grad(y.sum(), (x, bias)) for y in (traced(x, bias), ops.bias_gelu(x * 2, bias, "none").sin()))
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected)
