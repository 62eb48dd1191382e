"""loss.png: the loss curve as a picture, drawn by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path

from megactl.errors import MegactlError
from megactl.report.page import loss_curves
from megactl.report.run_data import RunData


def write_loss_plot(data: RunData, path: Path, *, window: int | None = None, log: bool = False) -> None:
    """Draw the loss of `data` into `path` (PNG). Raises MegactlError without matplotlib, or if the file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        hint = 'pip install "megactl[plot]", or use --no-plot'
        raise MegactlError(f"{path.name} needs matplotlib, which is not installed", hint) from error
    raw, smooth, evaluations = loss_curves(data, window)
    # Not through pyplot: its registry of figures and its choice of a backend are global state.
    figure = Figure(figsize=(8, 4.5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if smooth is not raw:
        axes.plot(raw.x, raw.y, color="#a9cbe6", linewidth=0.8, label=raw.label)
    axes.plot(smooth.x, smooth.y, color="#1f6fb2", linewidth=1.8, label=smooth.label)
    if not evaluations.is_empty:
        axes.plot(evaluations.x, evaluations.y, "o", color="#d1495b", markersize=5, label="validation")
    if raw.is_empty and evaluations.is_empty:
        axes.text(0.5, 0.5, "no loss recorded", transform=axes.transAxes, ha="center", color="#67727e")
    if log:
        axes.set_yscale("log")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", title=data.run_dir.resolve().name)
    axes.grid(color="#e3e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise MegactlError(f"{path}: cannot be written: {error.strerror}", "choose another place with --output") from error
