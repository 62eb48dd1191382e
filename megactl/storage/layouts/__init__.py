"""Checkpoints of megactl and of other systems, told apart and added up. One class a system; see docs/checkpoints.md."""

from megactl.storage.layouts.detect import inspect
from megactl.storage.layouts.inventory import PART_MEANING, FileRow, Finding, Inventory, ParameterRow

__all__ = ["PART_MEANING", "FileRow", "Finding", "Inventory", "ParameterRow", "inspect"]
