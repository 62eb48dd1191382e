"""Host memory that a GPU copies from and to without waiting: page-locked, in blocks that waste none of it.

torch's allocator of page-locked memory rounds every request up to a power of two, so that buffers of 192 MiB would take 256. Here it
is asked for blocks that are powers of two, and a buffer is as many pieces of them as it needs: a copy of it is a copy a piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_BYTES = 2**25


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
