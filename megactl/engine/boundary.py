"""What travels between two pipeline stages: the hidden states of a micro-batch, and on the way back their gradient.

All tensor-parallel ranks of a stage hold the same hidden states. Sent as they are, every one of them would move the same bytes to
its counterpart. With scatter-gather (Narayanan et al. 2021, section 4.1) each rank sends 1/t of the elements, and the receivers gather
the rest from each other, over the faster links within a node. Under sequence parallelism a rank holds its tokens alone, and sends
just those: 1/t of the elements without any gathering.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megactl.engine.collectives import all_gather
from megactl.engine.mesh import Axis
from megactl.engine.sequence_parallel import hidden_shape


class Boundary:
    """Shape and form of what this rank sends to and receives from other stages. `tokens`: the shape [b, s] of a micro-batch."""

    def __init__(
        self, tp: Axis, *, hidden_size: int, dtype: torch.dtype, device: torch.device, scatter_gather: bool, sequence_parallel: bool = False
    ) -> None:
        self.tp, self.hidden_size, self.dtype, self.device = tp, hidden_size, dtype, device
        self.token_ranks = tp.size if sequence_parallel else 1
        # tp divides the heads and with them the hidden size, so the shares are always equal.
        self.shares = tp.size if scatter_gather and not sequence_parallel else 1

    def shape(self, tokens: torch.Size) -> tuple[int, ...]:
        """Shape of the hidden states as a stage reads and returns them."""
        return hidden_shape(tokens, self.hidden_size, self.token_ranks)

    def to_send(self, tensor: Tensor) -> Tensor:
        """What this rank sends of `tensor`: all of it, or its share [n / t] of the elements in order."""
        tensor = tensor.contiguous()
        if self.shares == 1:
            return tensor
        return tensor.view(self.shares, -1)[self.tp.rank]

    def to_receive(self, tokens: torch.Size) -> Tensor:
        """Memory for what this rank receives."""
        shape = self.shape(tokens)
        if self.shares > 1:
            shape = (torch.Size(shape).numel() // self.shares,)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def received(self, tensor: Tensor, tokens: torch.Size) -> Tensor:
        """The hidden states from what was received; collective over the tensor-parallel ranks where they have shares."""
        if self.shares == 1:
            return tensor
        whole = torch.empty(self.shape(tokens), dtype=self.dtype, device=self.device)
        all_gather(whole.view(-1), tensor, self.tp.group)
        return whole
