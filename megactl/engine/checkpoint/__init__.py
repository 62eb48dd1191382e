"""Checkpoints of a run: saved by all ranks at once, loaded at any layout. The format is described in docs/checkpoint-format.md."""

from megactl.engine.checkpoint.find import find
from megactl.engine.checkpoint.group import ProcessGroup, RankGroup, SingleProcess
from megactl.engine.checkpoint.load import load, load_full
from megactl.engine.checkpoint.piece import Piece
from megactl.engine.checkpoint.save import save
from megactl.storage.checkpoint_folder import sweep
from megactl.storage.manifest import Header

__all__ = ["Header", "Piece", "ProcessGroup", "RankGroup", "SingleProcess", "find", "load", "load_full", "save", "sweep"]
