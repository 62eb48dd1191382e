"""`megactl slurm`: scripts for a Slurm cluster. The subcommands are in modules of their own."""

from __future__ import annotations

import typer

from megactl.commands.slurm_experiments import list_experiments
from megactl.commands.slurm_render import render

app = typer.Typer(help="Write Slurm scripts for a run, a sweep, or the SC21 experiments.", no_args_is_help=True)
app.command("render", **render.command_options)(render)
app.command("experiments")(list_experiments)
