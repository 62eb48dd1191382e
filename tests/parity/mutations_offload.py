"""Faults of what lies in host memory and of the copies to and fro."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from megactl.engine.offload import HostShard, OffloadedOptimizer, StreamedParameters
from parity.faults import Mutation, nothing, patched


def _into_the_other_lane(original: Callable) -> Callable:
    def mutated(self, number):
        self._lanes.reverse()
        original(self, number)
        self._lanes.reverse()

    return mutated


@contextmanager
def _up_before_the_update() -> Iterator[None]:
    send, compute = OffloadedOptimizer._send, OffloadedOptimizer._compute

    def mutated(self, number, scalars):
        send(self, number)
        compute(self, number, scalars)

    with mock.patch.object(OffloadedOptimizer, "_send", nothing(send)), mock.patch.object(OffloadedOptimizer, "_compute", mutated):
        yield


def _all_but_the_last_bucket(original: Callable) -> Callable:
    def mutated(self, number):
        if self._pieces[number].index != self._pieces[-1].index:
            original(self, number)

    return mutated


def _to_another_place(original: Callable) -> Callable:
    """The own share arrives where another replica's belongs."""

    def mutated(self, whole):
        handle = original(self, whole)
        if handle is not None:
            handle.wait()
        whole.copy_(whole.view(2, -1).roll(1, 0).view(-1))

    return mutated


def _as_before(original: Callable) -> Callable:
    def mutated(self, piece, scalars):
        before = self.states[piece.index].param[piece.part].clone()
        original(self, piece, scalars)
        return before

    return mutated


_BOTH = {"zero": 3, "offload": "optimizer,parameters"}
OFFLOAD = {
    "gradients come down into the other lane": Mutation(
        patched(OffloadedOptimizer, "_fetch", _into_the_other_lane), (1, 1, 1), "weight", {"offload": "optimizer"}
    ),
    "weights go up before they are updated": Mutation(
        _up_before_the_update, (1, 1, 2), "loss on rank 0, step 2", {"offload": "optimizer", "zero": 1}
    ),
    "the last bucket does not go up": Mutation(
        patched(OffloadedOptimizer, "_send", _all_but_the_last_bucket), (1, 1, 2), "weight", {"offload": "optimizer", "zero": 2}
    ),
    "whole weights are not gathered after an update on the host": Mutation(
        patched(OffloadedOptimizer, "_gather", lambda original: lambda self, index: []), (1, 1, 2), "weight", _BOTH | {"threshold": 100}
    ),
    "shares in host memory change places": Mutation(
        patched(HostShard, "gather", _to_another_place), (1, 1, 2), "loss on rank 0, step 1", _BOTH
    ),
    "what the device updated does not go down": Mutation(
        patched(StreamedParameters, "_updated", _as_before), (1, 1, 2), "weight", {"zero": 3, "offload": "parameters"}
    ),
}  # fmt: skip
