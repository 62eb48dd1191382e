"""Where the inputs of recomputed layers stay until backward: on the device, shared over tensor-parallel ranks, in host memory, or both.

Whole on the device they take 2 s b h bytes a group in 16 bits. Shared (`--partition-activations`), each of the t tensor-parallel
ranks, which all hold the same input, keeps its t-th part, and one all-gather of those bytes a group brings it back. In host memory
(`--offload activations`) they take none of the device's, and two copies a group travel beside the computing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megactl.engine.collectives import all_gather
from megactl.engine.host_memory import CopyStream, HostBuffer, HostMemory
from megactl.engine.mesh import Axis

# Inputs on their way to the host that the device still holds. With two, one travels while the layers behind the other compute.
_LEAVING = 2


@dataclass
class SavedInput:
    """An input that is kept: its shape, and its place in host memory where that is where it went."""

    shape: torch.Size
    host: HostInput | None = None


class SavedInputs:
    """Keeps and gives back the inputs of one stage's groups of layers. `tp`: the ranks to share with; `store`: host memory."""

    def __init__(self, tp: Axis | None = None, store: HostStore | None = None) -> None:
        self.tp, self.store = tp, store

    def keep(self, x: Tensor, group: int) -> tuple[Tensor | None, SavedInput]:
        """(what stays on the device, if anything; what `restore` needs besides). `group` counts a stage's groups from 0."""
        piece = x.detach() if self.tp is None else own_part(x.detach(), self.tp)
        if self.store is None:
            return (x if self.tp is None else piece), SavedInput(x.shape)
        return None, SavedInput(x.shape, self.store.put(piece, group))

    def restore(self, kept: Tensor | None, saved: SavedInput) -> Tensor:
        """The whole input [b, s, h]."""
        piece = kept if self.store is None or saved.host is None else self.store.take(saved.host)
        assert piece is not None, "neither the device nor the host holds the input"
        return piece.view(saved.shape) if self.tp is None else gathered(piece, saved.shape, self.tp)


def own_part(x: Tensor, tp: Axis) -> Tensor:
    """This rank's part of the flattened x, a copy, so that x itself can go. tp divides the heads, and with them x's elements."""
    return x.reshape(tp.size, -1)[tp.rank].clone()


def gathered(part: Tensor, shape: torch.Size, tp: Axis) -> Tensor:
    """All ranks' parts as one tensor of `shape`."""
    whole = part.new_empty(shape.numel())
    all_gather(whole, part, tp.group)
    return whole.view(shape)


@dataclass(eq=False)
class _Slot:
    """Host memory for the inputs of one micro-batch on a stage, one a group; `free` is when the last copy out of it is done."""

    rows: list[HostBuffer] = field(default_factory=list)
    free: Any = None


@dataclass(eq=False)
class _Pass:
    """A micro-batch between its forward and its backward: what it left in a slot, first group first."""

    slot: _Slot
    inputs: list[HostInput] = field(default_factory=list)


@dataclass(eq=False)
class HostInput:
    """One input in host memory. `piece`: the device's copy, while it leaves and once it is fetched; events say when copies are done."""

    owner: _Pass
    row: HostBuffer
    shape: torch.Size
    piece: Tensor | None
    stored: Any = None
    fetched: Any = None


class HostStore:
    """Host memory for the saved inputs of one stage, and the copies to and fro.

    A micro-batch takes a slot at its first group and gives it back when its backward has fetched that group again, so there are as many
    slots as micro-batches were ever live at once, and memory stops growing in the first step (DeepSpeed's contiguous checkpointing).

    Of the order in which backward asks it knows this: within a micro-batch last group first. While one group computes, the one before
    it is fetched; with a micro-batch's first group, the last one of the oldest other micro-batch, which most schedules turn to next.
    A wrong guess costs the device one input and no correctness.

    Copies run on streams of their own, one a direction. Device memory that a copy reads or writes is kept by a reference until the
    computing stream waits for the copy's event. So the allocator may hand it out again at once (with `record_stream` it would have to
    see the event pass first, and the host, which runs ahead, would allocate more meanwhile), and nothing waits on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._down, self._up = CopyStream(device), CopyStream(device)
        self._free: list[_Slot] = []
        self._passes: list[_Pass] = []
        self._leaving: deque[HostInput] = deque()
        self.memory = HostMemory(device)

    def put(self, piece: Tensor, group: int) -> HostInput:
        """Start to copy group `group`'s piece to the host. A micro-batch's groups come in order, from 0, without another's between."""
        if group == 0:
            self._passes.append(_Pass(self._free.pop() if self._free else _Slot()))
        owner = self._passes[-1]
        assert group == len(owner.inputs), "the groups of a micro-batch come in order"
        if group == len(owner.slot.rows):
            owner.slot.rows.append(self.memory.buffer(piece))
        held = HostInput(owner, owner.slot.rows[group], piece.shape, piece)
        owner.inputs.append(held)
        while len(self._leaving) >= _LEAVING:
            self._let_go(self._leaving.popleft())
        held.stored = self._down.start(partial(held.row.write, piece), after=[owner.slot.free])
        self._leaving.append(held)
        return held

    def _let_go(self, held: HostInput) -> None:
        """Give up the device's copy of an input that is on its way to the host."""
        self._down.wait(held.stored)
        held.piece = None

    def take(self, held: HostInput) -> Tensor:
        """The piece, back on the device; its place in host memory is free once the whole micro-batch was taken."""
        owner = held.owner
        assert owner.inputs and owner.inputs[-1] is held, "backward takes the groups of a micro-batch from the last to the first"
        self._fetch(held)
        if held in self._leaving:
            # Still here: it need not come back. Its memory may be used for something else after the copy that reads it.
            self._leaving.remove(held)
            self._down.wait(held.stored)
        self._up.wait(held.fetched)
        owner.slot.free = held.fetched or owner.slot.free
        owner.inputs.pop()
        if not owner.inputs:
            self._passes.remove(owner)
            self._free.append(owner.slot)
        self._fetch_ahead(owner)
        piece, held.piece = held.piece, None
        assert piece is not None
        return piece

    def _fetch_ahead(self, owner: _Pass) -> None:
        candidates: Sequence[_Pass] = [owner] if owner.inputs else self._passes
        if candidates and candidates[0].inputs:
            self._fetch(candidates[0].inputs[-1])

    def _fetch(self, held: HostInput) -> None:
        """Start to copy it back, unless the device has it or it is on its way."""
        if held.piece is None:
            held.piece = torch.empty(held.shape, dtype=held.row.dtype, device=self.device)
            held.fetched = self._up.start(partial(held.row.read, held.piece), after=[held.stored])
