"""`megactl model-size`: parameters of a model by part, by pipeline stage and per GPU, and the bytes they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from megactl.commands.architecture_options import ARCHITECTURE, Request, TextOption, read_request, with_settings
from megactl.commands.common import columns, count, emit_json, size
from megactl.errors import ConfigError, Problem

_HELP = "\n\n".join(
    (
        "Parameters and bytes of a model.",
        "A GPT with tied embeddings has l(12h^2 + 13h) + vh + sh + 2h parameters; a BERT, an untied head or another MLP is counted "
        "exactly, and the difference is shown. Billions are 10^9. --tp, --pp, --dp and --zero give what one GPU holds.",
        "--suggest-layout chooses TP = min(MP, GPUs of a node), PP = MP / TP, DP = GPUs / MP, with the smallest MP that fits the memory, "
        "without recomputation (or with the --mp you give).",
    )
)

_EPILOG = """Examples:

megactl model-size --hidden 4096 --layers 36 --seq 512 --vocab 50257

megactl model-size --preset gpt-52b --tp 4 --pp 16 --dp 2 --zero 1 --precision fp16

megactl model-size --preset bert-large --json

megactl model-size --preset gpt-18b --suggest-layout --gpus 64 --gpus-per-node 8 --gpu a100-80"""

_PARALLEL = ("parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.data_parallel", "parallel.zero")
_STAGES = ("parallel.virtual_pipeline", "parallel.schedule", "parallel.pipeline_split")
_SETTINGS = (*ARCHITECTURE, *_PARALLEL, *_STAGES, "training.micro_batch_size", "training.precision")
_PANEL = "Layout by rule of thumb"
_TEXTS = {
    "gpus": TextOption(("--gpus", "--ng", "--num-gpus", "--world-size"), "N", "GPUs in all.", _PANEL),
    "gpus_per_node": TextOption(("--gpus-per-node",), "N", "GPUs of a node (default 8).", _PANEL),
    "gpu": TextOption(("--gpu",), "NAME", "Its memory: v100-32, a100-80, h100 ...", _PANEL),
    "gpu_memory": TextOption(("--gpu-memory",), "GIB", "Memory of a GPU (default 79).", _PANEL),
    "mp": TextOption(("--mp",), "N", "GPUs to a replica (default: the fewest that fit).", _PANEL),
}
ASSUMED_PRECISION, ASSUMED_NODE, ASSUMED_GIB = "bf16", 8, 79.0
"""Mixed precision, as large models are trained; nodes of 8 GPUs with 80 GB, of which the driver leaves 79 GiB."""

_FORMULA = "l(12h^2 + 13h) + vh + sh + 2h"


@dataclass(frozen=True)
class Spread:
    """How the model is spread over GPUs, and with which types. The last three say which layers a pipeline rank holds."""

    tp: int
    pp: int
    dp: int
    zero: int
    precision: str
    schedule: str = "1f1b"
    virtual_pipeline: int = 1
    split: str | None = None


@with_settings(*_SETTINGS, help=_HELP, epilog=_EPILOG, texts=_TEXTS)
def model_size(
    suggest_layout: Annotated[bool, typer.Option("--suggest-layout", help="Choose TP, PP and DP for --gpus.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    **settings: Any,
) -> int:
    """Run the command; the help text is `_HELP`. Returns the exit code."""
    request, chosen = _read(settings, suggest=suggest_layout)
    assumed: dict[str, Any] = {}
    spread, suggested = _spread(request, assumed), None
    if suggest_layout:
        suggested, spread = _suggest(request, chosen, spread, assumed)
    document = _document(request, spread, suggested, assumed)
    if json_:
        emit_json(document)
    else:
        print("\n".join(_text(document)))
    return 0


def _read(settings: Mapping[str, Any], *, suggest: bool) -> tuple[Request, dict[str, Any]]:
    """The settings, and the options of --suggest-layout as numbers. Raises ConfigError holding every mistake."""
    from megactl.commands.tflops_values import Reader

    reader = Reader(settings, _TEXTS)
    options = reader.options
    chosen: dict[str, Any] = {name: reader.count(name) for name in ("gpus", "gpus_per_node", "mp")}
    own = reader.quantity("gpu_memory", {"": 1.0, "gib": 1.0, "gb": 1.0}, 1e5, "a number of GiB", "check the number")
    by_name = _memory_by_name(reader, options["gpu"], own_given=options["gpu_memory"] is not None)
    chosen["memory"] = own.value if own else by_name
    for name, value in options.items():
        if value is not None and not suggest:
            reader.problems.append(Problem(reader.where(name), "is for --suggest-layout", "give that too, or leave it out"))
    if suggest and options["gpus"] is None:
        reader.problems.append(Problem("--suggest-layout", "needs the number of GPUs", "give --gpus N"))
    request = None
    try:
        request = read_request(settings)
    except ConfigError as error:
        reader.problems += error.problems
    if request is not None:
        reader.problems += _settings_problems(request, suggest=suggest)
    if reader.problems:
        raise ConfigError(reader.problems)
    assert request is not None, "the settings are wrong without a problem"
    return request, chosen


def _memory_by_name(reader: Any, name: str | None, *, own_given: bool) -> float | None:
    from megactl.costmodel.hardware import find_gpu, gpu_memory

    if name is None:
        return None
    if own_given:
        reader.problems.append(Problem(f"--gpu {name} with {reader.where('gpu_memory')}", "are two memories", "leave one out"))
        return None
    found = gpu_memory(name)
    if found is None:
        row = find_gpu(name)
        rule = f"{row.name} is sold with several amounts of memory" if row else "is not in the list of GPUs"
        reader.problems.append(Problem(f"--gpu {name}", rule, "give --gpu-memory GIB"))
    return found


def _settings_problems(request: Request, *, suggest: bool) -> list[Problem]:
    found = []
    for name in ("tensor_parallel", "pipeline_parallel", "data_parallel") if suggest else ():
        if request.origins[f"parallel.{name}"].startswith("flag"):
            typed = request.origins[f"parallel.{name}"].removeprefix("flag ")
            found.append(Problem(f"{typed} {request.given(f'parallel.{name}')}", "is what --suggest-layout chooses", "leave one out"))
    for name in _STAGES if suggest else ():
        if request.origins[name].startswith("flag"):
            typed = request.origins[name].removeprefix("flag ")
            found.append(
                Problem(f"{typed} {request.given(name)}", "is no part of --suggest-layout: one equal stage a rank", "leave one out")
            )
    if not suggest and request.origins["training.micro_batch_size"].startswith("flag"):
        where = f"--mbs {request.given('training.micro_batch_size')}"
        found.append(Problem(where, "changes activations only, which --suggest-layout counts", "leave it out"))
    return found


def _spread(request: Request, assumed: dict[str, Any]) -> Spread:
    """The layout and the types as given; what nobody gave is put into `assumed`."""
    parallel = request.run.parallel
    dp, zero, precision = parallel.data_parallel or 1, parallel.zero, request.given("training.precision")
    if precision is None:
        precision = assumed["precision"] = ASSUMED_PRECISION
    if zero is None:
        zero = int(dp > 1)
        if zero:
            assumed["zero"] = zero
    degrees = (parallel.tensor_parallel, parallel.pipeline_parallel, dp, zero, precision)
    return Spread(*degrees, parallel.schedule, parallel.virtual_pipeline, parallel.pipeline_split)


def _suggest(request: Request, chosen: Mapping[str, Any], spread: Spread, assumed: dict[str, Any]) -> tuple[dict[str, Any], Spread]:
    """The suggested layout as JSON has it, and the spread it gives: one equal stage a rank, whatever a file says."""
    from megactl.costmodel.layout_rule import FRAGMENTATION, RESERVED_GIB, check_layout, suggest_layout

    node, memory, micro = chosen["gpus_per_node"], chosen["memory"], request.given("training.micro_batch_size")
    if node is None:
        node = assumed["gpus-per-node"] = ASSUMED_NODE
    if memory is None:
        memory = assumed["gpu-memory"] = ASSUMED_GIB
    if micro is None:
        micro = assumed["mbs"] = 1
    zero = request.given("parallel.zero")
    assumed.pop("zero", None)
    run = {"seq_length": request.seq_length, "gpus": chosen["gpus"], "gpus_per_node": node, "precision": spread.precision, "zero": zero}
    if chosen["mp"] is None:
        found = suggest_layout(request.model, **run, gpu_memory_gib=memory, micro_batch_size=micro)
    else:
        found = check_layout(request.model, chosen["mp"], **run, micro_batch_size=micro)
    if zero is None and found.data_parallel > 1:
        zero = assumed["zero"] = 1
    degrees = {"tp": found.tensor_parallel, "pp": found.pipeline_parallel, "dp": found.data_parallel}
    document = {
        **degrees,
        "mp": found.model_parallel,
        "gpus": chosen["gpus"],
        "gpus_per_node": node,
        "gpu_memory_gib": memory,
        "needed_gib": found.needed_gib,
        "fits": found.needed_gib <= memory,
        "rule": "TP = min(MP, GPUs of a node), PP = MP / TP, DP = GPUs / MP",
        "memory": found.memory.as_dict(),
        "reserved_gib": RESERVED_GIB,
        "fragmentation": FRAGMENTATION,
    }
    return document, Spread(**degrees, zero=zero or 0, precision=spread.precision)


def _document(request: Request, spread: Spread, suggested: dict[str, Any] | None, assumed: dict[str, Any]) -> dict[str, Any]:
    from megactl.costmodel.memory import model_state
    from megactl.costmodel.parameters import parameter_parts, seed_formula

    model, seq = request.model, request.seq_length
    if not request.is_set("training.seq_length") and model.max_positions is None:
        assumed = {"seq": seq, **assumed}
    parts = parameter_parts(model, seq_length=seq)
    total = sum(parts.values())
    by_formula = seed_formula(num_layers=model.num_layers, hidden_size=model.hidden_size, vocab_size=model.vocab_size or 0, seq_length=seq)
    state = model_state(total, spread.precision)
    return {
        "parameters": total,
        "billions": total / 1e9,
        "parts": parts,
        "per_gpu": _per_gpu(request, spread),
        "bytes": {"precision": spread.precision, **asdict(state), "total": state.total},
        "formula": {"text": _FORMULA, "parameters": by_formula, "billions": by_formula / 1e9},
        "beyond_formula": _beyond_formula(request, parts),
        "billions_2_30": total / 2**30,
        "padding": _padding(request, spread),
        "assumed": assumed,
        "suggested_layout": suggested,
        "architecture": {
            "model": model.architecture,
            "layers": model.num_layers,
            "hidden": model.hidden_size,
            "vocab": model.vocab_size,
            "seq": seq,
        },
    }


def _beyond_formula(request: Request, parts: Mapping[str, int]) -> dict[str, int]:
    """What the model has more (or less) than the formula's GPT, by part."""
    from megactl.config.schema import Model
    from megactl.costmodel.parameters import parameter_parts

    model = request.model
    plain = Model(num_layers=model.num_layers, hidden_size=model.hidden_size, vocab_size=model.vocab_size)
    counted = parameter_parts(plain, seq_length=request.seq_length)
    return {part: number - counted.get(part, 0) for part, number in parts.items() if number != counted.get(part, 0)}


def _padding(request: Request, spread: Spread) -> dict[str, int]:
    """Rows of the vocabulary that exist on GPUs only, and their parameters in one copy of the embedding."""
    from megactl.costmodel.parameters import padded_vocab, vocabulary

    vocab = vocabulary(request.model)
    rows = padded_vocab(vocab, spread.tp) - vocab
    return {"padded_vocab": vocab + rows, "rows": rows, "parameters": rows * request.model.hidden_size}


def _per_gpu(request: Request, spread: Spread) -> dict[str, Any]:
    from megactl.costmodel.memory import model_state
    from megactl.costmodel.parameters import split_layers, stage_parts, stage_ranks

    placed, stages = stage_ranks(spread.pp, spread.schedule, spread.virtual_pipeline), []
    layers = split_layers(request.model.num_layers, len(placed), spread.split)
    shape = {"tp": spread.tp, "num_stages": len(placed), "seq_length": request.seq_length, "split": spread.split}
    for rank in range(spread.pp):
        held_stages = [stage for stage, owner in enumerate(placed) if owner == rank]
        each = [stage_parts(request.model, stage=stage, **shape) for stage in held_stages]
        parts = {part: sum(stage[part] for stage in each) for part in each[0]}
        parameters = sum(parts.values())
        state = model_state(parameters, spread.precision, zero=spread.zero, data_parallel=spread.dp)
        held = {"parameters": parameters, **asdict(state), "total": state.total}
        count_layers = sum(len(layers[stage]) for stage in held_stages)
        stages.append({"stage": rank, "layers": count_layers, **held, "parts": parts})
    fullest = max(stages, key=lambda stage: stage["total"])
    named = {key: fullest[key] for key in ("stage", "parameters", "weights", "gradients", "optimizer", "total")}
    chunks = len(placed) // spread.pp
    return {"tp": spread.tp, "pp": spread.pp, "chunks": chunks, "dp": spread.dp, "zero": spread.zero, **named, "stages": stages}


def _text(document: Mapping[str, Any]) -> list[str]:
    total, formula = document["parameters"], document["formula"]
    shape = document["architecture"]
    facts = [("formula:", f"{_FORMULA}, with l {shape['layers']}, h {shape['hidden']}, v {shape['vocab']}, s {shape['seq']}")]
    if formula["parameters"] != total:
        extra = ", ".join(f"{part} {number:+,}" for part, number in document["beyond_formula"].items())
        facts += [("", f"gives {formula['parameters']:,}; this model has {extra}")]
    if round(document["billions_2_30"]) != round(document["billions"]):
        facts.append(("in 2^30:", f"{document['billions_2_30']:.2f}, which old scripts printed as B"))
    if document["assumed"]:
        facts.append(
            (
                "assumed:",
                ", ".join(
                    f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
                    for name, value in document["assumed"].items()
                ),
            )
        )
    lines = [f"{document['billions']:.2f} B parameters ({total:,})", *columns(facts, indent="  "), ""]
    rows = [("part", "parameters", "share")]
    rows += [(part, f"{number:,}", f"{number / total:.1%}") for part, number in document["parts"].items() if number]
    lines += [*_right(rows), "", *_bytes_text(document)]
    return [*lines, *_suggested_text(document)]


def _right(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns with every cell but the first on the right, as numbers stand."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return columns([(row[0], *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))) for row in rows], indent="  ")


def _bytes_text(document: Mapping[str, Any]) -> list[str]:
    whole, gpu = document["bytes"], document["per_gpu"]
    header = ("", "layers", "parameters", "weights", "gradients", "optimizer", "total")
    rows = [header, ("model", str(document["architecture"]["layers"]), count(document["parameters"]), *_sizes(whole))]
    alone = gpu["tp"] == gpu["pp"] == gpu["dp"] == 1
    for first, last, stage in () if alone else _alike(gpu["stages"]):
        name = "GPU" if gpu["pp"] == 1 else f"GPU of stage {first}" if first == last else f"GPU of stages {first} to {last}"
        rows.append((name, str(stage["layers"]), count(stage["parameters"]), *_sizes(stage)))
    lines = [f"bytes in {whole['precision']}, activations apart:", *_right(rows)]
    if not alone:
        chunks = f" with {gpu['chunks']} chunks a rank" if gpu["chunks"] > 1 else ""
        spread = f"tp {gpu['tp']}, pp {gpu['pp']}{chunks}, dp {gpu['dp']}, ZeRO {gpu['zero']}"
        padding = document["padding"]
        padded = f"; vocabulary padded by {padding['rows']} rows to {padding['padded_vocab']}" if padding["rows"] else ""
        lines.append(f"  {spread}{padded}")
    return lines


def _alike(stages: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, Any]]]:
    """(first, last, stage) of each run of stages that hold the same."""
    found: list[tuple[int, int, dict[str, Any]]] = []
    for stage in stages:
        number = stage["stage"]
        if found and all(found[-1][2][key] == stage[key] for key in ("layers", "parameters", "parts")):
            found[-1] = (found[-1][0], number, found[-1][2])
        else:
            found.append((number, number, stage))
    return found


def _sizes(held: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(size(held[key]) for key in ("weights", "gradients", "optimizer", "total"))


def _suggested_text(document: Mapping[str, Any]) -> list[str]:
    found = document["suggested_layout"]
    if found is None:
        return []
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    memory = found["memory"]
    facts = [
        ("rule:", f"{found['rule']}, with MP {found['mp']}, {found['gpus_per_node']} GPUs a node, {found['gpus']} GPUs"),
        ("memory:", f"{found['needed_gib']:.1f} GiB of {found['gpu_memory_gib']:g} GiB on a GPU of stage {memory['stage']}: {verdict}"),
        (
            "",
            f"model state {size(memory['weights'] + memory['gradients'] + memory['optimizer'])}, activations {size(memory['activations'])} "
            f"without recomputation, {found['fragmentation'] - 1:.0%} for fragmentation, {found['reserved_gib']:g} GiB for CUDA and NCCL",
        ),
    ]
    return ["", f"suggested layout: --tp {found['tp']} --pp {found['pp']} --dp {found['dp']}", *columns(facts, indent="  ")]
