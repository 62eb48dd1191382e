"""Host memory that a GPU copies from and to without waiting: page-locked, and none of it wasted; and the streams of such copies.

torch's allocator of page-locked memory rounds every request up to a power of two, so that buffers of 192 MiB would take 256. Two ways
around that are here. What comes and goes (`HostMemory`) is made of blocks that are powers of two, and a buffer is as many pieces of
them as it needs: a copy of it is a copy a piece. What stays, and what kernels of the CPU work on (`host_tensor`), is one range of pages
of its own, which CUDA is told to lock.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megactl.errors import RunError

BLOCK_BYTES = 2**25


class CopyStream:
    """Copies in one direction between host and `device`, on a stream of their own; on a CPU at once.

    What `start` returns stands for the end of a copy (None: it is over) and goes to `wait` or `finish`.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, copy: Callable[[], Any], *, after: Sequence[Any] = ()) -> Any:
        """Copy when the computing stream has come to this point and the events `after` have passed. Returns the event of its end."""
        if self.stream is None:
            copy()
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        for event in after:
            if event is not None:
                self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            copy()
        return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Let the computing stream wait for a copy."""
        if event is not None and self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)

    @staticmethod
    def finish(event: Any) -> None:
        """Let the host wait for a copy."""
        if event is not None:
            event.synchronize()

    @contextmanager
    def behind(self) -> Iterator[None]:
        """Inside, what is started follows the copies of this stream."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield


def host_tensor(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`numel` zeros in host memory, page-locked where `device` is a GPU. Given back with the last tensor that refers to them.

    Raises RunError where there is not so much memory, or CUDA may not lock it.
    """
    if not numel:
        return torch.empty(0, dtype=dtype)
    nbytes = numel * dtype.itemsize
    try:
        pages = _Pages(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RunError(f"{nbytes} bytes of host memory: {error.strerror}", "offload less, or use more nodes") from error
    found = torch.frombuffer(pages, dtype=dtype)
    if device.type == "cuda":
        pages.advise_large()
        # By the threads of torch's pool; CUDA would ask for the pages one after the other.
        found.zero_()
        pages.lock(found.data_ptr())
    return found


class _Pages(mmap.mmap):
    """Anonymous memory, from a page's start on; unlocked before it goes."""

    _unlock: Callable[[], Any] | None = None

    def advise_large(self) -> None:
        """Ask for large pages: a range of them is locked many times faster."""
        try:
            self.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            # Advice only: a kernel without them gives small ones.
            return

    def lock(self, address: int) -> None:
        """Let CUDA lock the pages. Raises RunError."""
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(address, len(self), 0)
        if int(code) != 0:
            name = runtime.cudaGetErrorString(code)
            raise RunError(f"{len(self)} bytes of host memory cannot be page-locked: {name}", "offload less, or use more nodes")
        self._unlock = lambda: runtime.cudaHostUnregister(address)

    def __del__(self) -> None:
        # Only here are the pages still mapped: a weak reference's callback would come after they have gone.
        if self._unlock is not None:
            self._unlock()


@dataclass(frozen=True, eq=False)
class HostBuffer:
    """Host memory for a tensor: 1-d pieces of it, in order."""

    pieces: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.pieces[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    def write(self, source: Tensor) -> None:
        """Copy `source` here. From a GPU the copy is only started, on its current stream."""
        for piece, part in self._pairs(source):
            piece.copy_(part, non_blocking=True)

    def read(self, target: Tensor) -> None:
        """Copy to `target`, which is contiguous and as large as what was written. To a GPU the copy is only started."""
        for piece, part in self._pairs(target):
            part.copy_(piece, non_blocking=True)

    def _pairs(self, tensor: Tensor):
        return zip(self.pieces, tensor.reshape(-1).split([piece.numel() for piece in self.pieces]), strict=True)


class HostMemory:
    """Hands out buffers for copies from and to `device`, page-locked where that is a GPU. They live as long as they are referred to."""

    def __init__(self, device: torch.device, block_bytes: int = BLOCK_BYTES) -> None:
        self.device, self.block_bytes = device, block_bytes
        self.total_bytes = 0
        self._rest = torch.empty(0, dtype=torch.uint8)

    def buffer(self, like: Tensor) -> HostBuffer:
        """Uninitialised memory for the values of `like`."""
        pieces, missing = [], like.numel()
        while missing:
            if len(self._rest) < like.element_size():
                self._rest = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
                self.total_bytes += self.block_bytes
            taken = min(missing, len(self._rest) // like.element_size()) * like.element_size()
            pieces.append(self._rest[:taken].view(like.dtype))
            self._rest, missing = self._rest[taken:], missing - taken // like.element_size()
        return HostBuffer(tuple(pieces))
