"""Pictures of `megactl bench recompute`: time and peak memory over the sequence length, a column for each model and layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megactl.errors import MegactlError
from megactl.report.drawing import blank_figure, plain_axes, save_figure
from megactl.report.published import STRATEGIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
_COLOURS = dict(zip(STRATEGIES, ("#000000", "#0072b2", "#e69f00", "#009e73", "#d55e00"), strict=True))
_PANELS = (("ms", "study_ms", "ms an iteration"), ("peak_mib", "study_mib", "peak memory (MiB)"))

Row = Mapping[str, Any]


def write_recompute_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of the document of `megactl bench recompute`. Solid: measured; dashed: the study, in the column of its setting.

    Raises MegactlError where there is nothing to draw, without matplotlib, or where the file cannot be written.
    """
    columns = list(dict.fromkeys((row["setting"], row["model"], row["tp"], row["pp"]) for row in rows))
    if not columns:
        raise MegactlError(f"{path}: nothing to draw: no row was measured", "leave --plot out")
    panels = [panel for panel in _PANELS if any(row[panel[0]] is not None for row in rows)]
    width = 4.2 * len(columns) + 1.5
    figure = blank_figure((width, 3.2 * len(panels)), path)
    grid = figure.subplots(len(panels), len(columns), squeeze=False)
    for place, (setting, model, tp, pp) in enumerate(columns):
        mine = [row for row in rows if (row["setting"], row["model"], row["tp"], row["pp"]) == (setting, model, tp, pp)]
        for axes, (own, theirs, label) in zip(grid[:, place], panels, strict=True):
            _draw(axes, mine, own, theirs if setting == "study" else None)
            axes.set_ylabel(label)
        grid[0, place].set_title(f"{model}, tp {tp}, pp {pp}, setting: {setting}", fontsize=10)
        grid[-1, place].set_xlabel("sequence length")
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    ncols = min(len(STRATEGIES), int(width / 1.9))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    save_figure(figure, path)


def _draw(axes: Axes, rows: Sequence[Row], own: str, theirs: str | None) -> None:
    for strategy, colour in _COLOURS.items():
        mine = sorted((row["seq_length"], row[own], row[theirs] if theirs else None) for row in rows if row["strategy"] == strategy)
        if not mine:
            continue
        axes.plot([x for x, *_ in mine], [y for _, y, _ in mine], "-o", color=colour, markersize=4, linewidth=1.5, label=strategy)
        published = [(x, value) for x, _, value in mine if value is not None]
        if published:
            axes.plot(*zip(*published, strict=True), "--", color=colour, linewidth=1.0, label=f"{strategy}, the study")
    axes.set_xticks(sorted({row["seq_length"] for row in rows}))
    axes.set_ylim(bottom=0)
    plain_axes(axes)
