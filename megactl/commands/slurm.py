"""`megactl slurm`: scripts for a Slurm cluster. The subcommands are in modules of their own."""

from __future__ import annotations

import typer

from megactl.commands.slurm_experiments import list_experiments
from megactl.commands.slurm_lint import lint
from megactl.commands.slurm_render import render
from megactl.commands.slurm_submit import submit

app = typer.Typer(help="Write, check and submit Slurm scripts.", no_args_is_help=True)
app.command("render", **render.command_options)(render)
app.command("experiments")(list_experiments)
app.command("lint")(lint)
app.command("submit")(submit)
