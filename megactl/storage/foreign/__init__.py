"""Readers of files that other programs wrote and nobody vouches for: torch.save in both its formats, pickles, safetensors. They give the
sizes and names inside, import and call nothing, and bound their time and memory. See docs/checkpoints.md."""

from megactl.storage.foreign.contents import Contents, Tensor
from megactl.storage.foreign.opened import OpenFile
from megactl.storage.foreign.pickle_machine import Limits
from megactl.storage.foreign.safetensors_file import read_safetensors
from megactl.storage.foreign.torch_file import read_pickle, read_torch_file

__all__ = ["Contents", "Limits", "OpenFile", "Tensor", "read_pickle", "read_safetensors", "read_torch_file"]
