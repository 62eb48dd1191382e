"""`megactl slurm`: scripts for a Slurm cluster. The subcommands are in modules of their own."""

from __future__ import annotations

import typer

from megactl.commands.slurm_lint import lint
from megactl.commands.slurm_render import render
from megactl.commands.slurm_submit import submit

app = typer.Typer(help="Write Slurm scripts for a run, a sweep, or the SC21 experiments.", no_args_is_help=True)
app.command("render", **render.command_options)(render)
app.command("lint")(lint)
app.command("submit")(submit)


@app.callback()
def _root() -> None:
    """Typer makes a command of a lone function; this keeps `megactl slurm render` two words."""
