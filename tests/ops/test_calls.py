"""The short way of calling operators: the results, gradients and refusals of torch.ops, without its detours."""

from __future__ import annotations

import pytest
import torch

from megactl.engine import ops
from megactl.engine.ops.calls import compiled as call

RNG = torch.tensor([3, 1, 0])


def cases() -> dict[str, tuple[tuple[torch.Tensor, ...], tuple[object, ...]]]:
    """Operators that differentiate: their floating-point tensors, and what follows them."""
    x, weight, bias, labels = torch.randn(6, 8), torch.randn(8), torch.randn(8), torch.randint(8, (6,))
    return {
        "layer_norm_forward": ((x, weight, bias), (1e-5,)),
        "add_layer_norm_forward": ((x, x.clone(), weight, bias), (1e-5,)),
        "rms_norm_forward": ((x, weight), (1e-5,)),
        "add_rms_norm_forward": ((x, x.clone(), weight), (1e-5,)),
        "bias_gelu": ((x, bias), (True,)),
        "masked_softmax": ((x.view(2, 1, 3, 8),), (None, 0.5, True)),
        "cross_entropy": ((x,), (labels, 0, 8)),
        "dropout_add": ((x, x.clone()), (0.4, RNG, 3, 0, 0)),
    }


def outputs(result: torch.Tensor | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def both(name: str):
    return getattr(torch.ops.megactl, name), lambda *arguments: call(name, *arguments)


@pytest.mark.parametrize("name", cases())
def test_results_and_gradients_are_those_of_the_dispatcher(compiled, name):
    tensors, rest = cases()[name]
    found = []
    for function in both(name):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        results = outputs(function(*leaves, *rest))
        losses = [result.double().square().sum() for result in results if result.requires_grad]
        found.append((results, losses and torch.autograd.grad(sum(losses), leaves)))
    (results, gradients), (short_results, short_gradients) = found
    assert [result.requires_grad for result in results] == [result.requires_grad for result in short_results] and gradients
    assert all(torch.equal(a, b) for a, b in zip(results, short_results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, short_gradients, strict=True))


@pytest.mark.parametrize("name", cases())
def test_nothing_is_recorded_where_no_gradient_is_wanted(compiled, name):
    tensors, rest = cases()[name]
    assert not any(result.requires_grad for result in outputs(call(name, *tensors, *rest)))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with torch.no_grad():
        assert not any(result.requires_grad for result in outputs(call(name, *leaves, *rest)))


def test_only_some_inputs_want_a_gradient(compiled):
    x, weight, bias = torch.randn(6, 8), torch.randn(8).requires_grad_(), torch.randn(8)
    ops.layer_norm(x, weight, bias, 1e-5).sum().backward()
    expected = torch.nn.functional.layer_norm(x, (8,), None, None, 1e-5).sum(0)
    torch.testing.assert_close(weight.grad, expected)
    assert x.grad is None and bias.grad is None


@pytest.mark.parametrize("name", ["layer_norm_forward", "rms_norm_forward", "bias_gelu", "masked_softmax", "cross_entropy"])
def test_second_derivatives_are_refused_not_zero(compiled, name):
    tensors, rest = cases()[name]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    result = next(result for result in outputs(call(name, *leaves, *rest)) if result.requires_grad)
    first = torch.autograd.grad(result.square().sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="MEGACTL_OPS=torch"):
        torch.autograd.grad(first.sum(), leaves[0])


def test_tensors_are_not_kept_after_backward(compiled):
    """A graph made by the short way frees what it saved, as torch's own do."""
    import weakref

    x, bias = torch.randn(6, 8, requires_grad=True), torch.randn(8)
    hidden = x * 2
    y, gone = call("bias_gelu", hidden, bias, True), weakref.ref(hidden)
    del hidden
    assert gone() is not None
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    del y
    assert gone() is None


def test_a_saved_input_changed_in_place_is_refused(compiled):
    x = torch.randn(6, 8, requires_grad=True)
    hidden = x * 2
    y = call("bias_gelu", hidden, torch.randn(8), True)
    hidden.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", cases())
def test_traced_as_one_node(compiled, name):
    """torch.compile sees the operator of torch.ops, not the short way."""
    tensors, rest = cases()[name]
    nodes = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    run = torch.compile(lambda *given: call(name, *given, *rest), backend=backend, fullgraph=True)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(outputs(run(*leaves)), outputs(call(name, *leaves, *rest)), strict=True))
    assert any(f"megactl.{name}" in node for node in nodes)
