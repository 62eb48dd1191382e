"""Starting the ranks of a run and ending them together: one child process a rank, one supervisor, one report of what failed."""

from megactl.engine.launch.context import RankContext
from megactl.engine.launch.rendezvous import connect_store
from megactl.engine.launch.runner import launch

__all__ = ["RankContext", "connect_store", "launch"]
