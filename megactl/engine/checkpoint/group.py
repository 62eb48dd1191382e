"""How ranks agree during a save or a load: objects to and from rank 0, and failures that every rank learns of.

The rule these calls exist for: no rank raises alone before a collective, because the others would wait in it for ever.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.distributed as dist


class RankGroup(Protocol):
    """The ranks that save or load together. Every method but the attributes is collective: all ranks call it, in the same order."""

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks, in rank order, on rank 0; None elsewhere."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        ...

    def all_ok(self, ok: bool, message: str) -> list[str]:
        """The messages of the ranks that are not ok, the same list on every rank; empty where all are."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called."""
        ...


class SingleProcess:
    """A group of one: nothing is sent."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any] | None:
        """[value]."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The value itself."""
        return value

    def all_ok(self, ok: bool, message: str) -> list[str]:
        """[] or [message]."""
        return [] if ok else [message]

    def barrier(self) -> None:
        """Nothing to wait for."""


class ProcessGroup:
    """A torch.distributed group over CPU tensors (gloo): objects travel pickled, between ranks of one run only."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: a gloo group of all ranks that save together (None: the default group, which must then be gloo)."""
        # Objects over NCCL would need a stream and device memory in the middle of an error path.
        assert dist.get_backend(group) == "gloo", "a checkpoint group must be gloo"
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._root = 0 if group is None else dist.get_global_rank(group, 0)

    def gather(self, value: Any) -> list[Any] | None:
        """See RankGroup."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=self._root, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """See RankGroup."""
        values = [value]
        dist.broadcast_object_list(values, src=self._root, group=self.group)
        return values[0]

    def all_ok(self, ok: bool, message: str) -> list[str]:
        """See RankGroup; each message is led by its rank."""
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, None if ok else f"rank {self.rank}: {message}", group=self.group)
        return [text for text in messages if text is not None]

    def barrier(self) -> None:
        """See RankGroup."""
        dist.barrier(group=self.group)
