"""How `megactl parse-logs --diff` shows two runs: their spreads, the verdict, the arguments in which they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megactl.commands.common import columns as aligned
from megactl.commands.common import printable
from megactl.commands.parse_logs_view import cell, json_text, names_of, seconds_text
from megactl.report.logs.compare import Comparison, Difference
from megactl.report.logs.rows import Row

_WORK = {"gbs": "global batch", "seq": "sequence length", "model_b": "parameters (10^9)"}


def _different_work(a: Row, b: Row) -> dict[str, list[Any]]:
    """What of an iteration's work both state, and state differently."""
    pairs = {key: [a.values[key], b.values[key]] for key in _WORK}
    return {key: pair for key, pair in pairs.items() if None not in pair and not math.isclose(*pair, rel_tol=0.005)}


def comparison_json(a: Row, b: Row, result: Comparison, arguments: Sequence[Difference]) -> str:
    """`--diff` as JSON."""
    sides = {}
    for side, row, spread in (("a", a, result.a), ("b", b, result.b)):
        sides[side] = {"file": row.source.file, "run": row.source.run, "tflops_per_gpu": row.values["tflops_per_gpu"], **vars(spread)}
    figures = {name: getattr(result, name) for name in ("change", "change_low", "change_high", "p")}
    more = {"different_work": _different_work(a, b), "arguments": [vars(item) for item in arguments]}
    return json_text({"verdict": result.verdict, **figures, **sides, **more})


def comparison_text(a: Row, b: Row, result: Comparison, arguments: Sequence[Difference]) -> str:
    """`--diff` for people."""
    names = names_of([a, b])
    table = [("", "steady lines", "median s", "10 % to 90 % of them", "TFLOPs")]
    for letter, name, row, side in zip("AB", names, (a, b), (result.a, result.b), strict=True):
        spread = f"{seconds_text(side.low)} to {seconds_text(side.high)} s" if side.low is not None and side.high is not None else "-"
        tflops = cell("tflops_per_gpu", row.values["tflops_per_gpu"]) or "-"
        table.append((f"{letter}  {name}", str(side.iterations), seconds_text(side.median) if side.median else "-", spread, tflops))
    lines = [*aligned(table), "", _verdict(result)]
    work = [f"{_WORK[key]} {one:.4g} and {other:.4g}" for key, (one, other) in _different_work(a, b).items()]
    if work:
        lines.append(f"An iteration is not the same work: {', '.join(work)}. Compare TFLOPs, not seconds.")
    return "".join(f"{printable(line)}\n" for line in [*lines, "", *_argument_lines(a, b, arguments)])


def _argument_lines(a: Row, b: Row, arguments: Sequence[Difference]) -> list[str]:
    """What both state in different values; of what one alone states only the number, since DeepSpeed prints all of its defaults."""
    if not (a.source.arguments and b.source.arguments):
        return ["At least one of the two logs states no arguments, so they are not compared."]
    both = [(item.name, item.a[:60], item.b[:60]) for item in arguments if item.a is not None and item.b is not None]
    lines = [f"{len(both)} arguments differ:", *aligned([("", "A", "B"), *both], indent="  ")] if both else ["No argument differs."]
    alone = {"A": sum(item.b is None for item in arguments), "B": sum(item.a is None for item in arguments)}
    return [*lines, *(f"{side} alone states {number} more (--json lists them)." for side, number in alone.items() if number)]


def _verdict(result: Comparison) -> str:
    if result.change is None:
        return "Nothing to compare: one of the two has no steady iterations."
    by = f"B's median takes {abs(result.change):.1%} {'less' if result.change < 0 else 'more'}"
    if result.change > 1:
        by = f"B's median takes {1 + result.change:.3g} times as long"
    if result.verdict == "too few iterations":
        return f"Too few iterations to tell: {by}, but at least 5 steady ones a side are needed."
    interval = f"99 % interval of the means {result.change_low:+.1%} to {result.change_high:+.1%}, Mann-Whitney p = {result.p:.2g}"
    if result.verdict == "within noise":
        return f"Within noise: {by} ({interval}), and the spreads overlap."
    caution = "One run a side: the same job can differ by more between allocations."
    return f"{result.verdict}: {by} ({interval}), and the spreads are apart. {caution}"
