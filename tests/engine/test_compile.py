"""The gradient path under torch.compile: one graph, and the same gradients in the same flat buffer."""

import pytest
import torch

from megactl.config.schema import Data, Model, Run, Training
from megactl.config.validate import resolve
from megactl.engine.mesh import build_mesh
from megactl.engine.models.layers import MicroBatch, Targets
from megactl.engine.parallelize import build_part
from megactl.engine.pipeline import padding_attention_mask

LLAMA = {"kv_heads": 2, "position_embedding": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False}


@pytest.mark.parametrize(
    ("architecture", "norm", "more"), [("gpt", "pre", {}), ("bert", "pre", {}), ("bert", "post", {}), ("gpt", "pre", LLAMA)]
)
def test_a_stage_compiles_to_one_graph_that_writes_the_flat_gradients(architecture: str, norm: str, more: dict) -> None:
    sizes = dict(num_layers=2, hidden_size=32, num_heads=4, vocab_size=50, hidden_dropout=0.1)
    model = Model(architecture=architecture, norm_position=norm, **sizes, **more)
    run = Run(model=model, training=Training(micro_batch_size=2, seq_length=16, device="cpu"), data=Data(mock_data=True))
    run = resolve(run, world_size=1).run
    part = build_part(run, build_mesh(run.parallel, torch.device("cpu")), 0, 1)
    tokens, positions = torch.randint(0, 50, (2, 16)), torch.arange(16).expand(2, 16)

    targets = Targets(tokens, torch.ones(2, 16), torch.tensor([0, 1]))
    mask = None if architecture == "gpt" else padding_attention_mask(positions < 12)

    def loss(x: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        return part.model.loss_sums(part.model(x, micro_batch), targets).sum()

    def gradients(function, accumulate: bool) -> dict[str, torch.Tensor]:
        function(tokens, MicroBatch(torch.tensor([1, 1, 0]), positions, mask, accumulate, True, positions // 8)).backward()
        return {spec.name: gradient.clone() for spec, gradient in part.flat.gradients()}

    eager = [gradients(loss, accumulate) for accumulate in (False, True)]
    part.flat.grads.fill_(7.0)  # the first backward must overwrite whatever lies there
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled = [gradients(compiled_loss, accumulate) for accumulate in (False, True)]
    for one, other in zip(eager, compiled, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}")
    assert all(parameter.grad is None for parameter in part.model.parameters())
