"""What a run is: one frozen dataclass a section, one field a setting. No torch.

A field made with `setting` carries its help text, its command-line flags and its choices; the command line, the TOML
reader and the documentation are generated from them, so a setting is written down in one place.
A value of None means "not set": `config.resolve` derives it and says why.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1


def setting(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
) -> Any:
    """A dataclass field with what the command line needs. `flags[0]` is the name shown in help, the rest are aliases."""
    return field(default=default, metadata={"help": help, "flags": flags, "choices": choices, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class Model:
    """The architecture alone: nothing here depends on how the model is spread over ranks."""

    architecture: str = setting("gpt", "model family", flags=("--model",), choices=("gpt", "bert"))
    num_layers: int = setting(12, "transformer layers", flags=("--layers", "--num-layers"))
    hidden_size: int = setting(768, "width of the residual stream", flags=("--hidden", "--hidden-size"))
    num_heads: int = setting(12, "attention heads", flags=("--heads", "--num-attention-heads"))
    kv_heads: int | None = setting(
        None, "heads of keys and values, each shared by a group of attention heads (default: as many as attention heads)",
        flags=("--kv-heads", "--num-query-groups", "--num-key-value-heads"),
    )  # fmt: skip
    ffn_size: int | None = setting(
        None, "width of the MLP (default 4 x hidden; with swiglu two thirds of it)",
        flags=("--ffn", "--ffn-hidden-size", "--intermediate-size"),
    )  # fmt: skip
    vocab_size: int | None = setting(
        None, "tokens in the vocabulary, before padding (default: the tokenizer's)", flags=("--vocab", "--vocab-size")
    )
    max_positions: int | None = setting(
        None, "longest text, and with learned positions their number (default: the sequence length)",
        flags=("--max-positions", "--max-position-embeddings"),
    )  # fmt: skip
    position_embedding: str = setting(
        "learned", "a learned vector a position, added to the token's; or rope: queries and keys turned by angles in step with it",
        flags=("--position-embedding", "--position-embedding-type"), choices=("learned", "rope"),
    )  # fmt: skip
    rope_base: float = setting(10000.0, "rope: base of the wavelengths", flags=("--rope-base", "--rotary-base", "--rope-theta"))
    rotary_percent: float = setting(1.0, "rope: share of each head's width that is turned", flags=("--rotary-percent",))
    rope_scaling_factor: float = setting(
        1.0, "rope: stretch long wavelengths by this factor, as Llama 3.1 (8) and 3.2 (32) do (1: none)", flags=("--rope-scaling-factor",)
    )
    rope_original_positions: int = setting(
        8192, "rope scaling: positions of the model before it was stretched", flags=("--rope-original-positions",)
    )
    rope_low_frequency: float = setting(
        1.0, "rope scaling: wavelengths that fit fewer times into the original positions are stretched in full",
        flags=("--rope-low-frequency",),
    )  # fmt: skip
    rope_high_frequency: float = setting(
        4.0, "rope scaling: wavelengths that fit more times into the original positions are left alone", flags=("--rope-high-frequency",)
    )
    normalization: str = setting(
        "layernorm", "LayerNorm, or RMSNorm without mean and bias", flags=("--normalization",), choices=("layernorm", "rmsnorm")
    )
    norm_position: str = setting(
        "pre",
        "norms before each branch, and once at the end; or after each residual, as in the first GPT and the published BERT",
        flags=("--norm-position",),
        choices=("pre", "post"),
    )
    sentence_head: bool | None = setting(
        None, "pooler and head of two classes for sentence pairs (default: on for bert)", flags=("--sentence-head/--no-sentence-head",)
    )
    activation: str = setting(
        "gelu", "MLP: GELU between two matrices; or swiglu, SiLU of one matrix times another, then a third",
        flags=("--activation", "--swiglu"), choices=("gelu", "swiglu"),
    )  # fmt: skip
    gelu: str = setting("tanh", "GELU: the tanh approximation or the exact erf", flags=("--gelu",), choices=("tanh", "erf"))
    bias: bool = setting(
        True, "biases in the matrices of the layers", flags=("--bias/--no-bias", "--add-bias-linear/--disable-bias-linear")
    )
    untie_embeddings: bool = setting(
        False, "give the output head its own weight", flags=("--untie-embeddings", "--untie-embeddings-and-output-weights")
    )
    hidden_dropout: float = setting(0.0, "dropout on embeddings and on each residual branch", flags=("--hidden-dropout",))
    attention_dropout: float = setting(0.0, "dropout on attention probabilities", flags=("--attention-dropout",))
    init_std: float = setting(0.02, "standard deviation of the initial weights", flags=("--init-std", "--init-method-std"))
    layernorm_epsilon: float = setting(1e-5, "epsilon inside LayerNorm and RMSNorm", flags=("--layernorm-epsilon", "--norm-epsilon"))
    attention: str = setting("auto", "attention implementation", flags=("--attention",), choices=("auto", "sdpa", "unfused"))

    @property
    def mlp_width(self) -> int:
        """Width of the MLP between its matrices: as set, or 4 x hidden; SwiGLU, with a matrix more, gets two thirds of that (Shazeer 2020).

        Two thirds are rounded down to a multiple of 64, as Megatron-LM does, so that a cut over ranks leaves whole tiles.
        """
        if self.ffn_size is not None:
            return self.ffn_size
        if self.activation != "swiglu":
            return 4 * self.hidden_size
        return max(64, 8 * self.hidden_size // 3 // 64 * 64)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values: as set, or one for each attention head."""
        return self.num_heads if self.kv_heads is None else self.kv_heads

    @property
    def rotary_width(self) -> int:
        """Elements of each head that are turned by the position, an even number; 0 with learned positions."""
        if self.position_embedding != "rope":
            return 0
        return int(self.hidden_size // self.num_heads * self.rotary_percent) // 2 * 2


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model is spread: degrees of the mesh axes, innermost first (tp, cp, dp, pp)."""

    tensor_parallel: int = setting(
        1, "ranks that share each matrix: weights and their state / tp, for four all-reduces of an activation in each layer",
        flags=("--tp", "--tensor-model-parallel-size", "--tensor-parallel"),
    )  # fmt: skip
    context_parallel: int = setting(
        1, "ranks that share each sequence: activations / cp, for messages in each attention", flags=("--cp", "--context-parallel-size")
    )
    pipeline_parallel: int = setting(
        1, "pipeline stages: layers / pp and few messages, for ranks that wait: (pp - 1) / m of the work of m micro-batches",
        flags=("--pp", "--pipeline-model-parallel-size", "--pipeline-parallel"),
    )  # fmt: skip
    data_parallel: int | None = setting(
        None, "replicas, each with its share of the global batch (default: world / (tp x pp x cp))", flags=("--dp", "--data-parallel")
    )
    sequence_parallel: bool = setting(
        False,
        "with tp: also share the tokens between the matrices (norms, dropout, residuals): their activations / tp, for no more bytes sent",
        flags=("--sp/--no-sp", "--sequence-parallel/--no-sequence-parallel"),
    )  # fmt: skip
    context_method: str = setting(
        "ring", "with cp: send keys and values around, or trade tokens for heads (any length, but cp must divide heads / tp)",
        flags=("--cp-method", "--cp-comm-type"), choices=("ring", "all-to-all"),
    )  # fmt: skip
    schedule: str = setting(
        "1f1b", "order of the micro-batches: gpipe keeps the activations of all; 1f1b of pp of them; zb-h1 waits a third as long in the "
        "same memory; zb-h2 as zb-h1, but at the end, with twice the activations; zb-v a sixth, in 1f1b's memory, for twice the messages",
        flags=("--schedule",), choices=("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-v"),
    )  # fmt: skip
    virtual_pipeline: int = setting(
        1, "chunks of layers a rank (interleaved 1f1b): ranks wait 1/vpp as long, for vpp times the messages and some more activations",
        flags=("--vpp", "--num-virtual-stages-per-pipeline-rank", "--virtual-pipeline"),
    )  # fmt: skip
    pipeline_split: str | None = setting(
        None, "layers of each stage ('5,7,7,5'), or what counts as a layer: embedding, head, or both (default: equal stages)",
        flags=("--pp-split",), metavar="N,N,...|embedding,head",
    )  # fmt: skip
    scatter_gather: bool = setting(
        True, "with tp and pp: each rank sends 1/tp of an activation to the next stage, which gathers it over its faster links",
        flags=("--scatter-gather/--no-scatter-gather",),
    )  # fmt: skip
    zero: int | None = setting(
        None, "ZeRO stage: what the d = dp x cp replicas share. Bytes a parameter in bf16: 0 nothing, 18; 1 optimizer, 6 + 12/d; "
        "2 also gradients, 2 + 16/d, but every micro-batch reduces them; 3 also weights, 18/d, gathered twice a micro-batch "
        "(default 1 when dp x cp > 1)",
        flags=("--zero",),
    )  # fmt: skip
    zero_prefetch: int = setting(
        1, "ZeRO 3: units (layers) gathered ahead of their use: hides the gather, costs a unit's weights each", flags=("--zero-prefetch",)
    )
    persistence_threshold: int = setting(
        100_000, "ZeRO 3: parameters with fewer elements on a rank stay whole, as many small gathers would cost more than they save",
        flags=("--persistence-threshold", "--stage3-param-persistence-threshold"),
    )  # fmt: skip
    split_layers: bool = setting(
        False, "ZeRO 3: gather half a layer at a time (attention, MLP): half the gathered bytes, twice the messages",
        flags=("--split-layers/--no-split-layers", "--split-transformers"),
    )  # fmt: skip
    tile: int = setting(
        1, "ZeRO 3: run each matrix of a layer in N tiles and gather one at a time: 1/N of a matrix's bytes, smaller products",
        flags=("--tile", "--tile-factor"),
    )  # fmt: skip
    bucket_size: int = setting(40_000_000, "parameters in one gradient bucket", flags=("--bucket-size", "--ddp-bucket-size"))
    overlap_grad_reduce: bool = setting(
        True, "reduce gradient buckets while backward still runs", flags=("--overlap-grad-reduce/--no-overlap-grad-reduce",)
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What is not kept on the device between forward and backward, or between steps."""

    recompute: str = setting(
        "none",
        "compute again in backward what is not kept: core attention (selective: unfused attention keeps no scores, for a few per cent of "
        "time), or whole layers (full: keeps their inputs alone, for two thirds of another forward)",
        flags=("--recompute", "--recompute-granularity"), choices=("none", "selective", "full"),
    )  # fmt: skip
    recompute_method: str = setting(
        "uniform", "full recompute: keep the input of every N layers, or recompute the first N layers of a stage only",
        flags=("--recompute-method",), choices=("uniform", "block"),
    )  # fmt: skip
    recompute_layers: int = setting(
        1,
        "full recompute: the N of --recompute-method; backward holds what N layers keep",
        flags=("--recompute-layers", "--recompute-num-layers"),
    )
    partition_activations: bool = setting(
        False, "full recompute with tp: each rank keeps 1 / tp of the saved inputs, for an all-gather of each in backward",
        flags=("--partition-activations/--no-partition-activations", "--distribute-saved-activations"),
    )  # fmt: skip
    offload: str | None = setting(
        None, "keep in host memory: optimizer (12 bytes a parameter; the processors update), parameters (ZeRO 3: 2 more; copied in for "
        "each use), activations (saved inputs of full recompute); several with commas",
        flags=("--offload",), metavar="WHAT,WHAT",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Training:
    """Batches, length and numerics of the run."""

    micro_batch_size: int = setting(1, "sequences in one forward pass of one replica", flags=("--micro-batch-size", "--mbs"))
    global_batch_size: int | None = setting(
        None, "sequences in one optimizer step (default micro_batch_size x dp)", flags=("--global-batch-size", "--gbs")
    )
    rampup_batch_size: str | None = setting(
        None, "grow the global batch: 'START INCREMENT SAMPLES'", flags=("--rampup-batch-size",), metavar="'START INC SAMPLES'"
    )
    seq_length: int = setting(1024, "tokens in a sequence", flags=("--seq-length", "--seq"))
    iterations: int = setting(1000, "optimizer steps", flags=("--iterations", "--train-iters"))
    eval_interval: int = setting(0, "evaluate every N iterations (0: never)", flags=("--eval-interval",))
    eval_iterations: int = setting(10, "global batches in one evaluation", flags=("--eval-iterations", "--eval-iters"))
    precision: str = setting(
        "fp32", "arithmetic of forward and backward (fp64 is for verification)", flags=("--precision",),
        choices=("fp32", "bf16", "fp16", "fp64"),
    )  # fmt: skip
    loss_scale: float = setting(0.0, "fp16: a constant loss scale (0: dynamic)", flags=("--loss-scale",))
    initial_loss_scale: float | None = setting(
        None, "fp16: the dynamic loss scale at the start (default: 16 for a token of the global batch)", flags=("--initial-loss-scale",)
    )
    min_loss_scale: float | None = setting(None, "fp16: least value of the dynamic loss scale (default 1)", flags=("--min-loss-scale",))
    loss_scale_window: int | None = setting(
        None, "fp16: iterations without overflow before the loss scale doubles (default 1000)", flags=("--loss-scale-window",)
    )
    loss_scale_hysteresis: int | None = setting(
        None, "fp16: the overflow at which the loss scale begins to halve (default 2, the second)",
        flags=("--loss-scale-hysteresis", "--hysteresis"),
    )  # fmt: skip
    max_skipped_iterations: int = setting(
        50, "end the run after N skipped iterations in a row that no smaller loss scale can help (0: never)",
        flags=("--max-skipped-iterations",),
    )  # fmt: skip
    device: str = setting("auto", "where to run", flags=("--device",), choices=("auto", "cpu", "cuda"))
    nproc: int | None = setting(None, "ranks to start on this machine", flags=("--nproc", "--nproc-per-node"))
    seed: int = setting(1234, "seed of initialisation, dropout and data order", flags=("--seed",))
    exit_duration: float = setting(
        0.0, "save and exit 75 after this many minutes (0: no limit)", flags=("--exit-duration", "--exit-duration-in-mins")
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its learning-rate schedule."""

    lr: float = setting(3e-4, "peak learning rate", flags=("--lr",))
    min_lr: float = setting(0.0, "learning rate at the end of the decay", flags=("--min-lr",))
    warmup: str = setting("0", "linear warm-up: iterations, or a share such as 1%", flags=("--warmup", "--lr-warmup-iters"), metavar="N|P%")
    lr_schedule: str = setting(
        "cosine", "shape of the decay", flags=("--lr-schedule", "--lr-decay-style"), choices=("cosine", "linear", "constant", "wsd")
    )
    lr_decay_iterations: int | None = setting(
        None, "iterations until min_lr is reached (default: iterations)", flags=("--lr-decay-iterations", "--lr-decay-iters")
    )
    wsd_decay_iterations: int | None = setting(
        None, "length of the final decay of the wsd schedule (default: a tenth)", flags=("--wsd-decay-iterations", "--lr-wsd-decay-iters")
    )
    weight_decay: float = setting(0.1, "decoupled weight decay, not on norms and biases", flags=("--weight-decay",))
    beta1: float = setting(0.9, "AdamW beta 1", flags=("--beta1", "--adam-beta1"))
    beta2: float = setting(0.95, "AdamW beta 2", flags=("--beta2", "--adam-beta2"))
    epsilon: float = setting(1e-8, "AdamW epsilon", flags=("--epsilon", "--adam-eps"))
    clip_grad: float = setting(1.0, "largest global gradient norm (0: no clipping)", flags=("--clip-grad",))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the tokens come from."""

    data: str | None = setting(
        None, "a .bin/.idx prefix, or one quoted string 'WEIGHT PREFIX WEIGHT PREFIX ...'", flags=("--data", "--data-path")
    )
    mock_data: bool = setting(False, "train on generated tokens", flags=("--mock-data",))
    tokenizer: str | None = setting(
        None,
        "'byte', tokenizer.json, vocab.txt, a SentencePiece .model, or a folder with one of them (default: recorded with the data)",
        flags=("--tokenizer",),
    )
    split: str = setting("969,30,1", "shares of the documents for train, valid, test", flags=("--split",))
    data_cache: str | None = setting(
        None, "folder of the sample indices (default: beside the data)", flags=("--data-cache", "--data-cache-path")
    )
    reset_position_ids: bool = setting(False, "restart positions after each end-of-document token", flags=("--reset-position-ids",))
    reset_attention_mask: bool = setting(False, "no attention across documents", flags=("--reset-attention-mask",))
    eod_mask_loss: bool = setting(False, "no loss on end-of-document tokens", flags=("--eod-mask-loss",))
    mask_probability: float = setting(0.15, "BERT: share of the tokens to predict", flags=("--mask-prob", "--mask-probability"))
    mask_ngrams: int = setting(3, "BERT: mask up to N neighbouring words at a time, n of them with weight 1/n", flags=("--mask-ngrams",))
    whole_word_masking: bool = setting(
        True, "BERT: mask the pieces of a word together", flags=("--whole-word-masking/--no-whole-word-masking",)
    )
    short_seq_probability: float = setting(
        0.1, "BERT: share of samples that aim at a shorter length", flags=("--short-seq-prob", "--short-seq-probability")
    )
    sentence_task: str = setting(
        "sop",
        "BERT: half of the pairs are in reverse order (sop), or go on in another document (nsp)",
        flags=("--sentence-task",),
        choices=("sop", "nsp"),
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save and where to start from."""

    save_interval: int = setting(0, "save every N iterations (0: only at the end and on a signal)", flags=("--save-interval",))
    keep_checkpoints: int = setting(2, "newest checkpoints kept (0: all)", flags=("--keep-checkpoints",))
    resume: str = setting(
        "auto", "continue from this run directory's newest good checkpoint", flags=("--resume",), choices=("auto", "never", "must")
    )
    load: str | None = setting(None, "start from another run's checkpoint", flags=("--load",))
    load_weights: bool = setting(False, "with --load: take the weights only", flags=("--load-weights",))


@dataclass(frozen=True, kw_only=True)
class Logging:
    """What is written while the run goes on."""

    run_dir: str | None = setting(None, "folder of this run (default: runs/<model>-<date>-<time>)", flags=("--run-dir",))
    log_interval: int = setting(10, "print a line every N iterations", flags=("--log-interval",))
    tensorboard_dir: str | None = setting(None, "write TensorBoard events here", flags=("--tensorboard-dir",))
    wandb_project: str | None = setting(None, "write an offline Weights & Biases run of this project", flags=("--wandb-project",))


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that defines a run. `preset` names where the model section started from."""

    preset: str | None = None
    model: Model = dataclasses.field(default_factory=Model)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    memory: Memory = dataclasses.field(default_factory=Memory)
    training: Training = dataclasses.field(default_factory=Training)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    data: Data = dataclasses.field(default_factory=Data)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    logging: Logging = dataclasses.field(default_factory=Logging)


SECTIONS: dict[str, type] = {
    "model": Model,
    "parallel": Parallel,
    "memory": Memory,
    "training": Training,
    "optimizer": Optimizer,
    "data": Data,
    "checkpoint": Checkpoint,
    "logging": Logging,
}
