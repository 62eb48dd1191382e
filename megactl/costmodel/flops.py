"""Floating-point operations of a GPT or BERT and the utilisation computed from them. The only place MFU is defined.

Counted is what the matrix multiplies need: every weight matrix (embedding look-ups, biases, norms, RoPE and activations are not), and
attention's scores and values. A multiply-add is two operations; a backward takes twice its forward. Conventions, always named:

* model FLOPs (MFU): forward and backward once, attention over the whole s x s square;
* causal model FLOPs (causal MFU): the same with half of that square, which is what a causal kernel has to compute; BERT looks in
  both directions, so that for BERT it is the same number;
* hardware FLOPs (HFU): model FLOPs plus what recomputation runs again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megactl.config.schema import Model
from megactl.costmodel.parameters import (
    SENTENCE_CLASSES,
    ffn_width,
    first_matrix_width,
    has_sentence_head,
    is_encoder,
    key_value_width,
    vocabulary,
)
from megactl.errors import ConfigError, Problem

RECOMPUTE = ("none", "selective", "full")
"""What backward runs again: nothing, attention's scores and values, or every layer's whole forward (never the head)."""


def matmul_weights(model: Model) -> dict[str, int]:
    """Weights that multiply every token, by part (elements): qkv, attention output, the MLP's matrices (SwiGLU has three), head.

    A tied head counts like any. BERT's head includes the dense layer before the output matrix; all tokens pass it, masked or not.
    """
    h, f, layers = model.hidden_size, ffn_width(model), model.num_layers
    head = h * vocabulary(model) + (h * h if is_encoder(model) else 0)
    qkv, mlp = h * (h + 2 * key_value_width(model)), h * (first_matrix_width(model) + f)
    return {"qkv": layers * qkv, "attention_output": layers * h * h, "mlp": layers * mlp, "head": head}


def sentence_weights(model: Model) -> int:
    """Weights that multiply one vector a sequence (elements): BERT's pooler and classes."""
    return model.hidden_size * (model.hidden_size + SENTENCE_CLASSES) if has_sentence_head(model) else 0


def forward_flops_per_token(model: Model, seq_length: int, *, causal: bool = False) -> dict[str, int]:
    """Forward operations for one token of a sequence of `seq_length`, by part; the parts of `matmul_weights` and `attention`.

    Heads that share keys and values still have their own scores, so that grouped queries change qkv alone.
    """
    square = 2 * 2 * seq_length * model.hidden_size * model.num_layers
    weights = {part: 2 * count for part, count in matmul_weights(model).items()}
    return {**weights, "attention": square // 2 if causal and not is_encoder(model) else square}


def forward_flops(model: Model, seq_length: int, *, causal: bool = False) -> int:
    """Forward operations of one sequence: those of its tokens, and those of the sentence head, which is run once."""
    return seq_length * sum(forward_flops_per_token(model, seq_length, causal=causal).values()) + 2 * sentence_weights(model)


def model_flops_per_token(model: Model, seq_length: int, *, causal: bool = False) -> float:
    """Forward and backward operations for one token (six times the matmul weights, plus attention, and its share of the sentence head)."""
    return 3 * forward_flops(model, seq_length, causal=causal) / seq_length


def model_flops(model: Model, seq_length: int, batch: int, *, causal: bool = False) -> int:
    """Forward and backward operations of one iteration over `batch` sequences, no recomputation."""
    return batch * 3 * forward_flops(model, seq_length, causal=causal)


def hardware_flops(model: Model, seq_length: int, batch: int, *, recompute: str = "none", causal: bool = False) -> int:
    """Operations of one iteration including recomputation.

    `full` runs each layer's forward once more (factor 4 instead of 3 on the layers, 3 on the heads); `selective` only attention's
    scores and values. Korthikanti et al. 2022 charge three times as much for the latter; this is the structural count.
    """
    if recompute not in RECOMPUTE:
        raise ConfigError([Problem(f"recompute = {recompute!r}", "is not a known kind", f"set one of {', '.join(RECOMPUTE)}")])
    forward = forward_flops_per_token(model, seq_length, causal=causal)
    again = {"none": 0, "selective": forward["attention"], "full": sum(forward.values()) - forward["head"]}[recompute]
    return model_flops(model, seq_length, batch, causal=causal) + batch * seq_length * again


def published_selective_flops(model: Model, seq_length: int, batch: int) -> int:
    """Hardware FLOPs of selective recomputation as Korthikanti et al. 2022 (arXiv:2205.05198) publish them.

    Their closed form 72 B s l h^2 (1 + s/3h + V/12lh) charges attention's scores and values twice as much as without recomputation,
    which is three more forwards of them; one is run (`hardware_flops`). Their tables of HFU beside MFU follow this form.
    """
    return model_flops(model, seq_length, batch) + batch * seq_length * 3 * forward_flops_per_token(model, seq_length)["attention"]


def sc21_flops(model: Model, seq_length: int, batch: int, *, recompute: bool) -> float:
    """The closed form of SC21 (Narayanan et al. 2021, arXiv:2104.04473, eq. 3), ffn = 4h.

    72 B s l h^2 (1 + s/6h + V/12lh), or with full recomputation 96 B s l h^2 (1 + s/6h + V/16lh).
    """
    h, layers, vocab = model.hidden_size, model.num_layers, vocabulary(model)
    factor, head = (96, 16) if recompute else (72, 12)
    return factor * batch * seq_length * layers * h**2 * (1 + seq_length / (6 * h) + vocab / (head * layers * h))


def seed_tflops(*, billions: float, seconds: float, gpus: int, global_batch: int, seq_length: int = 1024, factor: int = 4) -> float:
    """The rule of thumb `size x factor x 2 x seq x batch / (seconds x gpus x 1000)` in TFLOP/s per GPU.

    `factor` 4 counts forward, backward (2) and full recomputation; 3 is without recomputation. Attention and head are not in it.
    """
    return billions * factor * 2 * seq_length * global_batch / (seconds * gpus * 1e3)


@dataclass(frozen=True)
class Utilization:
    """Speed of one GPU in TFLOP/s under each convention, and as a share of `peak_tflops` (None where the peak is unknown).

    `causal_hfu` is what the GPU has computed at least: recomputation included, and half of the attention square. No convention of the
    field reports it, but it alone must lie below the peak.
    """

    hfu_tflops: float
    mfu_tflops: float
    causal_mfu_tflops: float
    causal_hfu_tflops: float
    peak_tflops: float | None
    hfu: float | None
    mfu: float | None
    causal_mfu: float | None
    causal_hfu: float | None

    def as_dict(self) -> dict[str, float | None]:
        """The fields under their JSON names."""
        return asdict(self)


def utilization(
    model: Model,
    *,
    seq_length: int,
    global_batch: int,
    seconds: float,
    gpus: int,
    peak_tflops: float | None = None,
    recompute: str = "none",
) -> Utilization:
    """Utilisation of an iteration of `seconds` over `global_batch` sequences on `gpus` GPUs.

    Hardware FLOPs count the whole attention square, as the published HFU figures do.
    """
    for name, value in (("seconds", seconds), ("gpus", gpus)):
        if value <= 0:
            raise ConfigError([Problem(f"{name} = {value}", "must be above 0", f"set {name} to what was measured")])
    work = {
        "hfu": hardware_flops(model, seq_length, global_batch, recompute=recompute),
        "mfu": model_flops(model, seq_length, global_batch),
        "causal_mfu": model_flops(model, seq_length, global_batch, causal=True),
        "causal_hfu": hardware_flops(model, seq_length, global_batch, recompute=recompute, causal=True),
    }
    speed = {name: flops / (seconds * gpus * 1e12) for name, flops in work.items()}
    share = {name: value / peak_tflops if peak_tflops else None for name, value in speed.items()}
    return Utilization(**{f"{name}_tflops": value for name, value in speed.items()}, peak_tflops=peak_tflops, **share)
