"""The units of a pipeline stage in the order of backward, with the activations around each: what `zero.fullest_moment` walks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megactl.config.schema import Model
from megactl.costmodel.parameters import (
    LayerTensors,
    embedding_tensors,
    head_tensors,
    layer_tensors,
    norm_tensors,
    padded_vocab,
    vocabulary,
)
from megactl.costmodel.zero import StageUnits, Unit


@dataclass(frozen=True)
class StageBytes:
    """Bytes of activations of one virtual stage's backward on one rank.

    all_kept: what all live micro-batches keep. others: of that everything but this micro-batch's layers. layers: of these when the
    backward of each begins, the last layer's first.
    mlp, attention: working sets of the halves of a layer. mlp_kept: what a layer keeps for its MLP's half. gradient: of a hidden state.
    head, head_work: of the last stage's head at rest and in its backward. older: what micro-batches before this one keep for it.
    entry, embedding: working set of the embedding's forward and backward.
    """

    all_kept: int
    others: int
    layers: tuple[int, ...]
    mlp: int
    attention: int
    mlp_kept: int
    gradient: int
    head: int
    head_work: int
    older: int
    entry: int
    embedding: int


@dataclass(frozen=True)
class Cut:
    """How a stage's weights are cut. first, last: it has the embedding, the head."""

    tensor_parallel: int
    first: bool
    last: bool
    split_layers: bool
    tile: int
    seq_length: int


def stage_units(model: Model, cut: Cut, held: StageBytes) -> StageUnits:
    """Head, final norm, layers from the last on, embedding; of a layer its halves or tiles where it is cut."""
    table = padded_vocab(vocabulary(model), cut.tensor_parallel) // cut.tensor_parallel * model.hidden_size
    tied = not model.untie_embeddings and (cut.first or cut.last)
    units = [*_end(model, cut, held, () if tied else (table,))] if cut.last else []
    tensors = layer_tensors(model, tp=cut.tensor_parallel)
    for layers in held.layers:
        units += _layer(tensors, cut, held, held.others + held.older + layers)
    departure = held.others + held.older + held.gradient
    if cut.first:
        own = embedding_tensors(model, seq_length=cut.seq_length)
        units.append(Unit(own if tied else (table, *own), departure, departure + held.embedding, is_table=True))
    readers = ((0,) if cut.last else ()) + ((len(units) - 1,) if cut.first else ())
    return StageUnits(tuple(units), held.others + held.older + held.entry, departure, table if tied else 0, readers if tied else ())


def _end(model: Model, cut: Cut, held: StageBytes, table: tuple[int, ...]) -> Iterator[Unit]:
    """What stands behind the layers."""
    arrival = held.all_kept + held.head
    yield Unit((*table, *head_tensors(model, tp=cut.tensor_parallel)), arrival, arrival + held.head_work)
    if model.norm_position == "pre":
        # Its input, and the gradients of its output and input.
        at_rest = held.all_kept + held.older + held.gradient
        yield Unit(norm_tensors(model), at_rest + held.gradient, at_rest + 2 * held.gradient)


def _layer(tensors: LayerTensors, cut: Cut, held: StageBytes, bytes_held: int) -> Iterator[Unit]:
    """The units of one layer. Those of attention run when what the MLP's half kept is free."""
    mlp = bytes_held + held.gradient, bytes_held + held.mlp
    freed = bytes_held - held.mlp_kept
    attention = freed + held.gradient, freed + held.attention
    if cut.tile > 1:
        # Biases and norms are of the layer itself, whose unit is the first to begin and the last to end.
        yield from (Unit((matrix // cut.tile,), *mlp) for matrix in tensors.mlp for _ in range(cut.tile))
        yield from (Unit((matrix // cut.tile,), *attention) for matrix in tensors.attention for _ in range(cut.tile))
        yield Unit((*tensors.mlp_rest, *tensors.attention_rest), *attention)
    elif cut.split_layers:
        yield Unit((*tensors.mlp, *tensors.mlp_rest), *mlp)
        yield Unit((*tensors.attention, *tensors.attention_rest), *attention)
    else:
        every = (*tensors.mlp, *tensors.mlp_rest, *tensors.attention, *tensors.attention_rest)
        yield Unit(every, mlp[0], max(mlp[1], attention[1]))
