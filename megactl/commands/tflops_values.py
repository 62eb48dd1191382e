"""What `megactl tflops` computes from: every value as given, derived or assumed, and every contradiction between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megactl.commands.architecture_options import Request, TextOption
from megactl.errors import ConfigError, Problem
from megactl.report.quantity import BILLIONS, COUNT, SECONDS, Quantity, read_quantity

ASSUMED_GPUS, ASSUMED_SEQ = 64, 1024
FACTORS = {"none": 3, "selective": 3, "full": 4}
"""Times that the forward's FLOPs are counted: once forward, twice backward, and once more where all of it is recomputed."""

_FACTOR_MEANS = {3: "no recomputation", 4: "full recomputation"}
_LEAST, _MOST_SECONDS, _MOST_BILLIONS, _MOST_COUNT = 1e-6, 1e6, 1e5, 1e9
_SAME_SIZE = 0.10
_LONGEST = 40


@dataclass(frozen=True)
class Values:
    """Everything the formulas need. `assumed`: what nobody gave, by the flag's name. `derived`: what follows from other flags, with why."""

    billions: float
    seconds: float
    gpus: int
    global_batch: int
    seq_length: int
    factor: int
    recompute: str
    assumed: dict[str, Any] = field(default_factory=dict)
    derived: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def inputs(self) -> dict[str, Any]:
        """The values under the names of their flags."""
        names = {"ms": self.billions, "sec": self.seconds, "ng": self.gpus, "gbs": self.global_batch, "seq": self.seq_length}
        return {**names, "factor": self.factor, "recompute": self.recompute}


class Reader:
    """Reads the options that are no settings of the schema; `problems` holds every mistake so far."""

    def __init__(self, options: Mapping[str, Any], known: Mapping[str, TextOption]) -> None:
        """`options`: name -> text as typed, or None; only those of `known` are looked at."""
        self.options: dict[str, str | None] = {name: options.get(name) for name in known}
        self.flags = {name: option.flags[0] for name, option in known.items()}
        self.problems: list[Problem] = []

    def where(self, name: str) -> str:
        """The option as typed, if it is not endless."""
        text = self.options[name] or ""
        return f"{self.flags[name]} {text if len(text) <= _LONGEST else f'{text[:_LONGEST]}...'}"

    def quantity(self, name: str, units: Mapping[str, float], most: float, what: str, too_large: str) -> Quantity | None:
        """The option's number from a millionth of a unit to `most`; None where it was not given, or is a mistake."""
        text = self.options.get(name)
        if text is None:
            return None
        found = read_quantity(text, units)
        if found is None or found.value <= 0:
            self.problems.append(Problem(self.where(name), f"must be {what} above 0", f"such as {self.flags[name]} {_EXAMPLES[name]}"))
            return None
        if found.value < _LEAST:
            self.problems.append(Problem(self.where(name), f"is below {_LEAST:g}", f"such as {self.flags[name]} {_EXAMPLES[name]}"))
            return None
        if found.value > most:
            self.problems.append(Problem(self.where(name), f"is above {most:,.0f}", too_large))
            return None
        return found

    def count(self, name: str) -> int | None:
        """A whole number."""
        found = self.quantity(name, COUNT, _MOST_COUNT, "a whole number", "check the number")
        return int(found.value) if found else None

    def billions(self) -> Quantity | None:
        """--ms: billions of parameters, or a number with its unit."""
        text = self.options.get("ms") or ""
        plain = read_quantity(text, COUNT)
        instead = f"--ms counts billions: use --ms {plain.value / 1e9:g}" if plain and plain.value >= 1e6 else "--ms counts billions"
        return self.quantity("ms", BILLIONS, _MOST_BILLIONS, "a size in billions of parameters", instead)

    def seconds(self) -> float | None:
        """--sec or --time-ms, in seconds."""
        seconds = self.quantity("sec", SECONDS, _MOST_SECONDS, "a time in seconds", "for milliseconds use --time-ms")
        milliseconds = self.quantity("time_ms", {"": 1e-3, "ms": 1e-3}, _MOST_SECONDS, "a time in milliseconds", "check the number")
        if self.options.get("sec") is not None and self.options.get("time_ms") is not None:
            self.problems.append(Problem(f"{self.where('sec')} with {self.where('time_ms')}", "are two times", "leave one out"))
        elif self.options.get("sec") is None and self.options.get("time_ms") is None:
            self.problems.append(Problem("--sec", "is not set", "give the seconds of an iteration, such as --sec 127, or --time-ms"))
        found = seconds or milliseconds
        return found.value if found else None

    def recompute(self, assumed: dict[str, Any]) -> tuple[int, str]:
        """(factor, recomputation) of --factor and --recompute, which must not contradict each other."""
        kind, factor = self.options.get("recompute"), self.options.get("factor")
        if kind is not None and kind not in FACTORS:
            self.problems.append(Problem(self.where("recompute"), f"must be one of {', '.join(FACTORS)}", _meant(kind)))
        if factor is not None and factor not in ("3", "4"):
            self.problems.append(Problem(self.where("factor"), "must be 4 with full recomputation, else 3", "use --factor 3 or --factor 4"))
        if kind in FACTORS and factor in ("3", "4") and FACTORS[kind] != int(factor):
            rule = f"contradicts {self.where('factor')}, which counts {_FACTOR_MEANS[int(factor)]}"
            self.problems.append(Problem(self.where("recompute"), rule, "leave one out"))
        if kind in FACTORS:
            return FACTORS[kind], kind
        if factor in ("3", "4"):
            return int(factor), "full" if factor == "4" else "none"
        if kind is None and factor is None:
            assumed["factor"] = 4
        return 4, "full"


_EXAMPLES = {
    "ms": "52", "sec": "127", "time_ms": "127000", "ng": "64", "nodes": "16", "gpus_per_node": "4", "gas": "256", "peak": "125",
    "gpu_memory": "32", "gpus": "64", "mp": "8",
}  # fmt: skip


def _meant(kind: str) -> str | None:
    from megactl.config.names import nearest

    close = nearest(kind, FACTORS)
    return f"did you mean {close}?" if close else None


def read_values(reader: Reader, request: Request | None) -> Values:
    """All values, from the options and the settings (None where these are wrong already). Raises ConfigError holding every mistake."""
    assumed: dict[str, Any] = {}
    derived: dict[str, str] = {}
    warnings: list[str] = []
    size, seconds = reader.billions(), reader.seconds()
    factor, recompute = reader.recompute(assumed)
    own_gpus, nodes, per_node, steps = (reader.count(name) for name in ("ng", "nodes", "gpus_per_node", "gas"))
    if request is None:
        raise ConfigError(reader.problems)
    gpus = _gpus(reader, request, (own_gpus, nodes, per_node), assumed, derived)
    batch = _global_batch(reader, request, gpus, steps, derived)
    billions = _billions(reader, request, size, derived, warnings)
    if not request.is_set("training.seq_length"):
        assumed["seq"] = ASSUMED_SEQ
    if reader.problems:
        raise ConfigError(reader.problems)
    assert billions is not None and seconds is not None and batch is not None, "a value is missing without a problem"
    order = {name: assumed[name] for name in ("ng", "seq", "factor") if name in assumed}
    return Values(billions, seconds, gpus, batch, request.seq_length, factor, recompute, order, derived, warnings)


def _model_parallel(request: Request) -> tuple[int, str] | None:
    """(tp x pp, how it was given), or None where neither was."""
    degrees = {flag: request.given(f"parallel.{name}_parallel") for flag, name in (("--tp", "tensor"), ("--pp", "pipeline"))}
    given = {flag: degree for flag, degree in degrees.items() if degree is not None}
    product = 1
    for degree in given.values():
        product *= degree
    return (product, " ".join(f"{flag} {degree}" for flag, degree in given.items())) if given else None


def _gpus(
    reader: Reader, request: Request, given: tuple[int | None, int | None, int | None], assumed: dict[str, Any], derived: dict[str, str]
) -> int:
    own, nodes, per_node = given
    parallel, dp = _model_parallel(request), request.given("parallel.data_parallel")
    if (nodes is None) != (per_node is None) and not _wrong(reader, "nodes", "gpus_per_node"):
        there, missing = ("nodes", "--gpus-per-node") if per_node is None else ("gpus_per_node", "--nodes")
        reader.problems.append(Problem(reader.where(there), f"says nothing of the GPUs without {missing}", f"give {missing} too"))
    ways = {}
    if own is not None:
        ways[reader.where("ng")] = own
    if nodes and per_node:
        ways[f"{reader.where('nodes')} x {reader.where('gpus_per_node')}"] = nodes * per_node
    if parallel and dp:
        ways[f"{parallel[1]} --dp {dp}"] = parallel[0] * dp
    if not ways:
        gpus = assumed["ng"] = ASSUMED_GPUS
        where = f"--ng {gpus} (assumed)"
    else:
        where, gpus = next(iter(ways.items()))
        for other, count in list(ways.items())[1:]:
            if count != gpus:
                reader.problems.append(Problem(where, f"contradicts {other}, which are {count} GPUs", "leave one out"))
        if own is None:
            derived["ng"] = where
    share, named = (parallel[0], parallel[1]) if parallel else (dp or 1, f"--dp {dp}")
    if not (parallel and dp) and gpus % share:
        reader.problems.append(Problem(where, f"must be a multiple of {named} = {share}", f"use --ng {-(-gpus // share) * share}"))
    return gpus


def _wrong(reader: Reader, *names: str) -> bool:
    """Whether one of these options was given and is a mistake already."""
    return any(
        reader.options.get(name) is not None and f"{problem}".startswith(reader.where(name))
        for name in names
        for problem in reader.problems
    )


def _global_batch(reader: Reader, request: Request, gpus: int, steps: int | None, derived: dict[str, str]) -> int | None:
    whole, micro = request.given("training.global_batch_size"), request.given("training.micro_batch_size")
    dp, parallel = request.given("parallel.data_parallel"), _model_parallel(request)
    dp_text = f"--dp {dp}"
    if dp is None and parallel and gpus % parallel[0] == 0:
        dp = gpus // parallel[0]
        dp_text = f"dp {dp} (GPUs / {parallel[1]})"
    parts = {f"--mbs {micro}": micro, dp_text: dp, f"--gas {steps}": steps}
    known = {text: number for text, number in parts.items() if number is not None}
    product = 1
    for number in known.values():
        product *= number
    text = " x ".join(known)
    if whole is not None:
        reader.problems += _batch_contradiction(whole, product, text, complete=len(known) == 3, known=micro is not None)
        return whole
    if len(known) == 3:
        derived["gbs"] = text
        return product
    missing = [flag for flag, number in (("--mbs", micro), ("--dp", dp), ("--gas", steps)) if number is None]
    if not _wrong(reader, "gas"):
        rule = "is not set"
        if micro is not None or steps is not None:
            rule += f", and {text} leaves {' and '.join(missing)} open"
        reader.problems.append(Problem("--gbs", rule, "give --gbs, or all of --mbs --dp --gas (--gas 1 without accumulation)"))
    return None


def _batch_contradiction(whole: int, product: int, text: str, *, complete: bool, known: bool) -> Iterator[Problem]:
    if complete and whole != product:
        yield Problem(f"--gbs {whole}", f"contradicts {text} = {product}", "leave one out")
    elif known and whole % product:
        yield Problem(f"--gbs {whole}", f"must be a multiple of {text} = {product}", f"use --gbs {-(-whole // product) * product}")


def _billions(reader: Reader, request: Request, size: Quantity | None, derived: dict[str, str], warnings: list[str]) -> float | None:
    if not request.named:
        if size is None and reader.options.get("ms") is None:
            instead = "give billions of parameters, such as --ms 52, or --preset NAME, or --layers --hidden --vocab"
            reader.problems.append(Problem("--ms", "is not set", instead))
        return size.value if size else None
    from megactl.costmodel.parameters import total_parameters

    count = total_parameters(request.model, seq_length=request.seq_length)
    if size is None:
        derived["ms"] = "the parameters of the architecture"
        return count / 1e9
    apart = (size.value - count / 1e9) / (count / 1e9)
    if abs(size.value - count / 1e9) <= size.half_unit:
        return size.value
    if abs(size.value - count / 2**30) <= size.half_unit:
        warnings.append(
            f"{reader.where('ms')} is the architecture's {count / 1e9:.2f}e9 parameters divided by 2^30, an old mistake of the scripts; "
            f"the figures by --ms read 7 % low"
        )
    elif abs(apart) > _SAME_SIZE:
        rule = f"is not the architecture's {count / 1e9:.4g} billion parameters"
        reader.problems.append(Problem(reader.where("ms"), rule, "leave it out, or correct the architecture"))
    else:
        warnings.append(f"{reader.where('ms')} is {apart:+.1%} from the architecture's {count / 1e9:.4g} billion parameters")
    return size.value
