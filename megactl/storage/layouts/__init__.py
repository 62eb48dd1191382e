"""Checkpoints of megactl and of other systems, told apart and added up. One class a system; see docs/checkpoints.md."""

from megactl.storage.layouts.detect import inspect
from megactl.storage.layouts.inventory import PART_MEANING, FileRow, Finding, Inventory, ParameterRow
from megactl.storage.layouts.verification import FileCheck, Verification, verify

__all__ = ["PART_MEANING", "FileCheck", "FileRow", "Finding", "Inventory", "ParameterRow", "Verification", "inspect", "verify"]
