"""What a rank contributes to a checkpoint and what it needs back from one, as pieces of logical tensors.

Saved once: a copy of a tied weight, or of a parameter that every tensor-parallel rank holds whole, belongs to one rank; the
weights of equal replicas to the first; with ZeRO each replica saves its own range of the optimizer's state, and with ZeRO 3 of the
weights. Loaded by all.
In fp32 and fp64 the weight is its own master, so no master is saved; where it has a copy in host memory, both are loaded from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from megactl.config.schema import Model, Run
from megactl.engine.checkpoint import Header, Piece
from megactl.engine.flat import ParameterSpec
from megactl.engine.mesh import Mesh
from megactl.engine.parallelize import Part
from megactl.engine.zero import STATE_KINDS
from megactl.errors import CheckpointError
from megactl.storage.pieces import Region, clip

# These say how a model is trained or computed, not which function its weights are for: they may change between two runs.
_FREE_SETTINGS = ("hidden_dropout", "attention_dropout", "init_std", "attention")


def check_fits(path: Path, header: Header, run: Run, *, optimizer: bool) -> None:
    """Raise CheckpointError naming every setting in which the model of checkpoint `path` differs from the run's, or what it lacks.

    Asked before any tensor is read: a list of shapes that do not match would hide the one setting that was forgotten.
    """
    wrong = []
    free = _FREE_SETTINGS
    if run.model.position_embedding == "rope":
        # No weights belong to a position: the same model may go on with longer texts.
        free += ("max_positions",)
    for field in dataclasses.fields(Model):
        stored, wanted = header.model.get(field.name, field.default), getattr(run.model, field.name)
        if field.name == "kv_heads":
            # Not set means one a head; so do checkpoints from before heads could share keys and values.
            stored, wanted = header.model.get("num_heads") if stored is None else stored, run.model.key_value_heads
        # None: a setting of the other architecture, which is named already.
        other_family = field.name == "sentence_head" and None in (stored, wanted)
        if field.name not in free and stored != wanted and not other_family:
            wrong.append((field.metadata["flags"][0].partition("/")[0], wanted, stored))
    if wrong:
        shown = ", ".join(f"{flag} {wanted} (the checkpoint has {stored})" for flag, wanted, stored in wrong)
        instead = " ".join(_as_flag(flag, stored) for flag, _, stored in wrong)
        raise CheckpointError(f"{path} is of another model: {shown}", f"use {instead}, or another --run-dir for the other model")
    if optimizer and "adam_step" not in header.state:
        raise CheckpointError(f"{path} has no optimizer state, and a run cannot be continued without it", "use --load with --load-weights")


def _as_flag(flag: str, value: object) -> str:
    if isinstance(value, bool):
        return flag if value else f"--no-{flag.removeprefix('--')}"
    return f"{flag} {value}"


def pieces_to_save(parts: Sequence[Part], mesh: Mesh) -> list[Piece]:
    """This rank's share: over all ranks every element of every tensor exactly once."""
    first = mesh.replicas.rank == 0
    pieces = [
        entry
        for part in parts
        for entry in _all_pieces(part, weights=first, state=part.optimizer.zero > 0 or first, masters=part.optimizer.has_master)
    ]
    return [piece for spec, piece in pieces if spec.counted]


def pieces_to_load(parts: Sequence[Part], *, optimizer: bool = True) -> list[Piece]:
    """Everything this rank holds, copies included; without `optimizer` the weights and their masters only."""
    kinds = STATE_KINDS if optimizer else ("master",)
    pieces = [piece for part in parts for _, piece in _all_pieces(part, weights=True, state=True, masters=True)]
    return [piece for piece in pieces if piece.kind == "weight" or piece.kind in kinds]


def _all_pieces(part: Part, *, weights: bool, state: bool, masters: bool) -> Iterator[tuple[ParameterSpec, Piece]]:
    """`masters`: also those that are tensors of their own, which in fp32 they are in host memory alone."""
    part.optimizer.settle()
    for placement in part.flat.placements:
        spec, sharded = placement.spec, part.flat.buckets[placement.bucket].sharded
        if weights and not sharded:
            yield from _piece(spec, "weight", part.flat.in_bucket(part.flat.bucket_params, placement).view(-1), None)
        for share in part.optimizer.states if state else ():
            low, high = max(placement.start, share.start), min(placement.stop, share.stop)
            if low < high:
                kinds = STATE_KINDS if masters and share.master is not share.param else STATE_KINDS[1:]
                whole = (low, high) == (placement.start, placement.stop)
                flat_range = None if whole else (low - placement.start, high - placement.start)
                for kind in ("param", *kinds) if sharded else kinds:
                    yield from _piece(spec, "weight" if kind == "param" else kind, share.slice_of(kind, low, high), flat_range)


def _piece(spec: ParameterSpec, kind: str, values: Tensor, flat_range: tuple[int, int] | None) -> Iterator[tuple[ParameterSpec, Piece]]:
    """`values` is 1-d and may end in padding rows, which are not part of the logical tensor."""
    padded = tuple((start, start + size) for (start, _), size in zip(spec.rectangle, spec.local_shape, strict=True))
    region = clip(Region(padded, flat_range), spec.logical_shape)
    if region is not None:
        tensor = values[: region.elements].view(region.shape)
        yield spec, Piece(spec.name, kind, spec.logical_shape, region.rectangle, region.flat_range, tensor)
