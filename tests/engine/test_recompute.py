"""Recomputation on one process: what runs a second time and what does not, what is held, and memory that does not grow."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef

from megactl.config.schema import Memory, Model, Parallel, Run, Training
from megactl.engine.entrance import Entrance
from megactl.engine.host_memory import HostMemory
from megactl.engine.mesh import Mesh
from megactl.engine.models.layers import MicroBatch
from megactl.engine.parallelize import Part, build_part
from megactl.engine.saved_inputs import HostStore

B, S, H = 2, 8, 16
LAYERS = 12
CPU = torch.device("cpu")
OFFLOADED = Memory(recompute="full", offload="activations")


def middle_stage(memory: Memory, **model: object) -> Part:
    """A stage without embedding and head: a third of the layers."""
    architecture = Model(num_layers=LAYERS, hidden_size=H, num_heads=2, vocab_size=50, max_positions=S, **model)
    training = Training(micro_batch_size=B, global_batch_size=B, seq_length=S, device="cpu")
    run = Run(model=architecture, parallel=Parallel(data_parallel=1, zero=0), training=training, memory=memory)
    return build_part(run, Mesh(device=CPU), 1, 3)


def micro_batch(index: int = 0) -> MicroBatch:
    return MicroBatch(torch.tensor([1, 2, index * B]), torch.arange(S).expand(B, S))


def forward(part: Part, index: int = 0):
    """Returns (entrance, edge of the output, weak references to the input's and the output's memory)."""
    x, entrance = torch.randn(B, S, H), Entrance()
    y = part.model(entrance.enter(x), micro_batch(index))
    return entrance, get_gradient_edge(y), StorageWeakRef(x.untyped_storage()), StorageWeakRef(y.untyped_storage())


@pytest.mark.parametrize(("norm", "products"), [("pre", 3), ("post", 4)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_group_leaves_its_last_product_out(norm: str, products: int, groups: int) -> None:
    """With norms before the branches nothing reads what the last matrix of a group gives; with a norm behind it, that does."""
    part = middle_stage(Memory(recompute="full", recompute_layers=4 // groups), norm_position=norm)
    called = Counter()
    plain = torch.nn.functional.linear

    def counted(*arguments, **options):
        called["product"] += 1
        return plain(*arguments, **options)

    with mock.patch.object(torch.nn.functional, "linear", counted):
        _, edge, *_ = forward(part)
        assert called["product"] == 4 * 4
        called.clear()
        torch.autograd.backward(edge, torch.randn(B, S, H))
    assert called["product"] == 4 * 4 - groups * (4 - products)


@pytest.mark.parametrize(("memory", "held"), [(Memory(), True), (Memory(recompute="full"), True), (OFFLOADED, False)])
def test_a_stage_holds_its_input_only_where_it_must(memory: Memory, held: bool) -> None:
    part = middle_stage(memory)
    entrance, edge, x, y = forward(part)
    assert x.expired() is not held and y.expired()
    torch.autograd.backward(edge, torch.ones(B, S, H))
    assert entrance.gradient.shape == (B, S, H)


def test_host_memory_stops_growing_when_every_live_micro_batch_has_a_place() -> None:
    part = middle_stage(OFFLOADED)
    store: HostStore = part.model.run_layers.saved.store

    def step(live: int) -> None:
        waiting = [forward(part, index) for index in range(live)]
        for index in range(6):
            entrance, edge, *_ = waiting.pop(0)
            torch.autograd.backward(edge, torch.ones(B, S, H))
            assert torch.isfinite(entrance.gradient).all()
            if index + live < 6:
                waiting.append(forward(part, index + live))

    step(3)
    slots = list(store._free)
    assert len(slots) == 3 and {len(slot.rows) for slot in slots} == {4}
    places = {piece.data_ptr() for slot in slots for row in slot.rows for piece in row.pieces}
    total = store.memory.total_bytes
    step(3)
    assert {piece.data_ptr() for slot in store._free for row in slot.rows for piece in row.pieces} == places
    assert store.memory.total_bytes == total and not store._passes
    assert all(held.piece is None for held in store._leaving)


@pytest.mark.parametrize("order", ["first in first out", "last in first out", "mixed"])
def test_inputs_come_back_in_whatever_order_micro_batches_are_taken(order: str) -> None:
    store = HostStore(CPU)
    values = {m: [torch.full((3, 5), 10.0 * m + g) for g in range(4)] for m in range(4)}
    kept = {m: [store.put(piece.clone(), g) for g, piece in enumerate(pieces)] for m, pieces in values.items()}
    for m in {"first in first out": [0, 1, 2, 3], "last in first out": [3, 2, 1, 0], "mixed": [2, 0, 3, 1]}[order]:
        for group in reversed(range(4)):
            assert torch.equal(store.take(kept[m][group]), values[m][group])
    assert len(store._free) == 4


def test_device_holds_few_of_the_offloaded_inputs() -> None:
    """Two on their way to the host; in backward one in use, one fetched ahead."""
    store = HostStore(CPU)
    held = [store.put(torch.ones(4), group) for group in range(8)]
    on_device = lambda: sum(each.piece is not None for each in held)  # noqa: E731
    assert on_device() == 2
    for group in reversed(range(8)):
        store.take(held[group])
        assert on_device() <= 2


def test_a_second_backward_through_offloaded_inputs_is_refused() -> None:
    part = middle_stage(OFFLOADED)
    _, edge, *_ = forward(part)
    torch.autograd.backward(edge, torch.ones(B, S, H), retain_graph=True)
    with pytest.raises(AssertionError, match="from the last to the first"):
        torch.autograd.backward(edge, torch.ones(B, S, H))


def test_host_buffers_use_whole_blocks() -> None:
    memory = HostMemory(CPU, block_bytes=64)
    tensors = [torch.randn(5, 3), torch.randn(7), torch.randn(40), torch.randn(2, 2)]
    buffers = [memory.buffer(tensor) for tensor in tensors]
    for buffer, tensor in zip(buffers, tensors, strict=True):
        buffer.write(tensor)
    for buffer, tensor in zip(buffers, tensors, strict=True):
        found = torch.empty_like(tensor)
        buffer.read(found)
        assert torch.equal(found, tensor) and buffer.nbytes == tensor.nbytes
    assert memory.total_bytes == -(-sum(tensor.nbytes for tensor in tensors) // 64) * 64
