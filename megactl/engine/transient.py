"""Flat tensors whose memory is there only while it is needed.

A tensor knows its storage, not the storage's memory: the memory can be given back and taken again (`UntypedStorage.resize_`, as
FSDP does), and every view stays what it was: parameters, gradient views, tensors that autograd has saved.

On CUDA memory is taken and given back in the order of the current stream, by the caching allocator. A collective that fills or
reads it runs on a stream of its own; whoever starts one makes the current stream wait for it before the memory is given back.
"""

from __future__ import annotations

import torch


class TransientBuffer:
    """`numel` elements, with memory between `allocate` and `release`; views cannot be made without.

    `alias` is over the same memory with a version counter of its own: what was saved of it is not stale when `whole` is filled.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.whole = torch.empty(numel, dtype=dtype, device=device)
        self._storage = self.whole.untyped_storage()
        self._bytes = self._storage.nbytes()
        self.alias = torch.empty(0, dtype=dtype, device=device).set_(self._storage, 0, self.whole.shape)
        # A part's buffers are made one after the other, and all at once they would be the whole model.
        self.release()

    @property
    def nbytes(self) -> int:
        """Bytes at hand: all or 0."""
        return self._storage.nbytes()

    def allocate(self) -> None:
        """Take memory; what is in it is undefined. Without effect where there is some."""
        if not self._storage.nbytes():
            self._storage.resize_(self._bytes)

    def release(self) -> None:
        """Give the memory back."""
        self._storage.resize_(0)
