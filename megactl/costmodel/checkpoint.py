"""How large a checkpoint will be, from the architecture: bytes by part, and the files that each system writes.

Mixed precision with Adam saves 14 bytes a parameter: 2 of weights, 4 of the master copy, 4 + 4 of the two moments;
fp32 saves 12, having no copy. What differs between systems is which parameters are stored more than once, and in how many files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from megactl.config.schema import Model
from megactl.costmodel.memory import precision_sizes
from megactl.costmodel.parameters import split_layers, stage_parts, total_parameters, vocabulary

SYSTEMS = ("megactl", "megatron", "deepspeed")
_HEAD = ("output_head",)
_EMBEDDING = ("word_embeddings", "position_embeddings", "token_type_embeddings", "embedding_layernorm")
_BLOCK = ("attention", "mlp", "layernorms")


@dataclass(frozen=True)
class Files:
    """A group of files: `each` is the size in bytes of the usual one, `largest` of the largest, `total` of all `count` of them."""

    system: str
    name: str
    count: int
    each: int
    largest: int
    total: int


@dataclass(frozen=True)
class Elements:
    """Elements that a system stores of the weights, and of the master copy and each moment (the optimizer's share)."""

    weights: int
    state: int


@dataclass(frozen=True)
class CheckpointEstimate:
    """Bytes by part where every parameter is stored once, unpadded, and the files that each system would write."""

    parameters: int
    parts: dict[str, int]
    files: tuple[Files, ...]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def optimizer(self) -> int:
        """Bytes of everything but the weights."""
        return self.total - self.parts["weights"]


def state_bytes(precision: str) -> dict[str, int]:
    """Bytes a parameter takes in a checkpoint, by part; no master copy where the weights are one. Raises ConfigError for another type."""
    state = precision_sizes(precision).state
    moment = 8 if precision == "fp64" else 4
    master = state.optimizer - 2 * moment
    return {"weights": state.weight, **({"master": master} if master else {}), "exp_avg": moment, "exp_avg_sq": moment}


def estimate_checkpoint(
    model: Model, *, precision: str, tp: int = 1, pp: int = 1, dp: int = 1, zero: int = 0, seq_length: int | None = None
) -> CheckpointEstimate:
    """The size of a full checkpoint. `zero` 1 divides the optimizer's share of a rank over `dp` files. Raises ConfigError."""
    state = state_bytes(precision)
    count, tied = total_parameters(model, seq_length=seq_length), not model.untie_embeddings
    weight, optimizer = state["weights"], sum(state.values()) - state["weights"]
    own = _rank_parts(model, tp=tp, pp=pp, seq_length=seq_length)
    ranks = _rank_parts(padded_as_megatron(model, tp), tp=tp, pp=pp, seq_length=seq_length)
    files = [
        *_own_files(own, weight, optimizer, count, tp, dp, zero, tied),
        *_megatron_files(ranks, weight, optimizer, tp, zero),
        *_deepspeed_files(ranks, weight, optimizer, tp, dp, zero, layers=len(split_layers(model.num_layers, pp)[0]), tied=tied),
    ]
    return CheckpointEstimate(count, {part: size * count for part, size in state.items()}, tuple(files))


def stored_elements(model: Model, system: str, *, tp: int, pp: int, seq_length: int | None = None) -> Elements:
    """Elements a system stores in all. `megatron`: each model-parallel rank its own, replicated ones and the tied head's copy too;
    `deepspeed`: the tied head's weight once; anything else: each parameter once. Raises ConfigError where tp or pp do not divide it."""
    if system not in ("megatron", "deepspeed"):
        count = total_parameters(model, seq_length=seq_length)
        return Elements(count, count)
    ranks = _rank_parts(model, tp=tp, pp=pp, seq_length=seq_length)
    count = tp * sum(sum(parts.values()) for parts in ranks)
    tied = pp > 1 and not model.untie_embeddings and system == "deepspeed"
    return Elements(count - (tp * ranks[-1]["output_head"] if tied else 0), count)


def padded_as_megatron(model: Model, tp: int) -> Model:
    """The model with Megatron-LM's vocabulary: a multiple of 128 x tp (megactl pads to a multiple of lcm(128, tp))."""
    multiple = 128 * tp
    return replace(model, vocab_size=-(-vocabulary(model) // multiple) * multiple)


def listed_size(size: int) -> str:
    """A size as `ls -h` and `du -h` print it: powers of 1024, one digit behind the point below 10, rounded up: "1.4G"."""
    number, units = float(size), "BKMGTPE"
    while number >= 1024 and units != "E":
        number, units = number / 1024, units[1:]
    if units[0] == "B":
        return str(size)
    shown = ceil(number * 10 - 1e-9) / 10 if number < 10 else ceil(number - 1e-9)
    return f"{shown:.1f}{units[0]}" if isinstance(shown, float) and shown < 10 else f"{ceil(shown)}{units[0]}"


def _rank_parts(model: Model, *, tp: int, pp: int, seq_length: int | None) -> list[dict[str, int]]:
    """Parameters by part of one tensor-parallel rank, for each stage."""
    return [stage_parts(model, tp=tp, num_stages=pp, stage=stage, seq_length=seq_length) for stage in range(pp)]


def _group(system: str, name: str, sizes: list[int], copies: int) -> Files:
    """Files of the given sizes, each `copies` times; the usual size is that in the middle."""
    return Files(system, name, len(sizes) * copies, sorted(sizes)[len(sizes) // 2], max(sizes), sum(sizes) * copies)


def _own_files(
    ranks: list[dict[str, int]], weight: int, optimizer: int, count: int, tp: int, dp: int, zero: int, tied: bool
) -> list[Files]:
    """One file a rank that has something to save: the first replica the weights, each replica its share of the state (all of it where
    ZeRO is off). `count` parameters in all, each stored once."""
    shares = dp if zero else 1
    held = [sum(parts.values()) - (parts["output_head"] if tied and len(ranks) > 1 else 0) for parts in ranks]
    sizes = [weight * size + optimizer * size // shares for size in held]
    first = _group("megactl", "rank-*.safetensors", sizes, tp)
    groups = [replace(first, total=weight * count + optimizer * count // shares)]
    if shares > 1:
        others = _group("megactl", "rank-*.safetensors (replicas)", [optimizer * size // shares for size in held], tp * (shares - 1))
        groups.append(replace(others, total=optimizer * count - optimizer * count // shares))
    return groups


def _megatron_files(ranks: list[dict[str, int]], weight: int, optimizer: int, tp: int, zero: int) -> list[Files]:
    """One folder a model-parallel rank; the distributed optimizer has a file of its own in it, whatever dp is."""
    counts = [sum(parts.values()) for parts in ranks]
    if not zero:
        return [_group("megatron", "mp_rank_*/model_optim_rng.pt", [(weight + optimizer) * count for count in counts], tp)]
    model = _group("megatron", "mp_rank_*/model_optim_rng.pt", [weight * count for count in counts], tp)
    return [model, _group("megatron", "mp_rank_*/distrib_optim.pt", [optimizer * count for count in counts], tp)]


def _deepspeed_files(
    ranks: list[dict[str, int]], weight: int, optimizer: int, tp: int, dp: int, zero: int, *, layers: int, tied: bool
) -> list[Files]:
    """With a pipeline one file a layer and tensor-parallel rank, and one a rank (ZeRO 1: and replica) of the optimizer's state; without
    one a file of all weights a rank."""
    share = dp if zero else 1
    state = "zero_pp_rank_*_mp_rank_*_optim_states.pt" if zero else "mp_rank_*_model_states.pt (optimizer)"
    optim = _group("deepspeed", state, [optimizer * sum(parts.values()) // share for parts in ranks], tp * share)
    if len(ranks) == 1:
        return [_group("deepspeed", "mp_rank_*_model_states.pt", [weight * sum(ranks[0].values())], tp), optim]
    block = sum(ranks[0][part] for part in _BLOCK) // layers
    embedding = sum(ranks[0].get(part, 0) for part in _EMBEDDING)
    # A tied head is the embedding's file.
    last = sum(count for part, count in ranks[-1].items() if part not in (*_BLOCK, *_EMBEDDING, *(_HEAD if tied else ())))
    return [
        _group("deepspeed", "layer_*-model_*-model_states.pt", [weight * block] * (layers * len(ranks)), tp),
        _group("deepspeed", "layer_01-model_*-model_states.pt (embedding)", [weight * embedding], tp),
        _group("deepspeed", "layer_*-model_*-model_states.pt (behind the last layer)", [weight * last], tp),
        optim,
    ]
