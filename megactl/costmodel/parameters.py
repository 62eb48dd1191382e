"""How many parameters a GPT or BERT has: in all, by part, by pipeline stage and on one rank. The only place that counts them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import lcm

from megactl.config.schema import Model
from megactl.errors import ConfigError, Problem

VOCABULARY_MULTIPLE = 128
"""Vocabularies are padded to a multiple of this (and of tp), so that the head's matrix multiply has whole tiles."""

SHARDED_PARTS = frozenset({"word_embeddings", "attention", "mlp", "output_head", "output_bias"})
"""Parts whose parameters tensor parallelism divides; all others are held whole by every tensor-parallel rank."""


TOKEN_TYPES = 2
SENTENCE_CLASSES = 2


def is_encoder(model: Model) -> bool:
    """Whether the model is BERT: token types, attention in both directions, heads of its own."""
    return model.architecture == "bert"


def has_sentence_head(model: Model) -> bool:
    """Whether BERT has the pooler and its classes; a setting that is still open means yes."""
    return is_encoder(model) and model.sentence_head is not False


def ffn_width(model: Model) -> int:
    """Width of the MLP: as set, or 4 x hidden, of which SwiGLU takes two thirds."""
    return model.mlp_width


def key_value_width(model: Model) -> int:
    """Width of all keys, and of all values: hidden, or less where heads share them (Ainslie et al. 2023)."""
    return model.hidden_size * model.key_value_heads // model.num_heads


def first_matrix_width(model: Model) -> int:
    """Outputs of the MLP's first matrix: SwiGLU's gate and what it multiplies are made by one."""
    return ffn_width(model) * (2 if model.activation == "swiglu" else 1)


def norm_parameters(model: Model) -> int:
    """Parameters of one norm: a weight, and LayerNorm's bias."""
    return model.hidden_size * (1 if model.normalization == "rmsnorm" else 2)


def padded_vocab(vocab: int, tp: int) -> int:
    """Rows of the embedding after padding: the next multiple of lcm(128, tp)."""
    multiple = lcm(VOCABULARY_MULTIPLE, tp)
    return -(-vocab // multiple) * multiple


def split_layers(num_layers: int, num_stages: int, split: str | None = None) -> tuple[range, ...]:
    """Global layer indices of each virtual stage: equally many on each, or as `split` (--pp-split) says.

    Raises ConfigError where that is not possible.
    """
    if split is not None:
        # Hardly any desk command is asked for one.
        from megactl.config.pipeline_split import SplitError, stage_layers

        try:
            counts = stage_layers(num_layers, num_stages, split)
        except SplitError as error:
            raise ConfigError([Problem(f"pipeline_split = {split}", error.rule, error.instead)]) from error
        starts = list(accumulate(counts, initial=0))
        return tuple(range(start, stop) for start, stop in pairwise(starts))
    if num_stages < 1 or num_layers % num_stages:
        fits = [stages for stages in range(1, num_layers + 1) if num_layers % stages == 0]
        nearest = min(fits, key=lambda stages: (abs(stages - num_stages), stages), default=1)
        instead = f"set pipeline_parallel to {nearest} or num_layers to {max(1, -(-num_layers // max(1, num_stages))) * max(1, num_stages)}"
        raise ConfigError([Problem(f"num_layers = {num_layers}", f"must be a multiple of the {num_stages} stages", instead)])
    size = num_layers // num_stages
    return tuple(range(stage * size, (stage + 1) * size) for stage in range(num_stages))


def parameter_parts(model: Model, *, seq_length: int | None = None) -> dict[str, int]:
    """Parameters of the whole model by part, vocabulary unpadded, a tied weight counted once.

    `seq_length` gives the number of learned positions where the model does not set it. Parts: word_embeddings,
    position_embeddings, attention, mlp, layernorms, final_layernorm (0 where norms stand behind), output_head (0 when tied). Their
    sum for a tied GPT with ffn = 4h is l(12h^2 + 13h) + vh + sh + 2h. BERT has in addition token_type_embeddings,
    embedding_layernorm (0 where norms stand in front), mlm_head, output_bias and sentence_head.
    """
    hidden, layers = model.hidden_size, model.num_layers
    vocab, positions = vocabulary(model), learned_positions(model, seq_length)
    layer = {part: weights + biases for part, (weights, biases) in _layer_parts(model).items()}
    return {
        "word_embeddings": vocab * hidden,
        "position_embeddings": positions * hidden,
        **_encoder_embedding(model),
        **{part: layers * count for part, count in layer.items()},
        **_head_parts(model),
        "output_head": vocab * hidden if model.untie_embeddings else 0,
        **({"output_bias": vocab} if is_encoder(model) else {}),
    }


def total_parameters(model: Model, *, seq_length: int | None = None) -> int:
    """Parameters of the whole model (the sum of `parameter_parts`)."""
    return sum(parameter_parts(model, seq_length=seq_length).values())


def seed_formula(*, num_layers: int, hidden_size: int, vocab_size: int, seq_length: int) -> int:
    """The closed form l(12h^2 + 13h) + vh + sh + 2h: a tied GPT with ffn = 4h and as many positions as tokens."""
    h = hidden_size
    return num_layers * (12 * h * h + 13 * h) + vocab_size * h + seq_length * h + 2 * h


def stage_parts(
    model: Model, *, tp: int, num_stages: int, stage: int, seq_length: int | None = None, split: str | None = None
) -> dict[str, int]:
    """Parameters that one rank holds for one virtual stage, by part, with the padded vocabulary.

    Split over tp: matrix weights, biases of the column-parallel layers (qkv and the first MLP matrix), embedding and head rows.
    Whole on each tp rank: norms, biases of the row-parallel layers, positions, BERT's token types and what it has before the
    output matrix. With more than one stage a tied head is a second copy of the embedding on the last stage. Raises ConfigError
    where tp or the stages do not divide the model.
    """
    check_tensor_parallel(model, tp)
    layers = len(split_layers(model.num_layers, num_stages, split)[stage])
    first, last = stage == 0, stage == num_stages - 1
    rows = padded_vocab(vocabulary(model), tp) // tp
    separate_head = last and (model.untie_embeddings or num_stages > 1)
    layer = {part: sharded // tp + whole for part, (sharded, whole) in _layer_parts(model).items()}
    return {
        "word_embeddings": rows * model.hidden_size if first else 0,
        "position_embeddings": learned_positions(model, seq_length) * model.hidden_size if first else 0,
        **{part: count if first else 0 for part, count in _encoder_embedding(model).items()},
        **{part: layers * count for part, count in layer.items()},
        **{part: count if last else 0 for part, count in _head_parts(model).items()},
        "output_head": rows * model.hidden_size if separate_head else 0,
        **({"output_bias": rows if last else 0} if is_encoder(model) else {}),
    }


def rank_parameters(
    model: Model,
    *,
    tp: int,
    pp: int,
    seq_length: int | None = None,
    schedule: str = "1f1b",
    virtual_pipeline: int = 1,
    split: str | None = None,
) -> tuple[int, ...]:
    """Parameters that one rank of each pipeline rank holds, over all its virtual stages (the largest of them is what has to fit)."""
    placed = stage_ranks(pp, schedule, virtual_pipeline)
    held = [0] * pp
    for stage, rank in enumerate(placed):
        held[rank] += sum(stage_parts(model, tp=tp, num_stages=len(placed), stage=stage, seq_length=seq_length, split=split).values())
    return tuple(held)


def stage_ranks(pp: int, schedule: str = "1f1b", virtual_pipeline: int = 1) -> tuple[int, ...]:
    """The pipeline rank that holds each virtual stage."""
    # The schedules take a fifth of a desk command's start, and most of those ask for no pipeline.
    if pp == 1 and virtual_pipeline == 1 and schedule == "1f1b":
        return (0,)
    from megactl.schedules.generators import num_chunks, placement

    return placement(schedule, num_ranks=pp, chunks=num_chunks(schedule, virtual_pipeline))


def check_tensor_parallel(model: Model, tp: int) -> None:
    """Raise one ConfigError that names every width of the model that `tp` does not divide."""
    widths = {"num_heads": model.num_heads, "ffn_size": ffn_width(model), "hidden_size": model.hidden_size}
    if model.key_value_heads != model.num_heads:
        widths["kv_heads"] = model.key_value_heads
    problems = [
        Problem(f"{name} = {width}", f"must be a multiple of tensor_parallel = {tp}", f"set tensor_parallel to a divisor of {width}")
        for name, width in widths.items()
        if tp < 1 or width % tp
    ]
    if problems:
        raise ConfigError(problems)


def vocabulary(model: Model) -> int:
    """Tokens in the vocabulary, unpadded. Raises ConfigError while it is not known."""
    if model.vocab_size is None:
        raise ConfigError([Problem("vocab_size", "is not known, and the embedding's size depends on it", "set --vocab or a tokenizer")])
    return model.vocab_size


def learned_positions(model: Model, seq_length: int | None) -> int:
    """Rows of the position table: as set, or the sequence length; none with rope. Raises ConfigError where neither is known."""
    if model.position_embedding == "rope":
        return 0
    positions = seq_length if model.max_positions is None else model.max_positions
    if positions is None:
        rule = "is not known, and the position table's size depends on it"
        raise ConfigError([Problem("max_positions", rule, "set --seq or --max-positions")])
    return positions


def _encoder_embedding(model: Model) -> dict[str, int]:
    """What BERT's embedding has besides tokens and positions."""
    if not is_encoder(model):
        return {}
    norm = norm_parameters(model) if model.norm_position == "post" else 0
    return {"token_type_embeddings": TOKEN_TYPES * model.hidden_size, "embedding_layernorm": norm}


def _head_parts(model: Model) -> dict[str, int]:
    """What stands between the last layer and the output matrix, and beside it. Nothing of it is split over tp."""
    h = model.hidden_size
    parts = {"final_layernorm": norm_parameters(model) if model.norm_position == "pre" else 0}
    if is_encoder(model):
        pooler, classifier = h * h + h, SENTENCE_CLASSES * (h + 1)
        parts |= {"mlm_head": h * h + h + norm_parameters(model), "sentence_head": pooler + classifier if has_sentence_head(model) else 0}
    return parts


def _layer_parts(model: Model) -> dict[str, tuple[int, int]]:
    """One layer as {part: (parameters split over tp, parameters every tp rank holds whole)}."""
    h, f = model.hidden_size, ffn_width(model)
    qkv, first, biases = h + 2 * key_value_width(model), first_matrix_width(model), int(model.bias)
    return {
        "attention": (qkv * h + qkv * biases + h * h, h * biases),
        "mlp": (h * first + first * biases + f * h, h * biases),
        "layernorms": (0, 2 * norm_parameters(model)),
    }


@dataclass(frozen=True)
class LayerTensors:
    """Elements of each parameter of a layer on one rank, by halves, in the order of backward; the rest are biases and norms."""

    mlp: tuple[int, int]
    mlp_rest: tuple[int, ...]
    attention: tuple[int, int]
    attention_rest: tuple[int, ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum((*self.mlp, *self.mlp_rest, *self.attention, *self.attention_rest))


def layer_tensors(model: Model, *, tp: int) -> LayerTensors:
    """The parameters of a layer one by one: down, up, attention's output, qkv. A norm stands with the half that runs it."""
    h, f, first = model.hidden_size, ffn_width(model) // tp, first_matrix_width(model) // tp
    qkv, own, norm = (h + 2 * key_value_width(model)) // tp, h // tp, norm_tensors(model)
    before = model.norm_position == "pre"
    return LayerTensors(
        mlp=(f * h, first * h),
        mlp_rest=((h, first) if model.bias else ()) + (norm if before else norm + norm),
        attention=(own * h, qkv * h),
        attention_rest=((h, qkv) if model.bias else ()) + (norm if before else ()),
    )


def norm_tensors(model: Model) -> tuple[int, ...]:
    """Elements of each parameter of one norm."""
    return (model.hidden_size,) * (norm_parameters(model) // model.hidden_size)


def embedding_tensors(model: Model, *, seq_length: int | None) -> tuple[int, ...]:
    """Elements of each parameter of the embedding besides the tokens' table; tensor parallelism does not divide them."""
    positions = learned_positions(model, seq_length) * model.hidden_size
    own = (TOKEN_TYPES * model.hidden_size, *(norm_tensors(model) if model.norm_position == "post" else ())) if is_encoder(model) else ()
    return ((positions,) if positions else ()) + own


def head_tensors(model: Model, *, tp: int) -> tuple[int, ...]:
    """Elements of each parameter of the head besides the output matrix, on one rank."""
    if not is_encoder(model):
        return ()
    h = model.hidden_size
    sentence = (h * h, h, SENTENCE_CLASSES * h, SENTENCE_CLASSES) if has_sentence_head(model) else ()
    return (h * h, h, *norm_tensors(model), padded_vocab(vocabulary(model), tp) // tp, *sentence)
