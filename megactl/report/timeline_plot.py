"""A timeline as a picture: one row a rank, one box a computation, with its micro-batch in it where that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megactl.report.drawing import blank_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue, orange, green and purple as Okabe and Ito chose them for the colour-blind; each from the first chunk's tint to the last one's.
# W is hatched as well, for print.
COLOURS = {"F": ("#bfe3f8", "#3d97d1"), "I": ("#ffd98a", "#de9200"), "B": ("#8fd6bd", "#00795a"), "W": ("#f0c6dc", "#b85c94")}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_HATCHED = {"W": "//"}
_LEAST_POINTS, _MOST_POINTS, _WIDTH_OF_DIGIT = 4.0, 8.0, 0.62
# A vector file of more boxes than this is too large to open.
_MOST_VECTORS = 20_000


class Box(NamedTuple):
    """One computation: `kind` is one of COLOURS, `chunk` the place of its stage on the rank, `label` what stands in it."""

    kind: str
    chunk: int
    label: str
    start: float
    end: float


def write_timeline(rows: Sequence[Sequence[Box]], path: Path, *, title: str) -> None:
    """Draw rows of boxes (rank 0 on top) into `path`, whose ending says the format.

    Later chunks of a rank are darker. Raises MegactlError without matplotlib, or where the file cannot be written.
    """
    boxes = [box for row in rows for box in row]
    length = max((box.end for box in boxes), default=1.0)
    shortest = min((box.end - box.start for box in boxes), default=1.0)
    width, height = min(max(length / shortest * 0.2, 7.0), 22.0), min(max(len(rows) * 0.34, 0.7), 18.0)
    figure = blank_figure((width, height + 1.3), path)
    axes = figure.add_subplot()
    chunks = 1 + max((box.chunk for box in boxes), default=0)
    _draw_boxes(axes, rows, chunks)
    _draw_labels(axes, rows, points=(0.92 * width * 72 / length, 0.8 * height * 72 / max(len(rows), 1)), chunks=chunks)
    axes.set(xlim=(0, length), ylim=(len(rows) - 0.5, -0.5), ylabel="pipeline rank")
    axes.set_xlabel("time", loc="left")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_yticks(range(0, len(rows), max(1, len(rows) // 32)))
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _legend(axes, [kind for kind in COLOURS if any(box.kind == kind for box in boxes)], chunks)
    save_figure(figure, path)


def shade(kind: str, chunk: int, chunks: int) -> tuple[float, float, float]:
    """The colour of a kind on a chunk, red, green and blue from 0 to 1; between the two of COLOURS where there is one chunk."""
    light, dark = ([int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)] for colour in COLOURS[kind])
    share = chunk / (chunks - 1) if chunks > 1 else 0.4
    red, green, blue = (start + share * (end - start) for start, end in zip(light, dark, strict=True))
    return red, green, blue


def _draw_boxes(axes: Axes, rows: Sequence[Sequence[Box]], chunks: int) -> None:
    many = sum(len(row) for row in rows) > _MOST_VECTORS
    for index, row in enumerate(rows):
        for kind in COLOURS:
            for chunk in range(chunks):
                spans = [(box.start, box.end - box.start) for box in row if (box.kind, box.chunk) == (kind, chunk)]
                if spans:
                    axes.broken_barh(
                        spans, (index - 0.4, 0.8), facecolors=shade(kind, chunk, chunks), edgecolors="white",
                        linewidth=0.0 if many else 0.6, hatch=None if many else _HATCHED.get(kind), rasterized=many,
                    )  # fmt: skip


def _draw_labels(axes: Axes, rows: Sequence[Sequence[Box]], *, points: tuple[float, float], chunks: int) -> None:
    """Labels in one size, that of the narrowest box; none at all where that is too small to read. `points`: of a unit of time, of a row."""
    boxes = [box for row in rows for box in row if box.end > box.start]
    room = min(((box.end - box.start) * points[0] / (_WIDTH_OF_DIGIT * max(len(box.label), 1) + 0.3) for box in boxes), default=0.0)
    size = min(room, points[1] * 0.75, _MOST_POINTS)
    if size < _LEAST_POINTS:
        return
    for index, row in enumerate(rows):
        for box in row:
            colour = shade(box.kind, box.chunk, chunks)
            dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.45
            # A digit on a hatch cannot be read.
            behind = {"boxstyle": "square,pad=0.12", "facecolor": colour, "edgecolor": "none"} if box.kind in _HATCHED else None
            middle = (box.start + box.end) / 2
            axes.text(
                middle, index, box.label, ha="center", va="center_baseline", fontsize=size, color="white" if dark else "black", bbox=behind
            )


def _legend(axes: Axes, kinds: Sequence[str], chunks: int) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=shade(kind, 0, 1), edgecolor="white", hatch=_HATCHED.get(kind), label=f"{kind} {NAMES[kind]}") for kind in kinds
    ]
    if chunks > 1:
        handles.append(Patch(facecolor="none", edgecolor="none", label=f"darker: chunk {'1' if chunks == 2 else f'1 to {chunks - 1}'}"))
    axes.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(1.0, -0.02), ncols=len(handles), frameon=False, fontsize=8, borderaxespad=1.8
    )
