"""The executor: walks the action list of this rank. Which order that is, the list alone decides (megactl.schedules).

F         forward of one micro-batch on one stage; its tensors live under (stage, micro-batch) until the backward
B         backward; the first of a step overwrites the gradient buffer, the last one lets buckets be reduced on the way (from ZeRO 2
          on each overwrites and reduces: megactl.engine.sharded_gradients)
I, W      backward in two parts: I makes the input gradient and puts the weight gradients on a queue, W computes them
Exchange  posted as one batch and not waited for: a receive is waited for by the action that consumes it, a send when
          its exchange is two exchanges old (its tensor must live that long) or at the end. Between two stages of this rank
          the tensor is handed over
REDUCE    launches what the last backward has not launched already
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megactl.engine.boundary import Boundary
from megactl.engine.collectives import exchange
from megactl.engine.data.batch import Batch
from megactl.engine.entrance import Entrance
from megactl.engine.functional import WeightQueue
from megactl.engine.mesh import Mesh
from megactl.engine.models.layers import MicroBatch, Targets
from megactl.engine.parallelize import Part
from megactl.engine.trace import Recorder
from megactl.schedules import Action, Exchange, Kind, RankProgram

# Exchanges whose sends may be under way: one whose peer is computing and the one after it.
_OPEN_EXCHANGES = 2


@dataclass
class _Live:
    """A micro-batch between its forward and its backward on one stage.

    entrance: where the gradient of the stage's input arrives, to be sent. output: where backward begins. Neither the input nor the
    output is kept here: what backward reads of them the graph holds, or host memory, or the ranks that share it. dtype: the output's.
    deferred: where a backward in two parts leaves the second.
    """

    entrance: Entrance
    output: GradientEdge
    dtype: torch.dtype
    deferred: WeightQueue | None


@dataclass(frozen=True)
class StepInputs:
    """What one step needs: this replica's micro-batches, their random keys [m, 3], the gradient of the loss sums [k]."""

    batches: Sequence[Batch]
    rng: Tensor
    loss_gradient: Tensor
    dropout: bool = True


class PipelineExecutor:
    """Runs steps of one rank over its parts (stages). `recorder`: where set, it is told when each computation ran."""

    def __init__(self, parts: Sequence[Part], mesh: Mesh, *, boundary: Boundary) -> None:
        self.parts = {part.virtual_stage: part for part in parts}
        self.mesh, self.dtype, self.boundary = mesh, boundary.dtype, boundary
        self.recorder: Recorder | None = None

    def run(self, schedule: RankProgram, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Execute one step; returns the model's loss sums and what each of them counts, [k] in float64, zero unless on the last stage."""
        return _Step(self, schedule, inputs).run()


class _Step:
    """The state of one step in flight."""

    def __init__(self, executor: PipelineExecutor, schedule: RankProgram, inputs: StepInputs) -> None:
        self.executor, self.schedule, self.inputs = executor, schedule, inputs
        self.mesh, self.parts = executor.mesh, executor.parts
        self.live: dict[tuple[int, int], _Live] = {}
        self.deferred: dict[tuple[int, int], WeightQueue] = {}
        self.local: dict[tuple, Tensor] = {}
        self.masks: dict[int, Tensor | None] = {}
        self.arriving: dict[tuple, tuple[Tensor, object]] = {}
        self.outgoing: dict[tuple, Tensor] = {}
        self.open: deque[list[tuple[Tensor, object]]] = deque()
        self.trains, self.split = schedule.trains, schedule.in_two_parts
        self.loss_sums = torch.zeros_like(inputs.loss_gradient)
        self.loss_counts = torch.zeros_like(inputs.loss_gradient)

    def run(self) -> tuple[Tensor, Tensor]:
        """Walk this rank's program."""
        with torch.set_grad_enabled(self.trains):
            for item in self.schedule.items:
                if isinstance(item, Exchange):
                    self._exchange(item)
                elif item.kind is Kind.REDUCE:
                    self.parts[item.virtual_stage].reducer.flush()
                else:
                    self._compute(item)
        while self.open:
            self._finish_sends(self.open.popleft())
        return self.loss_sums, self.loss_counts

    def _compute(self, action: Action) -> None:
        do: dict[Kind, Callable[[Action, Tensor | None], None]] = {
            Kind.F: self._forward, Kind.B: self._backward, Kind.I: self._backward, Kind.W: self._weights,
        }  # fmt: skip
        received = self._take(action)
        recorder = self.executor.recorder
        with nullcontext() if recorder is None else recorder.computation(action):
            do[action.kind](action, received)

    def _forward(self, action: Action, received: Tensor | None) -> None:
        stage, m = action.virtual_stage, action.microbatch
        part, batch = self.parts[stage], self.inputs.batches[m]
        entrance = Entrance()
        x = batch.tokens if received is None else entrance.enter(received) if self.trains else received
        micro_batch = self._micro_batch(part, m)
        y = part.model(x, micro_batch)
        if stage == self.schedule.num_stages - 1:
            targets = targets_of(batch, torch.promote_types(self.executor.dtype, torch.float32))
            y = part.model.loss_sums(y, targets)
            self.loss_sums += y.detach()
            self.loss_counts += part.model.loss_counts(targets)
        else:
            self._hand_over(action, y.detach())
        if self.trains:
            self.live[stage, m] = _Live(entrance, get_gradient_edge(y), y.dtype, micro_batch.deferred)

    def _micro_batch(self, part: Part, m: int) -> MicroBatch:
        batch = self.inputs.batches[m]
        accumulate = self.trains and part.reducer.accumulates and m != self.schedule.first_backward(part.virtual_stage)
        return MicroBatch(
            self.inputs.rng[m], batch.position_ids, self._mask(part.virtual_stage, m), accumulate, self.inputs.dropout, batch.token_types,
            WeightQueue() if (part.virtual_stage, m) in self.split else None, rows=batch.rows,
            segments=batch.block_segments,
        )  # fmt: skip

    def _mask(self, stage: int, m: int) -> Tensor | None:
        """The micro-batch's attention mask, one for all stages of this rank: with documents it is as large as a layer's scores."""
        if m not in self.masks:
            self.masks[m] = attention_mask(self.inputs.batches[m])
        return self.masks.pop(m) if stage == max(self.parts) else self.masks[m]

    def _backward(self, action: Action, received: Tensor | None) -> None:
        stage, m = action.virtual_stage, action.microbatch
        gradient = self.inputs.loss_gradient if received is None else received
        live = self.live.pop((stage, m))
        reducer = self.parts[stage].reducer
        reducer.defer_to(live.deferred)
        if live.deferred is not None:
            self.deferred[stage, m] = live.deferred
        elif m == self.schedule.last_backward(stage):
            reducer.arm()
        with self.parts[stage].backward():
            torch.autograd.backward(live.output, gradient.to(live.dtype))
        if live.deferred is None:
            reducer.end_micro_batch()
        if stage > 0:
            self._hand_over(action, live.entrance.gradient)

    def _weights(self, action: Action, received: None) -> None:
        stage, m = action.virtual_stage, action.microbatch
        if m == self.schedule.last_backward(stage):
            self.parts[stage].reducer.arm()
        self.deferred.pop((stage, m)).run()
        self.parts[stage].reducer.end_micro_batch()

    def _hand_over(self, action: Action, tensor: Tensor) -> None:
        """Keep a result for the exchange that sends it, or for the next stage where that is on this rank."""
        transfer = self.schedule.sent_by(action)
        if transfer is not None:
            self.outgoing[transfer] = self.executor.boundary.to_send(tensor)
        else:
            payload, step = ("activation", 1) if action.kind is Kind.F else ("gradient", -1)
            self.local[payload, action.virtual_stage + step, action.microbatch] = tensor

    def _take(self, action: Action) -> Tensor | None:
        """The tensor of another stage that a computation reads, waiting for it if it is on its way; None where it reads none."""
        transfer = self.schedule.received_for(action)
        if transfer is not None:
            tensor, work = self.arriving.pop(transfer)
            work.wait()
            return self.executor.boundary.received(tensor, self.inputs.batches[action.microbatch].tokens.shape)
        payload = "activation" if action.kind is Kind.F else "gradient"
        at_the_end = action.virtual_stage == (0 if action.kind is Kind.F else self.schedule.num_stages - 1)
        if action.kind is Kind.W or at_the_end:
            return None
        return self.local.pop((payload, action.virtual_stage, action.microbatch))

    def _exchange(self, item: Exchange) -> None:
        sends = [(self.outgoing.pop(a.transfer), a) for a in item.actions if a.kind is Kind.SEND]
        memory, batches = self.executor.boundary.to_receive, self.inputs.batches
        receives = [(memory(batches[a.microbatch].tokens.shape), a) for a in item.actions if a.kind is Kind.RECV]
        ranks = self.mesh.pp.ranks
        send_works, receive_works = exchange(
            [(tensor, ranks[a.peer]) for tensor, a in sends], [(tensor, ranks[a.peer]) for tensor, a in receives], self.mesh.pp.group
        )
        for index, (tensor, action) in enumerate(receives):
            self.arriving[action.transfer] = (tensor, receive_works[min(index, len(receive_works) - 1)])
        self.open.append([(tensor, send_works[min(i, len(send_works) - 1)]) for i, (tensor, _) in enumerate(sends)])
        if len(self.open) > _OPEN_EXCHANGES:
            self._finish_sends(self.open.popleft())

    @staticmethod
    def _finish_sends(sends: list[tuple[Tensor, object]]) -> None:
        for _, work in sends:
            work.wait()


def targets_of(batch: Batch, dtype: torch.dtype) -> Targets:
    """The loss's side of a micro-batch, its mask in the loss's type."""
    return Targets(batch.labels, batch.loss_mask.to(dtype), batch.sentence_labels)


def attention_mask(batch: Batch) -> Tensor | None:
    """Who may look at whom where not everybody may, made once for all layers: bool [b, 1, s or 1, s]."""
    if batch.padding_mask is not None:
        return padding_attention_mask(batch.padding_mask)
    return None if batch.segments is None else document_mask(batch.segments)


def padding_attention_mask(padding_mask: Tensor) -> Tensor:
    """bool [b, 1, 1, s], True where there is a token to look at. padding_mask [b, s].

    A sequence without any token sees all of itself: nothing comes of it, whereas a softmax over nothing is NaN.
    """
    return (padding_mask | ~padding_mask.any(-1, keepdim=True))[:, None, None, :]


def document_mask(segments: Tensor) -> Tensor:
    """bool [b, 1, s, s], True where a token may look: at earlier tokens of its own document. segments [b, s]."""
    s = segments.shape[-1]
    causal = torch.ones(s, s, dtype=torch.bool, device=segments.device).tril_()
    return (segments[:, None, :, None] == segments[:, None, None, :]) & causal
