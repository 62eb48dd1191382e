"""`megactl tflops`: the speed of a training run in TFLOP/s, by the rule of thumb and exactly; and the same for tables in notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.architecture_options import ARCHITECTURE, Request, TextOption, read_request, with_settings
from megactl.commands.common import columns, count, emit_json, say
from megactl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megactl.commands.tflops_values import Reader, Values
    from megactl.costmodel.flops import Utilization

# One line a paragraph: Typer keeps the line breaks of all but the first.
_HELP = "\n\n".join(
    (
        "TFLOP/s per GPU of a training run.",
        "The rule of thumb is size x factor x 2 x sequence x global batch / (seconds x GPUs x 1000). What was not given is assumed, and "
        "named. With an architecture (--preset, or --layers --hidden --vocab) HFU, MFU and causal MFU are exact, each with its formula; "
        "with --gpu they are shares of its peak. Exits 1 where a figure is above the peak: then something in the input is wrong.",
        "--table prints a Markdown file with its TFLOPs columns computed again. It lists, on stderr, rows that do not match, rows "
        "explained by the rounding of speed or size, and rows whose own columns disagree.",
    )
)

_EPILOG = """Examples:

megactl tflops --ms 52 --gbs 1024 --sec 127

megactl tflops --ms 52 --mbs 4 --dp 1 --gas 256 --nodes 16 --gpus-per-node 4 --time-ms 122000 --gpu v100-32

megactl tflops --preset gpt-52b --gbs 1024 --sec 127 --recompute none --gpu a100-80 --json

megactl tflops --layers 70 --hidden 14336 --vocab 250880 --seq 2048 --gbs 2048 --ng 384 --sec 105.22

megactl tflops --table notes.md --in-place"""

_SETTINGS = (
    *ARCHITECTURE, "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.data_parallel", "training.micro_batch_size",
    "training.global_batch_size", "training.precision",
)  # fmt: skip
_MEASURED, _GPU = "What was measured", "GPU"
_TEXTS = {
    "ms": TextOption(("--ms", "--model-size"), "B", "Billions of parameters (52, 52B, 345M).", _MEASURED),
    "sec": TextOption(("--sec", "--seconds"), "S", "Seconds of an iteration.", _MEASURED),
    "time_ms": TextOption(("--time-ms",), "MS", "The same in milliseconds, as logs have it.", _MEASURED),
    "ng": TextOption(("--ng", "--gpus", "--num-gpus", "--world-size"), "N", "GPUs in all (default 64).", _MEASURED),
    "nodes": TextOption(("--nodes", "--num-nodes", "--nnodes"), "N", "Nodes; with --gpus-per-node in place of --ng.", _MEASURED),
    "gpus_per_node": TextOption(("--gpus-per-node",), "N", "GPUs of a node.", _MEASURED),
    "gas": TextOption(
        ("--gas", "--pp-chunks", "--gradient-accumulation-steps"), "N", "Micro-batches; --mbs x --dp x --gas is the batch.", _MEASURED
    ),
    "recompute": TextOption(
        ("--recompute", "--recompute-granularity"), "none|selective|full", "What backward runs again (default full).", _MEASURED
    ),
    "factor": TextOption(("--factor",), "3|4", "The same as a number: 4 with full recomputation (default), else 3.", _MEASURED),
    "gpu": TextOption(("--gpu",), "NAME", "v100-32, a100-80, h100, h100-pcie, h200, b200 ...", _GPU),
    "peak": TextOption(("--peak",), "TFLOPS", "The GPU's dense peak, where it has no row here.", _GPU),
}


@with_settings(*_SETTINGS, help=_HELP, epilog=_EPILOG, texts=_TEXTS)
def tflops(
    table: Annotated[str | None, typer.Option("--table", metavar="FILE.md", help="Compute the tables of a file again (-: stdin).")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="With --table: write the file, not stdout.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    **settings: Any,
) -> int:
    """Run the command; the help text is `_HELP`. Returns the exit code."""
    from megactl.commands.tflops_values import Reader

    reader = Reader(settings, _TEXTS)
    if table is not None:
        from megactl.commands.tflops_table import run_table

        return run_table(table, reader, settings, in_place=in_place, as_json=json_)
    if in_place:
        reader.problems.append(Problem("--in-place", "has no file to write", "give --table FILE.md"))
    return _run(reader, settings, as_json=json_)


def _run(reader: Reader, settings: dict[str, Any], *, as_json: bool) -> int:
    from megactl.commands.tflops_values import read_values

    request = _request(reader, settings)
    peak = _peak(reader, request)
    values = read_values(reader, request)
    assert request is not None, "the settings are wrong without a problem"
    document = _document(values, request, peak)
    for warning in document["warnings"]:
        say(warning, label="warning")
    if as_json:
        emit_json(document)
    else:
        print("\n".join(_text(values, request, document)))
    return 1 if document["above_peak"] else 0


def _request(reader: Reader, settings: dict[str, Any]) -> Request | None:
    """The settings; their mistakes are kept with the others."""
    try:
        return read_request(settings, needs_model=False)
    except ConfigError as error:
        reader.problems += error.problems
        return None


def _peak(reader: Reader, request: Request | None) -> dict[str, Any]:
    """The GPU: its row's name, its peak in TFLOP/s and the precision that is for; None where they are not known, and then why."""
    from megactl.costmodel.hardware import find_gpu

    name = reader.options.get("gpu")
    precision = request.given("training.precision") if request else None
    found: dict[str, Any] = {"name": name, "peak_tflops": None, "precision": precision, "given": False, "why": None}
    own = reader.quantity("peak", {"": 1.0}, 1e5, "a number of TFLOP/s", "check the number")
    if own is not None:
        return {**found, "peak_tflops": own.value, "given": True}
    if name is None:
        if precision is not None and request is not None and request.origins["training.precision"].startswith("flag"):
            reader.problems.append(Problem(f"--precision {precision}", "says which peak of the GPU is meant", "give --gpu too"))
        return {**found, "why": "give --gpu"}
    row = find_gpu(name)
    if row is None:
        return {**found, "why": f"{name} is not in the list of GPUs; give its dense peak with --peak"}
    rate, precision = row.training_peak(precision)
    why = None if rate else f"{row.name} has no {precision} rate; use --precision fp16 or give --peak"
    return {"name": row.name, "peak_tflops": rate, "precision": precision, "given": False, "why": why}


def _document(values: Values, request: Request, gpu: dict[str, Any]) -> dict[str, Any]:
    from megactl.costmodel.flops import seed_tflops, utilization

    rule = {"billions": values.billions, "seconds": values.seconds, "gpus": values.gpus, "global_batch": values.global_batch}
    speed = seed_tflops(**rule, seq_length=values.seq_length, factor=values.factor)
    peak, exact, warnings = gpu["peak_tflops"], None, list(values.warnings)
    least = speed
    if request.named:
        run = {"seq_length": values.seq_length, "global_batch": values.global_batch, "seconds": values.seconds, "gpus": values.gpus}
        found = utilization(request.model, **run, peak_tflops=peak, recompute=values.recompute)
        exact, least = _exact(values, request, found), found.causal_hfu_tflops
    if gpu["why"] and gpu["name"]:
        warnings.append(gpu["why"])
    above = peak is not None and least > peak
    if above:
        doubt = [f"--{name} {value} (assumed)" for name, value in values.assumed.items()] or ["--sec, --gbs, --ng"]
        warnings.append(f"{least:.1f} TFLOP/s is above the peak of {peak:g}: something in the input is wrong; check {', '.join(doubt)}")
    return {
        "tflops_per_gpu": speed,
        "assumed": values.assumed,
        "exact": exact,
        "inputs": values.inputs(),
        "derived": values.derived,
        "formula": "ms * factor * 2 * seq * gbs / (sec * ng * 1e3)",
        "without_recomputation": speed * 3 / values.factor,
        "gpu": gpu,
        "share_of_peak": speed / peak if peak else None,
        "above_peak": above,
        "warnings": warnings,
    }


def _exact(values: Values, request: Request, found: Utilization) -> dict[str, Any]:
    from megactl.costmodel.flops import hardware_flops, model_flops, published_selective_flops
    from megactl.costmodel.parameters import total_parameters

    model, seq, batch = request.model, values.seq_length, values.global_batch
    published = published_selective_flops(model, seq, batch) / (values.seconds * values.gpus * 1e12)
    return {
        **found.as_dict(),
        "parameters": total_parameters(model, seq_length=seq),
        "recompute": values.recompute,
        "model_flops": model_flops(model, seq, batch),
        "causal_model_flops": model_flops(model, seq, batch, causal=True),
        "hardware_flops": hardware_flops(model, seq, batch, recompute=values.recompute),
        "published_selective_hfu_tflops": published if values.recompute == "selective" else None,
        "formula": _formula(request),
    }


def _formula(request: Request) -> dict[str, str]:
    """The formulas in words of the field: T tokens of an iteration, s of a sequence, l layers, h hidden, v vocabulary, f MLP width.

    Where heads share keys, k is the width of all keys; SwiGLU has a third matrix.
    """
    from megactl.costmodel.parameters import key_value_width

    model = request.model
    grouped = model.key_value_heads != model.num_heads
    attention, mlp = "2 h^2 + 2 h k" if grouped else "4 h^2", "3 h f" if model.activation == "swiglu" else "2 h f"
    keys = f", with k {key_value_width(model)}" if grouped else ""
    bert = request.model.architecture == "bert"
    head = "h(v + h)" if bert else "h v"
    sentence = " + the sentence head once a sequence" if bert and request.model.sentence_head is not False else ""
    forward = f"F = 2 T (l ({attention} + {mlp}) + {head}) + 4 T s h l{sentence}{keys}"
    again = {"hfu": "3 F + what is recomputed (full: F without its head; selective: 4 T s h l)", "mfu": "3 F"}
    return {"forward": forward, **again, "causal_mfu": "3 F" if bert else "3 F with 2 T s h l for attention"}


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _text(values: Values, request: Request, document: dict[str, Any]) -> list[str]:
    gpu = document["gpu"]
    if gpu["peak_tflops"]:
        named = " (--peak)" if gpu["given"] else f" ({gpu['name']}, dense {gpu['precision']})"
        peak = f"{gpu['peak_tflops']:g} TFLOP/s{named}"
    else:
        peak = f"n/a ({gpu['why']})"
    speed, facts = f"{document['tflops_per_gpu']:.1f} TFLOP/s per GPU", _rule_facts(values, document)
    if document["exact"] is None:
        note = "HFU, MFU and causal MFU need an architecture: --preset NAME, or --layers --hidden --vocab"
        return [speed, *columns([*facts, ("peak:", peak)], indent="  "), note]
    return [speed, *columns(facts, indent="  "), "", *_exact_text(request, document, peak)]


def _rule_facts(values: Values, document: dict[str, Any]) -> list[tuple[str, str]]:
    formula = (
        f"size {values.billions:.4g} x factor {values.factor} x 2 x sequence {values.seq_length} x batch {values.global_batch} / "
        f"({values.seconds:g} s x {values.gpus} GPUs x 1000)"
    )
    facts = [("formula:", formula)]
    if values.assumed:
        facts.append(("assumed:", ", ".join(f"--{name} {value}" for name, value in values.assumed.items())))
    facts += [("derived:", f"--{name} from {reason}") for name, reason in values.derived.items()]
    if values.factor == 4:
        facts.append(("factor 3:", f"{document['without_recomputation']:.1f} TFLOP/s, where recomputation is not counted as work"))
    if document["share_of_peak"] is not None:
        facts.append(("of peak:", _share(document["share_of_peak"])))
    return facts


def _exact_text(request: Request, document: dict[str, Any], peak: str) -> list[str]:
    exact, model = document["exact"], request.model
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}, sequence {document['inputs']['seq']}"
    formulas = exact["formula"]
    hfu = {"full": "3 F + F without its head", "selective": "3 F + 4 T s h l", "none": "3 F"}[exact["recompute"]]
    rows = [("", "TFLOP/s", "of peak", "FLOPs of an iteration")]
    for name, key, formula in (("HFU", "hfu", hfu), ("MFU", "mfu", formulas["mfu"]), ("causal MFU", "causal_mfu", formulas["causal_mfu"])):
        rows.append((name, f"{exact[f'{key}_tflops']:.2f}", _share(exact[key]), formula))
    if exact["published_selective_hfu_tflops"] is not None:
        rows.append(("", f"{exact['published_selective_hfu_tflops']:.2f}", "", "HFU as Korthikanti et al. 2022 count it: 3 F + 12 T s h l"))
    work = f"{exact['model_flops']:.4g} FLOPs an iteration, {exact['hardware_flops']:.4g} with recomputation ({exact['recompute']})"
    return [
        f"exact, for {count(exact['parameters'])} parameters ({shape}):",
        *columns(rows, indent="  "),
        *columns([("forward:", f"{formulas['forward']}, for T tokens"), ("work:", work), ("peak:", peak)], indent="  "),
    ]
