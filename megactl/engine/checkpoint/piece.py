"""A piece: one region of one logical tensor in the hands of one rank, to be saved from or loaded into."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megactl.errors import CheckpointError
from megactl.storage.manifest import KINDS
from megactl.storage.pieces import Region
from megactl.storage.tensor_file import DTYPES


@dataclass
class Piece:
    """`tensor` (contiguous, any device) holds the elements of `rectangle`, one [start, stop) per dimension of `logical_shape`; or,
    one-dimensional, the elements [a, b) = `flat_range` of that rectangle in row-major order.

    `name` is canonical (global layer index, no pipeline stage; a tied weight has one name), `logical_shape` is unpadded, `kind` is one of
    weight, master, exp_avg, exp_avg_sq. A region with padding is cut by `storage.pieces.clip` first.
    """

    name: str
    kind: str
    logical_shape: tuple[int, ...]
    rectangle: tuple[tuple[int, int], ...]
    flat_range: tuple[int, int] | None
    tensor: torch.Tensor

    @property
    def region(self) -> Region:
        """The elements held."""
        flat = None if self.flat_range is None else (self.flat_range[0], self.flat_range[1])
        return Region(tuple((start, stop) for start, stop in self.rectangle), flat)

    @property
    def dtype(self) -> str:
        """The tensor's type as the manifest spells it: float32, bfloat16 ..."""
        return str(self.tensor.dtype).removeprefix("torch.")


def check(pieces: list[Piece]) -> None:
    """Raise CheckpointError for the first piece that contradicts itself."""
    for piece in pieces:
        problem = _problem(piece)
        if problem is not None:
            raise CheckpointError(f"{piece.kind} of '{piece.name}': {problem}", "this is a fault in the program that called save or load")


def _problem(piece: Piece) -> str | None:
    if piece.kind not in KINDS:
        return f"the kind must be one of {', '.join(KINDS)}"
    if piece.dtype not in DTYPES:
        return f"type {piece.dtype} must be one of {', '.join(DTYPES)}"
    region = piece.region
    problem = region.problem(tuple(piece.logical_shape))
    if problem is not None:
        return problem
    if tuple(piece.tensor.shape) != region.shape:
        return f"a tensor of shape {list(piece.tensor.shape)} for a region of shape {list(region.shape)}"
    if not piece.tensor.is_contiguous():
        return "the tensor must be contiguous"
    return None


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; of a CPU tensor without a copy, so it must not change while they are in use."""
    return memoryview(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
