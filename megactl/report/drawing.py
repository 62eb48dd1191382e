"""What all pictures share: figures without a display, plain axes, and a file that is there whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from megactl.errors import MegactlError
from megactl.storage import durable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg", ".pdf")


def blank_figure(inches: tuple[float, float], path: Path) -> Figure:
    """An empty figure of this size for the file `path`. Raises MegactlError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MegactlError(f"{path.name} needs matplotlib, which is not installed", 'pip install "megactl[plot]"') from error
    # Not through pyplot: its registry of figures and its choice of a backend are global state.
    return Figure(figsize=inches, dpi=144, layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure; the ending of `path` (one of ENDINGS) says the format. Raises MegactlError where it cannot be written."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower().lstrip("."))
    try:
        durable.write_output(path, content.getvalue())
    except OSError as error:
        raise MegactlError(f"{path}: cannot be written: {error.strerror}", "choose another place with --plot") from error


def plain_axes(axes: Axes) -> None:
    """A light grid behind the data, no frame above and to the right."""
    axes.grid(color="#e3e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
