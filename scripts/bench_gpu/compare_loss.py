#!/usr/bin/env python3
"""Lays loss curves of the same model on the same data over each other, and says how far they are apart.

    PYTHONPATH=. python3 scripts/bench_gpu/compare_loss.py \\
        megactl=runs/a plain=plain.jsonl again=jitter.jsonl --noise plain again --output loss

Each NAME=PATH is a run directory, its metrics.jsonl, or the output of plain_loss.py; the first is what the others are compared with.
--noise A B names two that differ by rounding alone (the same run twice, or with plain_loss.py --jitter): their distance is the yardstick.
Writes OUTPUT.md (the tables) and OUTPUT.png (the curves, and below them the differences).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megactl.report.records import METRICS_FILE, read_records

WINDOWS = 6


@dataclass(frozen=True)
class Distance:
    """How far one curve is from another over their common iterations. `bias` is the mean of other - one."""

    iterations: int
    largest: float
    largest_at: int
    mean: float
    bias: float
    last_bias: float


def losses_of(path: Path, key: str) -> dict[int, float]:
    """Loss by iteration. Ends the program for a file without any."""
    records = read_records(path / METRICS_FILE if path.is_dir() else path)
    found = {step["iteration"]: step[key] for step in records.steps if isinstance(step.get(key), int | float)}
    if not found:
        raise SystemExit(f"compare_loss: {path} holds no {key}")
    return found


def distance(one: dict[int, float], other: dict[int, float]) -> Distance:
    """Of two curves. `last_bias` is the bias over the last quarter. Ends the program where they have no iteration in common."""
    common = sorted(one.keys() & other.keys())
    if not common:
        raise SystemExit("compare_loss: two of the curves have no iteration in common")
    differences = {iteration: other[iteration] - one[iteration] for iteration in common}
    worst = max(common, key=lambda iteration: abs(differences[iteration]))
    last = common[-max(1, len(common) // 4) :]
    return Distance(
        len(common), abs(differences[worst]), worst, statistics.fmean(abs(value) for value in differences.values()),
        statistics.fmean(differences.values()), statistics.fmean(differences[iteration] for iteration in last),
    )  # fmt: skip


def windows(curves: dict[str, dict[int, float]]) -> list[list[str]]:
    """Rows of mean losses over equal stretches of the common iterations: [stretch, a mean for each curve]."""
    common = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    length = max(1, math.ceil(len(common) / WINDOWS))
    rows = []
    for start in range(0, len(common), length):
        part = common[start : start + length]
        means = [statistics.fmean(curve[iteration] for iteration in part) for curve in curves.values()]
        rows.append([f"{part[0]} to {part[-1]}", *(f"{mean:.4f}" for mean in means)])
    return rows


def report(curves: dict[str, dict[int, float]], noise: tuple[str, str] | None, key: str) -> tuple[str, dict[str, object]]:
    """The tables as Markdown, and the figures for a program."""
    first, *others = curves
    yardstick = distance(curves[noise[0]], curves[noise[1]]) if noise else None
    distances = {name: distance(curves[first], curves[name]) for name in others}
    lines = [f"{key}, compared with {first}:", ""]
    lines += ["| curve | iterations | largest difference (at) | mean difference | signed mean | in the last quarter | mean / noise |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    shown = {**distances, **({f"noise: {noise[0]}, {noise[1]}": yardstick} if yardstick and noise else {})}
    for name, item in shown.items():
        units = f"{item.mean / yardstick.mean:.2f}" if yardstick and yardstick.mean else "-"
        lines.append(
            f"| {name} | {item.iterations} | {item.largest:.3g} ({item.largest_at}) | {item.mean:.3g} | {item.bias:+.3g} | "
            f"{item.last_bias:+.3g} | {units} |"
        )
    lines += ["", f"Mean {key}:", "", "| iterations | " + " | ".join(curves) + " |", "|---|" + "---:|" * len(curves)]
    lines += ["| " + " | ".join(row) + " |" for row in windows(curves)]
    figures = {"reference": first, "distances": {name: asdict(item) for name, item in distances.items()}}
    return "\n".join(lines) + "\n", {**figures, "noise": asdict(yardstick) if yardstick else None}


def draw(curves: dict[str, dict[int, float]], noise: tuple[str, str] | None, key: str, path: Path) -> None:
    """The curves above, the differences from the first below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    first = next(iter(curves))
    for name, curve in curves.items():
        above.plot(list(curve), list(curve.values()), linewidth=1.2, label=name)
    pairs = [(first, name) for name in curves if name != first] + ([noise] if noise else [])
    for one, other in pairs:
        common = sorted(curves[one].keys() & curves[other].keys())
        values = [curves[other][iteration] - curves[one][iteration] for iteration in common]
        style = {"color": "#999999", "linewidth": 0.8} if (one, other) == noise else {"linewidth": 1.0}
        below.plot(common, values, label=f"{other} - {one}" + (" (noise)" if (one, other) == noise else ""), **style)
    above.set(ylabel=f"{key} (nats)")
    below.set(xlabel="iteration", ylabel="difference")
    for axes in (above, below):
        axes.grid(color="#e3e7eb")
        axes.legend(frameon=False)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--noise", nargs=2, metavar=("A", "B"))
    parser.add_argument("--key", default="loss", help="loss, lm_loss or sentence_loss")
    parser.add_argument("--output", type=Path, required=True, help="path of the page and the picture, without a suffix")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    pairs = [text.partition("=") for text in arguments.curves]
    if len(pairs) < 2 or not all(name and path for name, _, path in pairs):
        parser.error("give two curves or more, each as NAME=PATH")
    curves = {name: losses_of(Path(path), arguments.key) for name, _, path in pairs}
    noise = tuple(arguments.noise) if arguments.noise else None
    if noise and not set(noise) <= set(curves):
        parser.error(f"--noise {' '.join(noise)}: name two of {', '.join(curves)}")
    text, figures = report(curves, noise, arguments.key)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_name(arguments.output.name + ".md").write_text(text)
    draw(curves, noise, arguments.key, arguments.output.with_name(arguments.output.name + ".png"))
    print(json.dumps(figures, indent=2) if arguments.json else text)


if __name__ == "__main__":
    main()
