"""`megactl report`: a page with the curves and facts of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PLOT_FILE = "loss.png"


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory of a training run, finished or not.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="The page (default: RUN_DIR/report.html).")] = None,
    smooth: Annotated[int | None, typer.Option("--smooth", min=1, metavar="N", help="Mean over N points (default: a fiftieth).")] = None,
    log: Annotated[bool, typer.Option("--log", help="Logarithmic loss axis.")] = False,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Also write loss.png beside the page (needs matplotlib).")] = True,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a page with plots of a run: report.html (one self-contained file) and loss.png.

    Works on a run that is still going, was killed or lost files; the page then says what is missing.

    Examples:

      megactl report runs/gpt-345m-20261121-101112

      megactl report runs/a --output a.html --log --smooth 20

      megactl report runs/a --json | jq .summary.final_loss
    """
    import json

    from megactl.report.page import render_page
    from megactl.report.plot import write_loss_plot
    from megactl.report.run_data import read_run

    data = read_run(run_dir)
    page = output or run_dir / "report.html"
    _write(page, render_page(data, window=smooth, log=log))
    picture = page.with_name(PLOT_FILE) if plot else None
    if picture is not None:
        write_loss_plot(data, picture, window=smooth, log=log)
    if json_:
        document = {
            "run_dir": str(run_dir),
            "report": str(page),
            "plot": str(picture) if picture else None,
            "summary": data.summary,
            "iterations_recorded": len(data.records.steps),
            "evaluations": [{"iteration": point["iteration"], "loss": point.get("loss")} for point in data.records.evaluations],
            "missing": data.missing,
        }
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    for sentence in data.missing:
        typer.echo(f"note: {sentence}", err=True)
    typer.echo(str(page))
    if picture is not None:
        typer.echo(str(picture))


def _write(path: Path, text: str) -> None:
    from megactl.errors import MegactlError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MegactlError(f"{path}: cannot be written: {error.strerror}", "choose another place with --output FILE") from error
