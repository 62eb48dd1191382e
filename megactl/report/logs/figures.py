"""Pictures of several runs: their loss and speed by iteration, or one figure of the SC21 paper out of runs of its experiment."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megactl.errors import MegactlError
from megactl.report.drawing import blank_figure, plain_axes, save_figure
from megactl.report.logs.layout import switch
from megactl.report.logs.rows import Row
from megactl.report.logs.run_folder import named_after

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megactl.report.curves import Curve

_POINTS = 2000
_SHOWN = 16
"""Names a legend can hold; further runs are drawn without one."""


@dataclass(frozen=True)
class Experiment:
    """What an experiment of SC21 (Narayanan et al. 2021, arXiv:2104.04473) varies: `x` and `series` are keys of a row or functions of one.

    A tuple of keys in `x` is a degree shared out between them: it is drawn as names, not as numbers. `y` is "tflops" or "sequences".
    """

    title: str
    x: tuple[str, ...]
    x_label: str
    series: str | Callable[[Row], Any] | None = None
    series_label: str = ""
    y: str = "tflops"


def _interleaved(row: Row) -> str:
    return "interleaved" if (row.values["vpp"] or 1) > 1 else "not interleaved"


def _scatter_gather(row: Row) -> str:
    stated = switch(row.source.arguments, "scatter_gather_tensors_in_pipeline", "scatter_gather")
    return {True: "scatter-gather", False: "without"}.get(_by_name(row, "scatter-gather") if stated is None else stated, "not stated")


def _recompute(row: Row) -> str:
    named = {True: "full", False: "none"}.get(_by_name(row, "recompute"), "not stated")
    return f"recompute {row.values['recompute'] or named}"


def _by_name(row: Row, part: str) -> bool | None:
    """Whether the file's name carries `part`, or `no-` and `part`, as the scripts of the experiments do; None where it has neither."""
    name = named_after(row.source.file)
    return None if part not in name else f"no-{part}" not in name


EXPERIMENTS: dict[str, Experiment] = {
    "table_1": Experiment("Weak scaling of GPT", ("model_b",), "parameters (10$^9$)"),
    "figure_11": Experiment("Weak scaling of pipeline parallelism", ("pp",), "pipeline stages", "gbs", "global batch"),
    "figure_12": Experiment("Interleaved schedule", ("gbs",), "global batch (sequences)", _interleaved),
    "figure_13": Experiment("Tensor and pipeline parallelism", ("pp", "tp"), "(pipeline, tensor) parallel size", "gbs", "global batch"),
    "figure_14": Experiment("Data and pipeline parallelism", ("pp", "dp"), "(pipeline, data) parallel size", "gbs", "global batch"),
    "figure_15": Experiment("Data and tensor parallelism", ("tp", "dp"), "(tensor, data) parallel size", "gbs", "global batch"),
    "figure_16": Experiment("Micro-batch size", ("mbs",), "micro-batch (sequences)", "gbs", "global batch"),
    "figure_17": Experiment("Activation recomputation", ("gbs",), "global batch (sequences)", _recompute, y="sequences"),
    "figure_18": Experiment("Scatter-gather between pipeline stages", ("gbs",), "global batch (sequences)", _scatter_gather),
}


def write_curves(rows: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Loss and seconds an iteration of the runs into `path` (.png, .svg or .pdf), the name of each run from `names`."""
    panels = [("loss", "loss (nats per token)"), ("seconds", "seconds an iteration")]
    drawn = [(column, label) for column, label in panels if any(_has(row, column) for row in rows)]
    if not drawn:
        raise MegactlError(f"{path}: nothing to draw: no run has an iteration with a loss or a time", "leave --plot out")
    # A colour for each run that is drawn at all, the same in both panels.
    shown = [(row, name) for row, name in zip(rows, names, strict=True) if any(_has(row, column) for column, _ in drawn)]
    figure = blank_figure((9, 3.4 * len(drawn) + 0.25 * min(len(shown), _SHOWN)), path)
    all_axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (column, label) in zip(all_axes, drawn, strict=True):
        for place, (row, name) in enumerate(shown):
            if _has(row, column):
                _draw_run(axes, row, name, column, f"C{place % 10}")
        _dress_curves(axes, [row for row, _ in shown], column)
        axes.set_ylabel(label)
    all_axes[-1].set_xlabel("iteration")
    figure.align_ylabels(all_axes)
    handles = {label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(shown) == 1:
        all_axes[0].set_title(shown[0][1], fontsize=10)
    else:
        listed = [name for _, name in shown if name in handles][:_SHOWN]
        wide = len(listed) > 4 and max(map(len, listed)) <= 40
        figure.legend([handles[name] for name in listed], listed, loc="outside lower center", ncols=2 if wide else 1, frameon=False)
    save_figure(figure, path)


def _has(row: Row, column: str) -> bool:
    return any(math.isfinite(value) for value in getattr(row.source.iterations, column))


def _draw_run(axes: Axes, row: Row, name: str, column: str, colour: str) -> None:
    from megactl.report.curves import default_window, smoothed, thinned

    raw = _curve(row, column)
    # Only a loss has a trend under its noise; a mean of times would hide the slow iterations that one looks for.
    window = default_window(len(raw.x)) if column == "loss" else 1
    curve = thinned(smoothed(raw, window), _POINTS)
    if window > 1:
        shadow = thinned(raw, _POINTS)
        axes.plot(shadow.x, shadow.y, color=colour, linewidth=0.6, alpha=0.25)
    style = {"marker": "o", "markersize": 3.5} if len(curve.x) < 40 else {}
    axes.plot(curve.x, curve.y, color=colour, linewidth=1.5, label=name, **style)


def _curve(row: Row, column: str) -> Curve:
    import numpy as np

    from megactl.report.curves import Curve

    columns = row.source.iterations
    return Curve(column, np.array(columns.iteration, dtype=float), np.array(getattr(columns, column), dtype=float))


def _dress_curves(axes: Axes, rows: Sequence[Row], column: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    from megactl.report.curves import bounds

    low, high = bounds([_curve(row, column) for row in rows if _has(row, column)])
    if low > 0 and high / low > 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    plain_axes(axes)


def write_experiment(rows: Sequence[Row], name: str, path: Path) -> None:
    """The figure of experiment `name` (a key of EXPERIMENTS) out of its runs: speed of a GPU, or sequences a second, by what was varied."""
    experiment = EXPERIMENTS[name]
    exact = experiment.y == "tflops" and all(_exact(row) for row in rows if row.values["tflops_per_gpu"])
    points = [(_x(row, experiment), _series(row, experiment), _y(row, experiment, exact)) for row in rows]
    known = [(x, series, y) for x, series, y in points if x is not None and y is not None]
    if not known:
        raise MegactlError(f"{path}: nothing to draw: no run of {name} has {experiment.x_label} and a speed", "look at --columns layout")
    figure = blank_figure((7.5, 4.8), path)
    axes = figure.add_subplot()
    ticks = sorted({x for x, _, _ in known})
    named = len(experiment.x) > 1
    for index, series in enumerate(sorted({series for _, series, _ in known}, key=lambda value: (str(type(value)), value))):
        mine = sorted((ticks.index(x) if named else x[0], y) for x, other, y in known if other == series)
        places = sorted({place for place, _ in mine})
        means = [math.fsum(y for place, y in mine if place == at) / sum(place == at for place, _ in mine) for at in places]
        label = f"{experiment.series_label} {series}".strip() if series is not None else None
        axes.plot(places, means, color=f"C{index}", linewidth=1.6, label=label)
        axes.plot(*zip(*mine, strict=True), "o", color=f"C{index}", markersize=5)
    _dress(axes, experiment, exact, ticks, named=named)
    axes.set_title(f"{experiment.title} ({name.replace('_', ' ')} of SC21)", fontsize=11)
    save_figure(figure, path)


def _dress(axes: Axes, experiment: Experiment, exact: bool, ticks: list[tuple[float, ...]], *, named: bool) -> None:
    kind = "hardware TFLOP/s, exact" if exact else "TFLOP/s, 8 x parameters x tokens"
    axes.set(xlabel=experiment.x_label, ylabel="sequences a second" if experiment.y == "sequences" else f"speed of one GPU ({kind})")
    if named:
        axes.set_xticks(range(len(ticks)), [f"({', '.join(f'{value:g}' for value in tick)})" for tick in ticks])
    else:
        values = [tick[0] for tick in ticks]
        if max(values) / min(values) > 8:
            axes.set_xscale("log", base=10 if experiment.x == ("model_b",) else 2)
        axes.set_xticks(values, [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values])
        axes.minorticks_off()
    axes.set_ylim(bottom=0)
    plain_axes(axes)
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False)


def _x(row: Row, experiment: Experiment) -> tuple[float, ...] | None:
    values = tuple(row.values[key] for key in experiment.x)
    return None if None in values else values


def _series(row: Row, experiment: Experiment) -> Any:
    if experiment.series is None or isinstance(experiment.series, str):
        value = row.values[experiment.series] if experiment.series else None
        return "not stated" if experiment.series and value is None else value
    return experiment.series(row)


def _exact(row: Row) -> float | None:
    return row.values["exact"]["hfu_tflops"] if row.values["exact"] else None


def _y(row: Row, experiment: Experiment, exact: bool) -> float | None:
    if experiment.y == "sequences":
        return row.values["gbs"] / row.speed.mean if row.values["gbs"] and row.speed.mean else None
    return _exact(row) if exact else row.values["tflops_per_gpu"]
