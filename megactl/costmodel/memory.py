"""Bytes one rank needs to train a GPT or BERT, before it is run.

The formulas follow Korthikanti et al. 2022 (arXiv:2205.05198), changed where this engine differs: dropout keeps no masks (they are
drawn again), softmax is kept in at least fp32, and what that paper leaves out is here: the cross-entropy peak, one layer's
backward, and the second copy of a tied embedding. A test counts the tensors that the model really saves.

Symbols: s tokens, b sequences in a micro-batch, h hidden, f MLP width, a heads, t tensor parallel, e bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from megactl.config.schema import Model
from megactl.costmodel.offload import host_bytes
from megactl.costmodel.parameters import (
    ffn_width,
    first_matrix_width,
    is_encoder,
    key_value_width,
    padded_vocab,
    split_layers,
    stage_parts,
    stage_ranks,
    vocabulary,
)
from megactl.costmodel.recompute import KeptLayers, Recompute, held_in_backward, kept_layers
from megactl.costmodel.stage_units import Cut, StageBytes, stage_units
from megactl.costmodel.zero import Sharing, StageUnits, fullest_moment, largest_bucket, whole_elements
from megactl.errors import ConfigError, Problem


@dataclass(frozen=True)
class StateBytes:
    """Bytes a parameter takes: the weight used in forward, the accumulated gradient, master copy and Adam's two moments."""

    weight: int
    gradient: int
    optimizer: int


@dataclass(frozen=True)
class Precision:
    """Sizes that an arithmetic type implies. `element` is an activation; `accumulate` is the type of loss, softmax and statistics."""

    state: StateBytes
    element: int
    accumulate: int


def precision_sizes(precision: str) -> Precision:
    """Sizes for fp32, bf16, fp16 or fp64; gradients are accumulated in fp32 under the 16-bit types. Raises ConfigError for another type."""
    table = {
        "fp32": Precision(StateBytes(4, 4, 8), 4, 4),
        "bf16": Precision(StateBytes(2, 4, 12), 2, 4),
        "fp16": Precision(StateBytes(2, 4, 12), 2, 4),
        "fp64": Precision(StateBytes(8, 8, 16), 8, 8),
    }
    if precision not in table:
        raise ConfigError([Problem(f"precision = {precision!r}", "has no memory formula", f"set one of {', '.join(table)}")])
    return table[precision]


@dataclass(frozen=True)
class ModelState:
    """Bytes that `parameters` take from one iteration to the next, activations apart."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def model_state(parameters: int, precision: str, *, zero: int = 0, data_parallel: int = 1) -> ModelState:
    """Bytes on a rank that holds `parameters` of a stage. ZeRO leaves it a share of the optimizer (1), of the gradients too (2), of the
    weights too (3). Raises ConfigError for `precision`."""
    state = precision_sizes(precision).state
    held = [
        -(-parameters * size // (data_parallel if zero >= stage else 1))
        for size, stage in ((state.weight, 3), (state.gradient, 2), (state.optimizer, 1))
    ]
    return ModelState(*held)


# Numbers of a layout that may be 0.
_FROM_ZERO = ("zero", "zero_prefetch", "persistence_threshold", "workspaces")

# Bytes that torch gives cuBLAS on Hopper and Blackwell (8 MiB each before): a workspace of the thread that runs forward, and of autograd's.
CUBLAS_WORKSPACES = 2 * 2**25


@dataclass(frozen=True)
class Layout:
    """What decides the memory of a rank besides the model. Sequences and micro-batches are those of one replica.

    workspaces: bytes that the device's library of matrix products keeps.
    """

    seq_length: int
    micro_batch_size: int
    num_microbatches: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    zero: int = 0
    precision: str = "fp32"
    schedule: str = "1f1b"
    virtual_pipeline: int = 1
    split: str | None = None
    sequence_parallel: bool = False
    context_parallel: int = 1
    context_method: str = "ring"
    bucket_size: int = 40_000_000
    zero_prefetch: int = 1
    persistence_threshold: int = 100_000
    split_layers: bool = False
    tile: int = 1
    recompute: str = "none"
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    partition_activations: bool = False
    offload: frozenset[str] = frozenset()
    workspaces: int = 0

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights: they share what ZeRO divides."""
        return self.data_parallel * self.context_parallel

    def problems(self) -> list[Problem]:
        """Every value that no run can have."""
        counts = [field.name for field in fields(self) if field.type == "int" and field.name not in _FROM_ZERO]
        found = [Problem(f"{name} = {getattr(self, name)}", "must be at least 1", "set 1") for name in counts if getattr(self, name) < 1]
        if self.zero not in (0, 1, 2, 3):
            found.append(Problem(f"zero = {self.zero}", "ZeRO has the stages 0 to 3", "set 0, 1, 2 or 3"))
        return found


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank. `total` is the peak of an iteration, so logits and transient do not add up.

    stage: its pipeline rank; the virtual stages it holds count together. live_microbatches: at the peak, each once a virtual stage.
    weights, gradients, optimizer: there all the time. activations: kept for backward by all live micro-batches together. logits: head
    and loss of the last stage at their peak. transient: working set of one layer, and what is computed again with it. live_state: what
    ZeRO 2 and 3 have whole for a while, as far as the fullest moment has more than the other parts say. workspaces: of
    the layout. host: bytes in host memory, of which nothing is in the total.
    """

    stage: int
    parameters: int
    live_microbatches: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    transient: int
    live_state: int = 0
    workspaces: int = 0
    host: int = 0

    @property
    def model_state(self) -> int:
        """Bytes that stay from one iteration to the next."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Peak bytes of tensors: loss and layer backward are never in progress at the same time."""
        return self.model_state + self.live_state + self.workspaces + self.activations + max(self.logits, self.transient)

    def as_dict(self) -> dict[str, int]:
        """All parts and the total, in bytes (parameters and micro-batches are counts)."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "total": self.total}


def estimate_memory(model: Model, layout: Layout) -> MemoryEstimate:
    """The estimate of the fullest pipeline rank. See `estimate_stage`."""
    return max(estimate_stages(model, layout), key=lambda estimate: estimate.total)


def estimate_stages(model: Model, layout: Layout) -> tuple[MemoryEstimate, ...]:
    """One estimate a pipeline rank: early ones hold more micro-batches, the one with the last stage holds the logits."""
    return tuple(estimate_stage(model, layout, stage) for stage in range(layout.pipeline_parallel))


def estimate_stage(model: Model, layout: Layout, rank: int) -> MemoryEstimate:
    """Peak bytes of tensors on a rank that holds the virtual stages of pipeline rank `rank`.

    Left out: the CUDA context (0.5 to 2 GB), communication buffers of NCCL and of transfers in flight,
    the caching allocator's fragmentation (2 to 6 % of the rest), masks of documents (`reset_attention_mask`), dropout masks where
    the compiled operators are not built, and the square that scaled_dot_product_attention stores where it has no fused kernel.
    Raises ConfigError where the layout does not divide the model.
    """
    problems = layout.problems()
    if problems:
        raise ConfigError(problems)
    placed = stage_ranks(layout.pipeline_parallel, layout.schedule, layout.virtual_pipeline)
    held = [stage for stage, owner in enumerate(placed) if owner == rank]
    shape = {"tp": layout.tensor_parallel, "num_stages": len(placed), "seq_length": layout.seq_length, "split": layout.split}
    by_stage = {stage: sum(stage_parts(model, stage=stage, **shape).values()) for stage in held}
    parameters, layers = sum(by_stage.values()), _stage_layers(model, layout, len(placed))
    state = model_state(parameters, layout.precision, zero=layout.zero, data_parallel=layout.replicas)
    state_sizes, sizes = precision_sizes(layout.precision).state, _Sizes.of(model, layout)
    kept = {stage: _kept(model, layout, sizes, stage, layers[stage]) for stage in held}
    live = live_at_peak(layout, rank, {stage: each.device for stage, each in kept.items()})
    host = {stage: each.host for stage, each in kept.items()}
    # Mostly nothing, and the walk over a long order takes its time.
    on_host = live_at_peak(layout, rank, host).total if any(host.values()) else 0
    last = len(placed) - 1
    logits = _logits(sizes, live.of_last) if last in held else 0
    transient = _layer_transient(model, layout, sizes) + max(each.again for each in kept.values())
    sharing = _sharing(layout)
    units = [_stage_units(model, layout, sizes, stage, last, layers[stage], live) for stage in held]
    fullest = fullest_moment(units, sharing) if layout.zero >= 2 else 0
    whole = state_sizes.weight * sum(whole_elements(stage, sharing) for stage in units) if layout.zero == 3 else 0
    return MemoryEstimate(
        stage=rank,
        parameters=parameters,
        live_microbatches=live.microbatches,
        weights=whole if "parameters" in layout.offload else state.weights + whole - whole // layout.replicas,
        gradients=state.gradients,
        optimizer=0 if "optimizer" in layout.offload else state.optimizer,
        activations=live.total,
        logits=logits,
        transient=transient,
        workspaces=layout.workspaces,
        live_state=max(0, fullest - live.total - max(logits, transient)),
        host=on_host + _host_state(layout, parameters, max(largest_bucket(stage, sharing) for stage in units)),
    )


def _stage_layers(model: Model, layout: Layout, num_stages: int) -> list[int]:
    return [len(layers) for layers in split_layers(model.num_layers, num_stages, layout.split)]


def _kept(model: Model, layout: Layout, sizes: _Sizes, stage: int, layers: int) -> KeptLayers:
    """What one virtual stage keeps for a micro-batch: its layers, and what the embedding keeps. What it sends on nobody keeps."""
    kept = kept_layers(_recompute(layout), layers, layer=layer_activations(model, layout), layer_input=sizes.held)
    return replace(kept, device=kept.device + (_embedding(model, sizes) if stage == 0 else 0) + _rotary_tables(model, sizes))


def _recompute(layout: Layout) -> Recompute:
    return Recompute(
        layout.recompute,
        layout.recompute_method,
        layout.recompute_layers,
        shares=layout.tensor_parallel if layout.partition_activations else 1,
        on_host="activations" in layout.offload,
    )


def _sharing(layout: Layout) -> Sharing:
    state = precision_sizes(layout.precision).state
    return Sharing(
        layout.zero, layout.replicas, layout.bucket_size, layout.zero_prefetch, layout.persistence_threshold,
        state.weight, state.gradient, layout.num_microbatches,
    )  # fmt: skip


def _stage_units(model: Model, layout: Layout, sizes: _Sizes, stage: int, last: int, layers: int, live: LivePeak) -> StageUnits:
    """The units of a virtual stage, with the activations that the rank holds while the backward of each runs."""
    plan = {"layer": layer_activations(model, layout), "layer_input": sizes.held}
    own = held_in_backward(_recompute(layout), layers, **plan)
    mlp, mlp_kept = _mlp_working(sizes), _mlp_kept(sizes)
    if _splits_backward(layout):
        # The weight gradients come later, and with them go the tensors that they read: nothing is counted as free before the end.
        own, mlp_kept = own[:1] * layers, 0
    head = _head_kept(sizes) if stage == last else 0
    held = StageBytes(
        all_kept=live.total,
        others=live.total - kept_layers(_recompute(layout), layers, **plan).device,
        layers=own, mlp=mlp, attention=_attention_working(layout, sizes), mlp_kept=mlp_kept, gradient=sizes.held,
        head=live.of_last * head, head_work=sizes.hidden, older=(live.of_last - 1) * head,
        # Vectors of tokens and of positions, and their sum.
        entry=3 * sizes.hidden,
        # The gradient of its output, and the same in the type of the table's.
        embedding=sizes.hidden + (sizes.hidden // sizes.element * sizes.main_gradient if sizes.element != sizes.main_gradient else 0),
    )  # fmt: skip
    cut = Cut(layout.tensor_parallel, stage == 0, stage == last, layout.split_layers, layout.tile, layout.seq_length)
    return stage_units(model, cut, held)


def _splits_backward(layout: Layout) -> bool:
    """Whether weight gradients are put off; on a single pipeline rank no schedule does."""
    if layout.pipeline_parallel == 1:
        return False
    from megactl.schedules.generators import GENERATORS

    return GENERATORS[layout.schedule].splits_backward


def _host_state(layout: Layout, parameters: int, largest: int) -> int:
    """See `offload.host_bytes`; `largest`: elements of a rank's largest bucket."""
    state = precision_sizes(layout.precision).state
    return host_bytes(
        layout.offload, parameters=parameters, zero=layout.zero, replicas=layout.replicas, weight=state.weight,
        main=state.gradient, largest=largest // (layout.replicas if layout.zero else 1),
    )  # fmt: skip


@dataclass(frozen=True)
class LivePeak:
    """The fullest moment of a rank: what its live micro-batches keep together, how many (each once a virtual stage), and how many of
    the last virtual stage it ever holds."""

    total: int
    microbatches: int
    of_last: int


def live_at_peak(layout: Layout, rank: int, kept: Mapping[int, int]) -> LivePeak:
    """Walk the rank's order of computations; `kept` is what each of its virtual stages keeps for one micro-batch (any unit)."""
    # The schedules take a fifth of a desk command's start, and most of those ask for no activations.
    from megactl.schedules.generators import max_live_microbatches, num_chunks, peak_live

    pp, m = layout.pipeline_parallel, layout.num_microbatches
    chunks = num_chunks(layout.schedule, layout.virtual_pipeline)
    total, live = peak_live(layout.schedule, kept, rank=rank, num_ranks=pp, num_microbatches=m, chunks=chunks)
    last = max_live_microbatches(layout.schedule, stage=pp * chunks - 1, num_ranks=pp, num_microbatches=m, chunks=chunks)
    return LivePeak(total, sum(live.values()), last)


def layer_activations(model: Model, layout: Layout) -> int:
    """Bytes one layer keeps for the backward of one micro-batch on one rank.

    With e = 2 and f = 4h: sbh(8 + 24/t), plus attention's own tensors, plus the norms' statistics; under sequence parallelism
    sbh 32/t. SwiGLU keeps 6f/h in place of GELU's 4f/h; grouped queries keep 2 + 4g/a for q, k, v in place of 6 (g groups). Selective
    recomputation leaves attention's own tensors out. Of a layer that is computed again as a whole, this is what the second forward
    keeps.
    """
    sizes = _Sizes.of(model, layout)
    # Whole on each rank (its share of the tokens under sp), wherever the norms stand: inputs of both norms, of qkv and of the first MLP
    # matrix.
    statistics = 1 if model.normalization == "rmsnorm" else 2
    whole = 4 * sizes.held + 2 * statistics * sizes.accumulate * sizes.held_tokens
    # Split over t: q, k, v, the input of attention's output matrix, the activation's input and output.
    split = 2 * sizes.hidden // sizes.tensor_parallel + 2 * sizes.keys + sizes.first + sizes.mlp
    if layout.recompute == "selective":
        return whole + split
    if not sizes.unfused or sizes.ring:
        # Log-sum-exp of every row; BERT's mask of padding, which each call turns into numbers to add. A ring makes masks, and in backward
        # scores as well, block by block again.
        mask = sizes.element * sizes.tokens if is_encoder(model) and not sizes.ring else 0
        return whole + split + sizes.accumulate * model.num_heads * sizes.tokens // sizes.tensor_parallel + mask
    # Softmax for its own backward; what multiplies the values is another tensor where dropout lies between.
    return whole + split + sizes.score_copies * sizes.scores * sizes.element


def _embedding(model: Model, sizes: _Sizes) -> int:
    """Bytes the embedding keeps for a micro-batch, ids aside: the input of BERT's LayerNorm and its statistics, where it has one."""
    return sizes.held + 2 * sizes.accumulate * sizes.held_tokens if is_encoder(model) and model.norm_position == "post" else 0


def _rotary_tables(model: Model, sizes: _Sizes) -> int:
    """Bytes of the cosines and sines of a micro-batch's positions, made once for all layers of the stage."""
    return 4 * sizes.tokens * model.rotary_width


@dataclass(frozen=True)
class _Sizes:
    """Recurring sizes on one rank: bytes of hidden states [s, b, h], of the keys, of the MLP's first product and of its activation
    [s, b, f/t]; elements of the rest.

    held, held_tokens: hidden states between the matrices, and their tokens: under sequence parallelism 1/t of the whole.
    """

    element: int
    accumulate: int
    tensor_parallel: int
    tokens: int
    hidden: int
    held_tokens: int
    held: int
    keys: int
    first: int
    mlp: int
    scores: int
    score_copies: int
    logits: int
    unfused: bool
    ring: bool
    shares_tokens: bool
    main_gradient: int
    head_inputs: int

    @staticmethod
    def of(model: Model, layout: Layout) -> _Sizes:
        precision, t = precision_sizes(layout.precision), layout.tensor_parallel
        tokens = layout.seq_length * layout.micro_batch_size // layout.context_parallel
        held_tokens = -(-tokens // t) if layout.sequence_parallel else tokens
        rows = padded_vocab(vocabulary(model), t) // t
        return _Sizes(
            element=precision.element,
            accumulate=precision.accumulate,
            tensor_parallel=t,
            tokens=tokens,
            hidden=precision.element * tokens * model.hidden_size,
            held_tokens=held_tokens,
            held=precision.element * held_tokens * model.hidden_size,
            keys=precision.element * tokens * key_value_width(model) // t,
            first=precision.element * tokens * first_matrix_width(model) // t,
            mlp=precision.element * tokens * ffn_width(model) // t,
            scores=model.num_heads * layout.seq_length * tokens // t,
            score_copies=2 if model.attention_dropout > 0 else 1,
            logits=tokens * rows,
            # Dropout inside a fused kernel cannot be repeated by another layout, so `auto` does not use one then.
            unfused=model.attention == "unfused" or (model.attention == "auto" and model.attention_dropout > 0),
            ring=layout.context_parallel > 1 and layout.context_method == "ring",
            shares_tokens=layout.sequence_parallel,
            main_gradient=precision.state.gradient,
            # Inputs of the final norm and the output matrix; of BERT's dense layer, its GELU and its norm.
            head_inputs=1 + (model.norm_position == "pre") + 3 * is_encoder(model),
        )


def _head_kept(sizes: _Sizes) -> int:
    """Bytes a micro-batch keeps for the backward of final norm, heads and loss: their inputs and the logits."""
    return sizes.head_inputs * sizes.held + sizes.logits * sizes.element


def _logits(sizes: _Sizes, live: int) -> int:
    """Final norm, heads and cross-entropy on the last stage, at the worst moment of the newest micro-batch.

    That is the head's backward: the gradient of the logits, which the compiled cross-entropy writes over them, and of the head's
    input. The weight's is summed in its buffer, in the buffer's type (`functional.weight_gradient`). Older live micro-batches
    (GPipe) have kept their logits.
    """
    return live * _head_kept(sizes) + sizes.hidden


def _layer_transient(model: Model, layout: Layout, sizes: _Sizes) -> int:
    """Largest working set inside one layer's backward, beyond what it keeps: that of the MLP, or of unfused attention.

    What the layer keeps for the MLP is free again when attention's backward runs. A saved input that was shared out is gathered
    before the layer runs again, into a tensor that the layer keeps (it is in `KeptLayers.again`).
    """
    return max(_mlp_working(sizes), _attention_working(layout, sizes) - _mlp_kept(sizes))


def _mlp_kept(sizes: _Sizes) -> int:
    """Of what a layer keeps, the inputs of the second norm, of the MLP's matrices, and of its activation."""
    return 2 * sizes.held + sizes.first + sizes.mlp


def _mlp_working(sizes: _Sizes) -> int:
    """The residual's gradient, and those of the activation's output and input.

    With these two the second matrix's input is still there, which is kept; peaks measured on H200 have all of them. It makes room for
    the gradient of the first matrix's input, under sequence parallelism for that input gathered again and the gradient's own share.
    """
    entering = sizes.hidden + (sizes.hidden + sizes.held if sizes.shares_tokens else 0)
    return sizes.held + sizes.mlp + sizes.first + max(0, entering - sizes.mlp)


def _attention_working(layout: Layout, sizes: _Sizes) -> int:
    """Largest working set inside attention's backward."""
    if sizes.ring:
        return _ring_transient(layout, sizes)
    if not sizes.unfused:
        # Gradients of the residual, of attention's output, of q, k and v, and the sums of q's in the type of sums.
        own = sizes.hidden // sizes.tensor_parallel
        return sizes.held + 2 * own + 2 * sizes.keys + own // sizes.element * sizes.accumulate
    # Gradients of the probabilities and of the scores. What selective recomputation does not keep is there again.
    again = sizes.score_copies if layout.recompute == "selective" else 0
    return (2 + again) * sizes.scores * sizes.element + sizes.hidden


def _ring_transient(layout: Layout, sizes: _Sizes) -> int:
    """Working set of a ring's backward: keys and values at hand and arriving, their gradients likewise in the type of sums, those of q.

    Unfused, a block's probabilities and their gradients as well: each in the type of sums, and rounded for the products.
    """
    sums = sizes.accumulate // sizes.element
    passing = 2 * 2 * sizes.keys * (1 + sums) + sums * sizes.hidden // sizes.tensor_parallel
    block = sizes.scores // layout.context_parallel if sizes.unfused else 0
    return passing + 2 * block * (sizes.accumulate + sizes.element)
