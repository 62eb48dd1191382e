"""How a run gets onto a cluster: cluster settings, and the Slurm scripts made from them. No torch; no Slurm command is run here."""
