"""`megactl slurm`: scripts for a Slurm cluster. The commands are in modules of their own, and only the one that was typed is imported."""

from __future__ import annotations

from megactl.commands.typer_app import Row

COMMANDS: dict[str, Row] = {
    "render": Row("megactl.commands.slurm_render:render", "Write a Slurm script that runs `megactl train` with these settings."),
    "experiments": Row("megactl.commands.slurm_experiments:list_experiments", "List the experiments of the SC21 paper, point by point."),
    "lint": Row("megactl.commands.slurm_lint:lint", "Find known traps in batch scripts, without running them."),
    "submit": Row("megactl.commands.slurm_submit:submit", "Submit batch scripts: first lint, then sbatch --test-only, then sbatch."),
}
