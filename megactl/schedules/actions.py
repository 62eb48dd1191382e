"""The vocabulary of pipeline schedules: actions, exchanges, and the two forms a schedule takes.

A `Schedule` says in which order every rank computes. `lower` turns it into a `LoweredSchedule`, which also says when tensors
move and when gradients are reduced. The planner, the simulator, the validator and the executor read the same objects, so
what is predicted is what runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from megactl.errors import ScheduleError

Payload = Literal["activation", "gradient"]

NONE = -1
"""Value of `microbatch` and `slot` on actions that belong to a whole stage (REDUCE, UNSHARD, RESHARD)."""


class Kind(Enum):
    """What an action does. F, B, I and W are computations; the rest is communication."""

    F = "F"  # forward
    B = "B"  # full backward: input gradient and weight gradient
    I = "I"  # noqa: E741  (the field's own letter) input gradient only
    W = "W"  # weight gradient only
    SEND = "SEND"
    RECV = "RECV"
    REDUCE = "REDUCE"  # launch the data-parallel reduction of one stage's gradients
    UNSHARD = "UNSHARD"  # gather sharded weights of one stage
    RESHARD = "RESHARD"  # drop the gathered copy

    # Members are singletons; Enum's own hash is a Python call, and long schedules look kinds up millions of times.
    __hash__ = object.__hash__


FORWARD, WEIGHTS, SEND, RECV = Kind.F, Kind.W, Kind.SEND, Kind.RECV
"""For loops over long schedules: in Python 3.11 a member read off its Enum takes ten times as long as a name."""

COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
INPUT_GRADIENT = frozenset({Kind.B, Kind.I})
"""Kinds that produce the gradient the previous stage waits for."""
WEIGHT_GRADIENT = frozenset({Kind.B, Kind.W})
"""Kinds that write weight gradients; the last of them ends a micro-batch's life on its stage."""


class Transfer(NamedTuple):
    """Identity of one tensor on its way between stages: the same at the sending and at the receiving end."""

    payload: Payload
    producer: int
    consumer: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.payload} of micro-batch {self.microbatch} from stage {self.producer} to stage {self.consumer}"


class Action(NamedTuple):
    """One step of one rank. (A named tuple, since a large job's schedule has millions: a frozen dataclass is made four times as slowly.)

    `virtual_stage` is always a stage of the rank that holds the action: of a SEND the stage that produced the tensor, of a
    RECV the stage that will consume it; `transfer` names both ends and is equal for the two halves of a match.
    `slot` is the identity of the buffers of an in-flight micro-batch on its virtual stage: of a SEND or RECV the slot of
    `microbatch` on `virtual_stage`, so a received activation belongs in the slot its forward uses.
    """

    kind: Kind
    virtual_stage: int
    microbatch: int = NONE
    slot: int = NONE
    payload: Payload | None = None
    peer: int | None = None

    @property
    def transfer(self) -> Transfer:
        """The tensor a SEND or RECV moves. Activations go to the next stage, gradients to the previous one."""
        assert self.payload is not None and self.kind in (SEND, RECV), self
        stage, step = self.virtual_stage, 1 if self.payload == "activation" else -1
        if self.kind is SEND:
            return Transfer(self.payload, stage, stage + step, self.microbatch)
        return Transfer(self.payload, stage - step, stage, self.microbatch)

    def __str__(self) -> str:
        where = f"stage {self.virtual_stage}"
        if self.microbatch != NONE:
            where = f"micro-batch {self.microbatch}, {where}, slot {self.slot}"
        toward = {Kind.SEND: "to", Kind.RECV: "from"}.get(self.kind)
        return f"{self.kind.value}({where})" if toward is None else f"{self.kind.value} {self.payload}({where}, {toward} rank {self.peer})"


@dataclass(frozen=True, slots=True)
class Exchange:
    """Sends and receives posted together (one batch_isend_irecv), in this order. Posting does not wait for completion."""

    actions: tuple[Action, ...]

    def __str__(self) -> str:
        return "exchange[" + "; ".join(str(action) for action in self.actions) + "]"


Item = Action | Exchange


class _Placement:
    """What every form of a schedule has: which rank holds which stage, and so which tensors move."""

    num_ranks: int
    num_stages: int
    stage_to_rank: tuple[int, ...]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Virtual stages on a rank, ascending."""
        return tuple(stage for stage, owner in enumerate(self.stage_to_rank) if owner == rank)

    def received_for(self, action: Action) -> Transfer | None:
        """The transfer a computation reads; None at the ends of the pipeline and from a stage of the same rank."""
        stage = action.virtual_stage
        if action.kind is FORWARD:
            return self._between_ranks(Transfer("activation", stage - 1, stage, action.microbatch))
        if action.kind in INPUT_GRADIENT:
            return self._between_ranks(Transfer("gradient", stage + 1, stage, action.microbatch))
        return None

    def sent_by(self, action: Action) -> Transfer | None:
        """The transfer a computation gives rise to; None at the ends of the pipeline and to a stage of the same rank."""
        stage = action.virtual_stage
        if action.kind is FORWARD:
            return self._between_ranks(Transfer("activation", stage, stage + 1, action.microbatch))
        if action.kind in INPUT_GRADIENT:
            return self._between_ranks(Transfer("gradient", stage, stage - 1, action.microbatch))
        return None

    def _between_ranks(self, transfer: Transfer) -> Transfer | None:
        producer, consumer = transfer.producer, transfer.consumer
        exists = producer >= 0 and consumer >= 0 and producer < self.num_stages and consumer < self.num_stages
        return transfer if exists and self.stage_to_rank[producer] != self.stage_to_rank[consumer] else None


class _AllRanks(_Placement, ABC):
    """What a schedule and its lowered form share: which slots a stage needs, and the order of its weight gradients."""

    @abstractmethod
    def compute_program(self, rank: int) -> tuple[Action, ...]:
        """Computations of a rank in order."""

    @cached_property
    def _slot_counts(self) -> dict[int, int]:
        counts = dict.fromkeys(range(self.num_stages), 0)
        for rank in range(self.num_ranks):
            for action in self.compute_program(rank):
                counts[action.virtual_stage] = max(counts[action.virtual_stage], action.slot + 1)
        return counts

    @cached_property
    def _weight_gradient_order(self) -> dict[int, list[int]]:
        return {
            stage: order for rank in range(self.num_ranks) for stage, order in weight_gradient_order(self.compute_program(rank)).items()
        }

    def num_slots(self, rank: int, virtual_stage: int) -> int:
        """Buffers (peak live micro-batches) of a stage on a rank; 0 where the rank does not hold the stage."""
        return self._slot_counts[virtual_stage] if self.stage_to_rank[virtual_stage] == rank else 0

    def first_backward(self, virtual_stage: int) -> int:
        """The micro-batch whose B or W comes first on the stage: it overwrites the gradient buffer, later ones add."""
        return self._weight_gradient_order[virtual_stage][0]

    def last_backward(self, virtual_stage: int) -> int:
        """The micro-batch whose B or W comes last on the stage: after it the stage's gradients are complete."""
        return self._weight_gradient_order[virtual_stage][-1]


def weight_gradient_order(computations: Sequence[Action]) -> dict[int, list[int]]:
    """The micro-batches of one rank's B and W in order, by virtual stage."""
    order: dict[int, list[int]] = {}
    for kind, stage, microbatch, _, _, _ in computations:
        if kind in WEIGHT_GRADIENT:
            order.setdefault(stage, []).append(microbatch)
    return order


@dataclass(frozen=True)
class Schedule(_AllRanks):
    """Per rank, the computations in order. Slots are assigned (`Programs`: when asked for); communication is not part of this form."""

    name: str
    num_ranks: int
    num_microbatches: int
    num_stages: int
    stage_to_rank: tuple[int, ...]
    programs: Sequence[tuple[Action, ...]]

    def compute_program(self, rank: int) -> tuple[Action, ...]:
        """Computations of a rank in order."""
        return self.programs[rank]

    def order(self, rank: int) -> Order:
        """Computations of a rank in order, as (kind, virtual stage, micro-batch): all that their times depend on."""
        if isinstance(self.programs, Programs):
            return self.programs.orders[rank]
        return [action[:3] for action in self.programs[rank]]


@dataclass(frozen=True)
class LoweredSchedule(_AllRanks):
    """Per rank, what the executor walks: computations, exchanges and gradient reductions, in issue order."""

    name: str
    num_ranks: int
    num_microbatches: int
    num_stages: int
    stage_to_rank: tuple[int, ...]
    programs: tuple[tuple[Item, ...], ...]

    def program(self, rank: int) -> tuple[Item, ...]:
        """Items of a rank in issue order."""
        return self.programs[rank]

    def rank_program(self, rank: int) -> RankProgram:
        """What the executor of one rank walks."""
        return RankProgram(self.name, rank, self.num_ranks, self.num_microbatches, self.num_stages, self.stage_to_rank, self.programs[rank])

    def compute_program(self, rank: int) -> tuple[Action, ...]:
        """Computations of a rank in order, read from the lowered program itself."""
        return tuple(item for item in self.programs[rank] if isinstance(item, Action) and item.kind in COMPUTE)

    def computations(self) -> Schedule:
        """The schedule of computations inside this lowered one."""
        programs = tuple(self.compute_program(rank) for rank in range(self.num_ranks))
        return Schedule(self.name, self.num_ranks, self.num_microbatches, self.num_stages, self.stage_to_rank, programs)


@dataclass(frozen=True)
class RankProgram(_Placement):
    """What one rank's executor walks: its own part of a `LoweredSchedule`, and the placement of all stages."""

    name: str
    rank: int
    num_ranks: int
    num_microbatches: int
    num_stages: int
    stage_to_rank: tuple[int, ...]
    items: tuple[Item, ...]

    @cached_property
    def computations(self) -> tuple[Action, ...]:
        """Computations in order."""
        return tuple(item for item in self.items if isinstance(item, Action) and item.kind in COMPUTE)

    @cached_property
    def trains(self) -> bool:
        """Whether there is any backward."""
        return any(action.kind in INPUT_GRADIENT for action in self.computations)

    @cached_property
    def in_two_parts(self) -> frozenset[tuple[int, int]]:
        """(virtual stage, micro-batch) of each backward that is I and W."""
        return frozenset((action.virtual_stage, action.microbatch) for action in self.computations if action.kind is Kind.I)

    @cached_property
    def _weight_gradient_order(self) -> dict[int, list[int]]:
        return weight_gradient_order(self.computations)

    def first_backward(self, virtual_stage: int) -> int:
        """See `LoweredSchedule.first_backward`; of a stage of this rank."""
        return self._weight_gradient_order[virtual_stage][0]

    def last_backward(self, virtual_stage: int) -> int:
        """See `LoweredSchedule.last_backward`; of a stage of this rank."""
        return self._weight_gradient_order[virtual_stage][-1]


Order = Sequence[tuple[Kind | str, int, int]]
"""One rank's computations as (kind, virtual stage, micro-batch)."""


class Programs(Sequence[tuple[Action, ...]]):
    """The programs of all ranks, each made from its order when somebody asks for it.

    Times follow from the orders alone, and a rank that starts needs the slots of its own program and of those it sends activations to:
    of a large job's half a million actions most are never made.
    """

    def __init__(self, orders: Sequence[Sequence[tuple[Kind, int, int]]]) -> None:
        """`made` has the programs that were asked for, by rank."""
        self.orders = orders
        self.made: dict[int, tuple[Action, ...]] = {}

    def __len__(self) -> int:
        return len(self.orders)

    def __getitem__(self, rank: int) -> tuple[Action, ...]:  # type: ignore[override]  (nobody takes a slice of the ranks)
        # Raises IndexError behind the last rank, as iteration needs.
        rank = range(len(self.orders))[rank]
        if rank not in self.made:
            self.made[rank] = assign_slots(self.orders[rank])
        return self.made[rank]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Programs | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


def build(name: str, orders: Sequence[Order], *, num_microbatches: int, stage_to_rank: Sequence[int]) -> Schedule:
    """A `Schedule` from one order a rank: slots are assigned here, so that whoever makes an order only chooses it.

    Raises ScheduleError where a backward has no forward before it.
    """
    programs = tuple(assign_slots(order) for order in orders)
    return Schedule(name, len(orders), num_microbatches, len(stage_to_rank), tuple(stage_to_rank), programs)


def assign_slots(order: Order) -> tuple[Action, ...]:
    """One rank's computations with their slots: F takes the smallest free one of its stage, B or W sets it free again.

    Raises ScheduleError where a backward has no forward before it, since then no buffers exist to work on.
    """
    live: dict[tuple[int, int], int] = {}
    freed: dict[int, list[int]] = {}
    opened: dict[int, int] = {}
    kinds = {name: kind for kind in Kind for name in (kind, kind.value)}
    result = []
    for position, (name, stage, microbatch) in enumerate(order):
        kind, key = kinds[name], (stage, microbatch)
        if kind is FORWARD:
            # Slots are opened in order, so a freed one is always smaller than the next new one.
            if freed.get(stage):
                slot = heappop(freed[stage])
            else:
                slot = opened.get(stage, 0)
                opened[stage] = slot + 1
            live[key] = slot
        elif key not in live:
            part = f"{kind.value} of micro-batch {microbatch} on stage {stage}"
            raise ScheduleError(f"position {position}: {part} has no forward before it", "put the forward first in the rank's order")
        elif kind in WEIGHT_GRADIENT:
            slot = live.pop(key)
            heappush(freed.setdefault(stage, []), slot)
        else:
            slot = live[key]
        result.append(Action(kind, stage, microbatch, slot))
    return tuple(result)
