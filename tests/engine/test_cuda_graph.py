"""Forward and backward of any stage, and the optimizer's phase, run from a captured CUDA graph as they run eagerly; a step never waits.

Replays get new tokens, new random keys, new weights and new rates through the tensors that the graph was captured over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megactl.config.schema import Data, Model, Optimizer, Run, Training
from megactl.config.validate import resolve
from megactl.engine.attention import preferred_attention
from megactl.engine.data.batch import Batch
from megactl.engine.mesh import Mesh
from megactl.engine.models.layers import MicroBatch
from megactl.engine.parallelize import Part, build_part, compute_dtype
from megactl.engine.pipeline import StepInputs, document_mask
from megactl.engine.training_step import TrainingStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

B, S, H, VOCAB, LAYERS = 2, 64, 64, 500, 3
# (stage, of how many): three stages of a layer each are the three forms a stage can have.
FORMS = {"whole": (0, 1), "first": (0, 3), "middle": (1, 3), "last": (2, 3)}
# A graph may choose another algorithm for a product than eager mode does; a mask or a key that is not the replay's is off by tenths.
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 3e-2}
PRECISIONS = list(TOLERANCE)


@pytest.fixture(autouse=True)
def kernels_of_a_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """The fused attention kernel that training takes."""
    with preferred_attention(masked="documents" in str(request.node.name)):
        yield


def make_run(precision: str, attention: str = "auto") -> Run:
    """A small model with dropout; attention dropout only where it is not the fused kernel's own.

    The deviation of the weights is larger than usual: at this width the usual one leaves the layers, and their dropout, close to nothing.
    """
    model = Model(
        num_layers=LAYERS, hidden_size=H, num_heads=4, vocab_size=VOCAB, hidden_dropout=0.1, attention=attention,
        attention_dropout=0.1 if attention == "unfused" else 0.0, init_std=0.2,
    )  # fmt: skip
    scale = {"initial_loss_scale": 1024.0, "loss_scale_hysteresis": 1} if precision == "fp16" else {}
    training = Training(micro_batch_size=B, global_batch_size=2 * B, seq_length=S, precision=precision, device="cuda", **scale)
    # A large epsilon: where a gradient is zero but for rounding (the key's bias), a small one divides noise by noise.
    run = Run(model=model, training=training, optimizer=Optimizer(lr=1e-2, epsilon=1e-2), data=Data(mock_data=True))
    return resolve(run, world_size=1, gpus=1).run


def one_gpu() -> Mesh:
    return Mesh(device=torch.device("cuda", torch.cuda.current_device()))


def capture(function: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """Warm `function` up on a side stream, then capture it; returns the graph and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@dataclass
class Inputs:
    """What a stage's forward and backward read, at fixed addresses."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    segments: Tensor | None
    rng: Tensor
    x: Tensor
    grad_y: Tensor
    loss_gradient: Tensor

    @classmethod
    def draw(cls, precision: str, step: int, *, documents: bool = False) -> Inputs:
        """The inputs of a step: other tokens, activations and random keys for every one."""
        generator = torch.Generator().manual_seed(step)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).cuda()

        tokens, labels = (torch.randint(0, VOCAB, (B, S), generator=generator).cuda() for _ in range(2))
        segments = (torch.rand(B, S, generator=generator) < 0.1).cumsum(1).cuda() if documents else None
        return cls(
            tokens, labels, (torch.rand(B, S, generator=generator) < 0.8).float().cuda(), torch.arange(S).expand(B, S).contiguous().cuda(),
            segments, torch.tensor([1234, step, 7]).cuda(), random(B, S, H), random(B, S, H),
            torch.tensor((1024.0 if precision == "fp16" else 1.0) / (B * S), dtype=torch.float64).cuda(),
        )  # fmt: skip

    def take(self, other: Inputs) -> None:
        """Copy another step's values to the fixed addresses."""
        for name, tensor in vars(self).items():
            if tensor is not None:
                tensor.copy_(getattr(other, name))


def forward_backward(part: Part, inputs: Inputs, form: str) -> dict[str, Tensor]:
    """One micro-batch of one stage, as the pipeline's executor does it; what leaves the stage."""
    stage, stages = FORMS[form]
    x = inputs.tokens if stage == 0 else inputs.x.detach().requires_grad_()
    mask = None if inputs.segments is None else document_mask(inputs.segments)
    y = part.model(x, MicroBatch(inputs.rng, inputs.positions, mask, accumulate=False, dropout=True))
    gradient = inputs.grad_y
    if stage == stages - 1:
        y = part.model.loss_sum(y, inputs.labels, inputs.loss_mask)
        gradient = inputs.loss_gradient.to(y.dtype)
    torch.autograd.backward(y, gradient)
    return {"y": y.detach()} | ({} if stage == 0 else {"x": x.grad})


def snapshot(part: Part, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what left the stage and of all its gradients."""
    return {name: tensor.clone() for name, tensor in leaves.items()} | {spec.name: grad.clone() for spec, grad in part.flat.gradients()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's error against the larger of its norm and that of an average parameter's tensor of its size.

    The floor is for gradients that are zero but for rounding (the key's bias); what leaves the stage has none.
    """
    assert found.keys() == expected.keys()
    parameters = [tensor.double() for name, tensor in expected.items() if name not in ("x", "y")]
    rms = torch.cat([tensor.flatten() for tensor in parameters]).square().mean().sqrt()
    for name, tensor in expected.items():
        assert tensor.isfinite().all(), name
        norm, floor = tensor.double().norm(), rms * tensor.numel() ** 0.5
        bound = tolerance * (norm if name in ("x", "y") else torch.maximum(norm, floor))
        error = (found[name].double() - tensor.double()).norm()
        assert error <= bound, f"{name}: off by {error.item():.3g}, at most {bound.item():.3g} allowed"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("attention", ["auto", "unfused", "auto, documents"])
def test_a_stage_replays_as_it_runs(form: str, precision: str, attention: str):
    documents, attention = attention.endswith("documents"), attention.partition(",")[0]
    part = build_part(make_run(precision, attention), one_gpu(), *FORMS[form])
    steps = [Inputs.draw(precision, step, documents=documents) for step in (1, 2, 3)]
    fixed = Inputs.draw(precision, 99, documents=documents)
    graph, leaves = capture(lambda: forward_backward(part, fixed, form))
    replays, eager = [], []
    weights = part.flat.params.clone()
    for inputs in steps:
        fixed.take(inputs)
        part.flat.grads.fill_(7.0)  # the first micro-batch overwrites whatever lies there
        graph.replay()
        replays.append(snapshot(part, leaves))
        part.flat.params.mul_(1.25)
    part.flat.params.copy_(weights)
    for inputs in steps:
        part.flat.grads.fill_(7.0)
        eager.append(snapshot(part, forward_backward(part, inputs, form)))
        part.flat.params.mul_(1.25)
    for found, expected in zip(replays, eager, strict=True):
        assert_near(found, expected, TOLERANCE[precision])
    # The same tokens and weights under another key: were the replay's dropout the captured one, the comparison would show it.
    part.flat.params.copy_(weights)
    steps[0].rng[1] = 99
    with pytest.raises(AssertionError, match="off by"):
        assert_near(snapshot(part, forward_backward(part, steps[0], form)), eager[0], TOLERANCE[precision])


class WholeStep:
    """A `TrainingStep` on one GPU with two micro-batches, run eagerly or over fixed addresses."""

    def __init__(self, precision: str) -> None:
        self.run = make_run(precision)
        self.engine = TrainingStep(self.run, one_gpu())
        self.schedule = self.engine._schedule("1f1b", 2)
        self.size, self.tokens = self.run.training.global_batch_size, self.run.training.global_batch_size * S
        self.batches = [self._batch(0, index).to("cuda") for index in range(2)]
        self.rng = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
        self.base = torch.full((1,), 1.0 / self.tokens, dtype=torch.float64, device="cuda")

    @staticmethod
    def _batch(iteration: int, index: int) -> Batch:
        inputs = Inputs.draw("fp32", 1000 * iteration + index)
        return Batch(*(tensor.cpu() for tensor in (inputs.tokens, inputs.labels, inputs.loss_mask, inputs.positions)), None).pin_memory()

    def fill(self, iteration: int, rate: float) -> None:
        """Put what `TrainingStep.step` would make of an iteration at the fixed addresses."""
        for index, held in enumerate(self.batches):
            for target, source in zip(held, self._batch(iteration, index), strict=True):
                if target is not None:
                    target.copy_(source)
        self.rng.copy_(torch.tensor([[self.run.training.seed, iteration, index * B] for index in range(2)]))
        self.engine._lr.fill_(rate)

    def fixed_step(self) -> Tensor:
        """A step over the fixed addresses: all that `TrainingStep.step` does on the device."""
        inputs = StepInputs(self.batches, self.rng, self.engine.loss_scale.scaled(self.base))
        loss_sum, tokens = self.engine.executor.run(self.schedule, inputs)
        return self.engine._update(self.engine._totals(loss_sum, tokens, 0.0), self.size).packed()

    def eager_step(self, iteration: int, rate: float) -> Tensor:
        """The engine's own step."""
        batches = [self._batch(iteration, index) for index in range(2)]
        return self.engine.step(iteration, batches.__getitem__, global_batch_size=self.size, learning_rate=rate).packed()

    def state(self) -> Iterator[Tensor]:
        """Every tensor that a step changes and a later one reads."""
        yield self.engine.parts[0].flat.params
        yield self.engine.adam_step
        yield self.engine.loss_scale._state
        for share in self.engine.parts[0].optimizer.states:
            yield from (share.master, share.exp_avg, share.exp_avg_sq)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within it everything may be changed; afterwards it is as before."""
        kept = [tensor.clone() for tensor in self.state()]
        yield
        for tensor, before in zip(self.state(), kept, strict=True):
            tensor.copy_(before)


RATES = (1e-2, 1e-3, 5e-3, 1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_step_with_its_optimizer_replays_as_it_runs(precision: str):
    """Rates change from step to step; in fp16 the second step overflows, is skipped, and leaves nothing behind in the third."""
    whole = WholeStep(precision)
    scale = whole.engine.loss_scale

    def trajectory(step: Callable[[int, float], Tensor]) -> tuple[list[list[float]], dict[str, Tensor]]:
        outcomes = []
        for iteration, rate in enumerate(RATES, start=1):
            if iteration in (2, 3):
                scale.restore({"scale": 2.0**100 if iteration == 2 else 1024.0, "good_steps": 0, "hysteresis": 1})
            outcomes.append(step(iteration, rate).tolist())
        return outcomes, {name: tensor.clone() for name, (_, tensor) in whole.engine.weights().items()}

    with whole.undone():
        eager, eager_weights = trajectory(whole.eager_step)
    with whole.undone():
        graph, packed = capture(whole.fixed_step)

    def replay(iteration: int, rate: float) -> Tensor:
        whole.fill(iteration, rate)
        graph.replay()
        return packed

    with whole.undone():
        before = {name: tensor.clone() for name, (_, tensor) in whole.engine.weights().items()}
        replayed, replayed_weights = trajectory(replay)
        assert whole.engine.adam_step.item() == len(RATES) - (precision == "fp16")
    overflows = [0.0, 1.0, 0.0, 0.0] if precision == "fp16" else [0.0] * 4
    for (loss, norm, skipped, _, used, *_), expected, overflow in zip(replayed, eager, overflows, strict=True):
        assert (skipped, used) == (expected[2], expected[4]) and skipped == overflow
        assert loss == pytest.approx(expected[0], rel=TOLERANCE[precision])
        assert overflow or norm == pytest.approx(expected[1], rel=TOLERANCE[precision])
    # Differences of weights: the starting values, which are equal, would hide them.
    moved, expected = ({name: after[name] - before[name] for name in before} for after in (replayed_weights, eager_weights))
    assert_near(moved, expected, 10 * TOLERANCE[precision])


@pytest.mark.parametrize(("precision", "attention"), list(itertools.product(PRECISIONS, ["auto", "unfused"])))
def test_a_step_never_waits_for_the_device(precision: str, attention: str):
    """CUDA itself raises at whatever synchronises: a number read back, a blocking copy, a shape that depends on data."""
    whole = WholeStep(precision)
    run = make_run(precision, attention)
    engine = TrainingStep(run, one_gpu())
    batches = [[whole._batch(iteration, index) for index in range(2)] for iteration in range(3)]

    def step(iteration: int) -> Tensor:
        held = batches[iteration - 1]
        return engine.step(iteration, held.__getitem__, global_batch_size=whole.size, learning_rate=1e-3).packed()

    step(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second, third = step(2), step(3)
        with pytest.raises(RuntimeError, match="synchronizing"):
            second.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack([second, third]).isfinite().all() and not third[2].item()


def test_fp16_learns_what_fp32_learns():
    found = {}
    for precision in ("fp32", "fp16"):
        whole = WholeStep(precision)
        assert whole.engine.parts[0].flat.params.dtype == compute_dtype(whole.run)
        found[precision] = [whole.eager_step(iteration, 3e-3).tolist() for iteration in range(1, 11)]
    for half, full in zip(found["fp16"], found["fp32"], strict=True):
        assert not half[2] and half[4] == 1024.0
        assert half[:2] == pytest.approx(full[:2], rel=0.02)
    assert [row[0] for row in found["fp16"]] != [row[0] for row in found["fp32"]]
