"""Saved inputs in host memory on a GPU: the same bits, little device memory, and no wait in the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from megactl.config.schema import Data, Memory, Model, Run, Training
from megactl.config.validate import resolve
from megactl.engine.attention import preferred_attention
from megactl.engine.data.batch import Batch
from megactl.engine.mesh import Mesh
from megactl.engine.training_step import TrainingStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

B, S, H, LAYERS = 4, 512, 512, 12
INPUT_BYTES = 2 * B * S * H
OFFLOADED = Memory(recompute="full", offload="activations")


@pytest.fixture(autouse=True)
def kernels_of_a_run() -> Iterator[None]:
    """The fused attention kernel that training takes. FlashAttention-2 adds up the gradient of its queries in no fixed order."""
    with preferred_attention(masked=False):
        yield


def engine(memory: Memory, attention: str = "auto", dropout: float = 0.1) -> TrainingStep:
    model = Model(
        num_layers=LAYERS, hidden_size=H, num_heads=8, vocab_size=1000, hidden_dropout=dropout, attention=attention,
        attention_dropout=dropout if attention == "sdpa" else 0.0,
    )  # fmt: skip
    training = Training(micro_batch_size=B, global_batch_size=3 * B, seq_length=S, precision="bf16", device="cuda")
    run = Run(model=model, training=training, data=Data(mock_data=True), memory=memory)
    return TrainingStep(resolve(run, world_size=1, gpus=1).run, Mesh(device=torch.device("cuda", 0)))


def batches(index: int) -> Batch:
    ids = torch.randint(1000, (B, S), generator=torch.Generator().manual_seed(index)).cuda()
    return Batch(ids, ids.roll(-1, 1), torch.ones(B, S, device="cuda"), torch.arange(S, device="cuda").expand(B, S).contiguous(), None)


def train(made: TrainingStep, held: list[Batch], count: int) -> None:
    for iteration in range(1, count + 1):
        made.step(iteration, held.__getitem__, global_batch_size=3 * B, learning_rate=1e-3)
    torch.cuda.synchronize()


def weights_after(made: TrainingStep, held: list[Batch], count: int = 3) -> list[torch.Tensor]:
    train(made, held, count)
    return [part.flat.params.clone() for part in made.parts]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("memory", [Memory(recompute="full"), OFFLOADED, replace(OFFLOADED, recompute_layers=5)], ids=str)
def test_weights_after_three_steps_are_the_same_bits(memory: Memory, attention: str) -> None:
    held = [batches(index) for index in range(3)]
    plain, recomputed = (weights_after(engine(setting, attention), held) for setting in (Memory(), memory))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_step_with_copies_does_not_wait() -> None:
    held, made = [batches(index) for index in range(3)], engine(OFFLOADED)
    train(made, held, 1)
    with waiting_is_an_error():
        made.step(2, held.__getitem__, global_batch_size=3 * B, learning_rate=1e-3)
    torch.cuda.synchronize()


def test_the_device_holds_no_more_than_what_is_in_flight() -> None:
    held = [batches(index) for index in range(3)]
    peaks = []
    for memory in (Memory(recompute="full"), OFFLOADED):
        made = engine(memory)
        train(made, held, 1)
        torch.cuda.reset_peak_memory_stats()
        train(made, held, 1)
        peaks.append(torch.cuda.max_memory_allocated())
        del made
        torch.cuda.empty_cache()
    # Of twelve inputs four may be there: two that leave, one in use, one that was fetched ahead.
    assert peaks[0] - peaks[1] >= (LAYERS - 5) * INPUT_BYTES
