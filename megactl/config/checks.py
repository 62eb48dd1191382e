"""Rules that a run must keep on any machine: they need no files, no torch and no number of ranks. Each yields problems; none raises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from megactl.config.batch import parse_rampup, parse_warmup
from megactl.config.layout import sequence_unit
from megactl.config.memory import offload_targets
from megactl.config.pipeline_split import SplitError, model_chunks, stage_layers
from megactl.config.refused import refusals
from megactl.config.schema import Run
from megactl.config.settings import all_settings
from megactl.config.shown import Names, nearest_divisors, nearest_multiples
from megactl.errors import DataError, Problem

# name: (smallest allowed value, what to set instead)
_AT_LEAST: dict[str, tuple[int, str]] = {
    "model.num_layers": (1, "use 1 or more"),
    "model.hidden_size": (1, "use 1 or more"),
    "model.num_heads": (1, "use 1 or more"),
    "model.kv_heads": (1, "leave it out for one a head"),
    "model.ffn_size": (1, "leave it out for 4 x hidden"),
    "model.rope_original_positions": (1, "leave it out for 8192"),
    "model.rope_scaling_factor": (1, "use 1 for none"),
    "model.vocab_size": (2, "leave it out for the tokenizer's"),
    "model.max_positions": (1, "leave it out for the sequence length"),
    "parallel.tensor_parallel": (1, "use 1 for none"),
    "parallel.context_parallel": (1, "use 1 for none"),
    "parallel.pipeline_parallel": (1, "use 1 for none"),
    "parallel.data_parallel": (1, "leave it out to use every rank"),
    "parallel.bucket_size": (1, "leave it out for 40000000"),
    "parallel.virtual_pipeline": (1, "use 1 for no interleaving"),
    "parallel.zero_prefetch": (0, "use 0 to gather each unit when it is needed"),
    "parallel.persistence_threshold": (0, "use 0 to share every parameter"),
    "parallel.tile": (1, "use 1 for whole matrices"),
    "memory.recompute_layers": (1, "use 1 or more"),
    "training.micro_batch_size": (1, "use 1 or more"),
    "training.global_batch_size": (1, "leave it out for micro-batch-size x dp"),
    "training.seq_length": (1, "use 1 or more"),
    "training.iterations": (1, "use 1 or more"),
    "training.eval_interval": (0, "use 0 for no evaluation"),
    "training.eval_iterations": (1, "use --eval-interval 0 for no evaluation"),
    "training.loss_scale": (0, "use 0 for a dynamic one"),
    "training.loss_scale_window": (1, "leave it out for 1000"),
    "training.loss_scale_hysteresis": (1, "use 1 to halve at the first overflow"),
    "training.max_skipped_iterations": (0, "use 0 to go on skipping"),
    "training.nproc": (1, "leave it out to use every GPU"),
    "training.seed": (0, "use 0 or more"),
    "training.exit_duration": (0, "use 0 for no limit"),
    "optimizer.min_lr": (0, "use 0 or more"),
    "optimizer.weight_decay": (0, "use 0 for none"),
    "optimizer.clip_grad": (0, "use 0 for no clipping"),
    "optimizer.lr_decay_iterations": (1, "leave it out for --iterations"),
    "optimizer.wsd_decay_iterations": (1, "leave it out for a tenth of the decay"),
    "data.mask_ngrams": (1, "use 1 for single words"),
    "checkpoint.save_interval": (0, "use 0 to save at the end only"),
    "checkpoint.keep_checkpoints": (0, "use 0 to keep all"),
    "logging.log_interval": (1, "use 1 for a line every iteration"),
}
_POSITIVE = (
    "model.init_std",
    "model.layernorm_epsilon",
    "model.rope_base",
    "model.rope_low_frequency",
    "model.rope_high_frequency",
    "optimizer.lr",
    "optimizer.epsilon",
)
# Open where they are None: (name, such as)
_POSITIVE_IF_SET = {"training.initial_loss_scale": "such as 65536", "training.min_loss_scale": "such as 1"}
_SHARES = ("model.hidden_dropout", "model.attention_dropout", "optimizer.beta1", "optimizer.beta2")
# numpy's RandomState, which shuffles the documents as Megatron does, takes 32 bits.
_MAX_SEED = 2**32 - 1


def machine_independent(run: Run, origins: Mapping[str, str]) -> list[Problem]:
    """Every mistake of `run` that shows without knowing the machine. Relations are checked only where the ranges hold."""
    names = Names(run, origins)
    broken: set[str] = set()
    found = []
    for name, problem in (*_ranges(names), *_texts(names)):
        broken.add(name)
        found.append(problem)
    found += _data_source(names)
    for check, needs in _RELATIONS:
        if broken.isdisjoint(needs):
            found += check(names)
    return found + refusals(run, origins)


def _ranges(names: Names) -> Iterator[tuple[str, Problem]]:
    for name, (least, instead) in _AT_LEAST.items():
        value = all_settings()[name].read(names.run)
        if value is not None and value < least:
            yield name, Problem(names.show(name), f"must be at least {least}", instead)
    for name in _POSITIVE:
        setting = all_settings()[name]
        if setting.read(names.run) <= 0:
            yield name, Problem(names.show(name), "must be above 0", f"such as {setting.default:g}")
    for name, instead in _POSITIVE_IF_SET.items():
        value = all_settings()[name].read(names.run)
        if value is not None and value <= 0:
            yield name, Problem(names.show(name), "must be above 0", instead)
    for name in _SHARES:
        setting = all_settings()[name]
        if not 0 <= setting.read(names.run) < 1:
            yield name, Problem(names.show(name), "must be at least 0 and below 1", f"such as {setting.default or 0.1:g}")
    yield from _mask_ranges(names)
    if not 0 < names.run.model.rotary_percent <= 1:
        yield "model.rotary_percent", Problem(names.show("model.rotary_percent"), "must be above 0 and at most 1", "use 1 for whole heads")
    if names.run.parallel.zero not in (None, 0, 1, 2, 3):
        yield "parallel.zero", Problem(names.show("parallel.zero"), "ZeRO has the stages 0 to 3", "use --zero 1, 2 or 3")
    if names.run.training.seed > _MAX_SEED:
        yield "training.seed", Problem(names.show("training.seed"), f"must be at most {_MAX_SEED}", "use a smaller number")


def _mask_ranges(names: Names) -> Iterator[tuple[str, Problem]]:
    data = names.run.data
    if not 0 < data.mask_probability < 1:
        yield "data.mask_probability", Problem(names.show("data.mask_probability"), "must be above 0 and below 1", "such as 0.15")
    if not 0 <= data.short_seq_probability <= 1:
        yield "data.short_seq_probability", Problem(names.show("data.short_seq_probability"), "must be from 0 to 1", "such as 0.1")


def _texts(names: Names) -> Iterator[tuple[str, Problem]]:
    run = names.run
    for name, (parse, example) in _PARSED.items():
        try:
            parse(run)
        except ValueError as error:
            yield name, Problem(names.show(name), str(error), example)
    yield from _data_texts(run)


def _data_texts(run: Run) -> Iterator[tuple[str, Problem]]:
    """--data and --split, worded by the code that reads them; not with generated tokens, which need neither."""
    if run.data.mock_data or run.data.data is None:
        return
    from megactl.storage.data_spec import parse_data, parse_split

    for name, parse, text in (("data.data", parse_data, run.data.data), ("data.split", parse_split, run.data.split)):
        try:
            parse(text)
        except DataError as error:
            yield name, Problem("", error.message, error.hint)


_PARSED: dict[str, tuple[Callable[[Run], object], str]] = {
    "memory.offload": (lambda run: offload_targets(run.memory.offload), "such as --offload optimizer,activations"),
    "optimizer.warmup": (
        lambda run: parse_warmup(run.optimizer.warmup, run.training.iterations),
        "such as --warmup 100 or --warmup 1%",
    ),
    "training.rampup_batch_size": (
        lambda run: run.training.rampup_batch_size and parse_rampup(run.training.rampup_batch_size),
        "such as --rampup-batch-size '16 16 100000'",
    ),
}


def _data_source(names: Names) -> Iterator[Problem]:
    data = names.run.data
    if data.data is not None and data.mock_data:
        where = f"{names.show('data.data')} with {names.show('data.mock_data')}"
        yield Problem(where, "a run reads either data or generated tokens", "leave one out")
    if data.data is None and not data.mock_data:
        yield Problem("--data", "is not set", "give --data PREFIX, or --mock-data for generated tokens")


def _heads(names: Names) -> Iterator[Problem]:
    model, show = names.run.model, names.show
    if model.hidden_size % model.num_heads:
        hidden, heads = nearest_multiples(model.hidden_size, model.num_heads), nearest_divisors(model.num_heads, model.hidden_size)
        rule = f"must be a multiple of {show('model.num_heads')}"
        yield Problem(show("model.hidden_size"), rule, f"use --hidden {hidden}, or --heads {heads}")


def _kv_heads(names: Names) -> Iterator[Problem]:
    model, show = names.run.model, names.show
    if model.kv_heads is not None and model.num_heads % model.kv_heads:
        rule = f"must divide {show('model.num_heads')}, so that each serves as many of them"
        yield Problem(show("model.kv_heads"), rule, f"use --kv-heads {nearest_divisors(model.kv_heads, model.num_heads)}")


def _rotary(names: Names) -> Iterator[Problem]:
    model, show = names.run.model, names.show
    if model.position_embedding != "rope" or model.hidden_size % model.num_heads:
        return
    width = model.hidden_size // model.num_heads
    if width % 2:
        rule = f"turns pairs of elements, and {show('model.num_heads')} leaves heads {width} wide"
        yield Problem(show("model.position_embedding"), rule, "use --heads so that hidden / heads is even")
    elif model.rotary_width == 0:
        rule = f"leaves no pair of the {width} elements of a head to turn"
        yield Problem(show("model.rotary_percent"), rule, f"use --rotary-percent {2 / width:g} or more")
    if model.rope_low_frequency >= model.rope_high_frequency:
        rule = f"must be below {show('model.rope_high_frequency')}"
        yield Problem(show("model.rope_low_frequency"), rule, "leave both out for 1 and 4")


def _positions(names: Names) -> Iterator[Problem]:
    model, seq_length, show = names.run.model, names.run.training.seq_length, names.show
    if model.max_positions is not None and seq_length > model.max_positions:
        rule = f"is longer than {show('model.max_positions')}"
        yield Problem(show("training.seq_length"), rule, f"use --seq-length {model.max_positions}, or --max-positions {seq_length}")


def _tensor_parallel(names: Names) -> Iterator[Problem]:
    model, parallel, show = names.run.model, names.run.parallel, names.show
    tp = parallel.tensor_parallel
    if model.num_heads % tp:
        rule = f"must divide {show('model.num_heads')}"
        fits = math.gcd(model.num_heads, model.key_value_heads)
        yield Problem(show("parallel.tensor_parallel"), rule, f"use --tp {nearest_divisors(tp, fits)}")
    elif model.num_heads % model.key_value_heads == 0 and model.key_value_heads % tp:
        rule = f"must divide {show('model.kv_heads')}: a rank holds whole groups of heads with their keys and values"
        instead = f"use --tp {nearest_divisors(tp, model.key_value_heads)}"
        yield Problem(show("parallel.tensor_parallel"), rule, instead)
    ffn = model.mlp_width
    if ffn % tp and not model.num_heads % tp:
        rule = f"must divide the width of the MLP, {ffn}"
        instead = f"use --ffn {nearest_multiples(ffn, tp)}, or --tp {nearest_divisors(tp, ffn)}"
        yield Problem(show("parallel.tensor_parallel"), rule, instead)


def _context_parallel(names: Names) -> Iterator[Problem]:
    run, show = names.run, names.show
    model, parallel, length = run.model, run.parallel, run.training.seq_length
    cp, tp = parallel.context_parallel, parallel.tensor_parallel
    unit = sequence_unit(run, cp)
    if length % unit:
        chunks = f"{unit} chunks, two a rank" if unit > cp else f"{cp} parts, one a rank"
        instead = f"use --seq-length {nearest_multiples(length, unit)}, or another --cp"
        rule = f"cuts a sequence into {chunks}, and {show('training.seq_length')} is no multiple of {unit}"
        yield Problem(show("parallel.context_parallel"), rule, instead)
    if cp > 1 and parallel.context_method == "all-to-all" and not model.num_heads % tp and model.num_heads // tp % cp:
        where = f"{show('parallel.context_parallel')} with {show('parallel.context_method')}"
        heads = f"the {model.num_heads // tp} heads of a rank ({show('model.num_heads')}, {show('parallel.tensor_parallel')})"
        instead = f"use --cp-method ring, or --cp {nearest_divisors(cp, model.num_heads // tp)}"
        yield Problem(where, f"trades tokens for heads, and must divide {heads}", instead)


def _sequence_parallel(names: Names) -> Iterator[Problem]:
    training, parallel, show = names.run.training, names.run.parallel, names.show
    tp, cp = parallel.tensor_parallel, parallel.context_parallel
    if not parallel.sequence_parallel or training.micro_batch_size * training.seq_length % (tp * cp) == 0:
        return
    where = f"{show('training.micro_batch_size')} with {show('training.seq_length')}"
    ranks = show("parallel.tensor_parallel") + (f" x {show('parallel.context_parallel')}" if cp > 1 else "")
    rule = f"with {show('parallel.sequence_parallel')} the tokens of a micro-batch must be a multiple of {ranks}"
    lengths = nearest_multiples(training.seq_length, tp * cp // math.gcd(tp * cp, training.micro_batch_size))
    yield Problem(where, rule, f"use --seq-length {lengths}, or leave --sp out")


def _pipeline_parallel(names: Names) -> Iterator[Problem]:
    model, parallel, show = names.run.model, names.run.parallel, names.show
    pp, chunks = parallel.pipeline_parallel, model_chunks(parallel)
    if parallel.pipeline_split is not None:
        yield from _pipeline_split(names, pp * chunks)
    elif model.num_layers % (pp * chunks):
        stages, where = f"the {pp * chunks} stages of {show('parallel.pipeline_parallel')}", "parallel.virtual_pipeline"
        where = "parallel.schedule" if parallel.schedule == "zb-v" else where
        rule = f"must divide {show('model.num_layers')}"
        layers, split = nearest_multiples(model.num_layers, pp * chunks), "or --pp-split for stages that are not equal"
        if chunks == 1:
            instead = f"use --pp {nearest_divisors(pp, model.num_layers)}, or --layers {layers}, {split}"
            yield Problem(show("parallel.pipeline_parallel"), rule, instead)
        else:
            yield Problem(f"{stages} with {show(where)}", rule, f"use --layers {layers}, {split}")


def _pipeline_split(names: Names, num_stages: int) -> Iterator[Problem]:
    model, text = names.run.model, names.run.parallel.pipeline_split
    assert text is not None
    try:
        stage_layers(model.num_layers, num_stages, text)
    except SplitError as error:
        yield Problem(names.show("parallel.pipeline_split"), error.rule, error.instead)


def _recompute_layers(names: Names) -> Iterator[Problem]:
    run, show = names.run, names.show
    if run.memory.recompute_layers > run.model.num_layers:
        rule = f"is more than {show('model.num_layers')}"
        yield Problem(show("memory.recompute_layers"), rule, f"use --recompute-layers {run.model.num_layers}")


def _tiles(names: Names) -> Iterator[Problem]:
    """A tile is an equal share of the outputs, or the inputs, that a rank has of each matrix of a layer."""
    model, parallel, show = names.run.model, names.run.parallel, names.show
    tp, tile = parallel.tensor_parallel, parallel.tile
    # Outputs of qkv, of what leads into the MLP; inputs of the two that write to the residual stream.
    widths = {
        "hidden": model.hidden_size,
        "queries, keys and values": model.hidden_size // model.num_heads * (model.num_heads + 2 * model.key_value_heads),
        "the MLP's width": model.mlp_width,
    }
    if any(width % tp for width in widths.values()):
        return
    common = math.gcd(*(width // tp for width in widths.values()))
    if common % tile:
        over = f" / tp {tp}" if tp > 1 else ""
        wrong = ", ".join(f"{name}{over} = {width // tp}" for name, width in widths.items() if width // tp % tile)
        yield Problem(show("parallel.tile"), f"must divide {wrong}", f"use --tile {nearest_divisors(tile, common)}")


def _pair_length(names: Names) -> Iterator[Problem]:
    run, least = names.run, 8
    if run.model.architecture == "bert" and run.training.seq_length < least:
        rule = "is too short for [CLS] A [SEP] B [SEP]"
        yield Problem(names.show("training.seq_length"), rule, f"use --seq-length {least} or more")


def _min_lr(names: Names) -> Iterator[Problem]:
    optimizer, show = names.run.optimizer, names.show
    if optimizer.min_lr > optimizer.lr:
        yield Problem(show("optimizer.min_lr"), f"is above {show('optimizer.lr')}", f"use --min-lr {optimizer.lr / 10:g}")


def _loss_scales(names: Names) -> Iterator[Problem]:
    training, show = names.run.training, names.show
    initial, least = training.initial_loss_scale, training.min_loss_scale
    if initial is not None and least is not None and initial < least:
        rule = f"is below {show('training.min_loss_scale')}"
        yield Problem(show("training.initial_loss_scale"), rule, f"use --min-loss-scale {initial:g}")


def _decay(names: Names) -> Iterator[Problem]:
    optimizer, iterations, show = names.run.optimizer, names.run.training.iterations, names.show
    warmup = parse_warmup(optimizer.warmup, iterations)
    if warmup > iterations:
        yield Problem(show("optimizer.warmup"), f"is longer than {show('training.iterations')}", "use --warmup 1%")
        return
    decay = optimizer.lr_decay_iterations
    if decay is not None and decay < warmup:
        rule = f"ends before the warm-up of {warmup} iterations"
        yield Problem(show("optimizer.lr_decay_iterations"), rule, f"use --lr-decay-iterations {iterations}")
        return
    final, room = optimizer.wsd_decay_iterations, (decay or iterations) - warmup
    if final is not None and final > room:
        instead = f"use --wsd-decay-iterations {room}" if room else "use a shorter --warmup"
        yield Problem(show("optimizer.wsd_decay_iterations"), f"is longer than the {room} iterations after the warm-up", instead)


def _rampup(names: Names) -> Iterator[Problem]:
    training, where = names.run.training, names.show("training.rampup_batch_size")
    if training.rampup_batch_size is None:
        return
    rampup = parse_rampup(training.rampup_batch_size)
    if training.global_batch_size is None:
        yield Problem(where, "needs the batch size to grow to", "give --global-batch-size")
    elif rampup.start >= training.global_batch_size:
        instead = "leave the ramp-up out" if rampup.start == training.global_batch_size else "use a smaller START"
        yield Problem(where, f"START {rampup.start} must be below {names.show('training.global_batch_size')}", instead)
    elif (training.global_batch_size - rampup.start) % rampup.increment:
        distance = training.global_batch_size - rampup.start
        rule = f"INCREMENT {rampup.increment} must divide global batch - START = {distance}"
        yield Problem(where, rule, f"use INCREMENT {nearest_divisors(rampup.increment, distance)}")


def _evaluation(names: Names) -> Iterator[Problem]:
    run = names.run
    if run.data.mock_data or run.data.data is None:
        return
    from megactl.storage.data_spec import parse_split

    shares = parse_split(run.data.split)
    if shares[0] == 0:
        yield Problem(names.show("data.split"), "leaves no documents for training", "such as --split 969,30,1")
    if run.training.eval_interval and shares[1] == 0:
        rule = f"leaves no documents for {names.show('training.eval_interval')}"
        yield Problem(names.show("data.split"), rule, "use --split 969,30,1, or --eval-interval 0")


# (check, the settings that must be in range for it to make sense)
_RELATIONS: tuple[tuple[Callable[[Names], Iterator[Problem]], tuple[str, ...]], ...] = (
    (_heads, ("model.hidden_size", "model.num_heads")),
    (_kv_heads, ("model.num_heads", "model.kv_heads")),
    (_rotary, ("model.hidden_size", "model.num_heads", "model.rotary_percent", "model.rope_low_frequency", "model.rope_high_frequency")),
    (_positions, ("model.max_positions", "training.seq_length")),
    (_tensor_parallel, ("model.num_heads", "model.kv_heads", "model.hidden_size", "model.ffn_size", "parallel.tensor_parallel")),
    (_context_parallel, ("model.num_heads", "parallel.tensor_parallel", "parallel.context_parallel", "training.seq_length")),
    (
        _sequence_parallel,
        ("training.micro_batch_size", "training.seq_length", "parallel.tensor_parallel", "parallel.context_parallel"),
    ),
    (_pipeline_parallel, ("model.num_layers", "parallel.pipeline_parallel", "parallel.virtual_pipeline")),
    (_recompute_layers, ("model.num_layers", "memory.recompute_layers")),
    (_tiles, ("model.hidden_size", "model.num_heads", "model.kv_heads", "model.ffn_size", "parallel.tensor_parallel", "parallel.tile")),
    (_pair_length, ("training.seq_length",)),
    (_min_lr, ("optimizer.lr", "optimizer.min_lr")),
    (_loss_scales, ("training.initial_loss_scale", "training.min_loss_scale")),
    (_decay, ("optimizer.warmup", "training.iterations", "optimizer.lr_decay_iterations", "optimizer.wsd_decay_iterations")),
    (_rampup, ("training.rampup_batch_size", "training.global_batch_size")),
    (_evaluation, ("data.split", "training.eval_interval")),
)
