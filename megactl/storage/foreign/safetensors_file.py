"""Headers of safetensors files that others wrote: all of the format's types, and the text they carry."""

from __future__ import annotations

from typing import Any

from megactl.errors import CheckpointError
from megactl.storage.foreign.contents import Contents, Tensor
from megactl.storage.foreign.dtypes import SAFETENSORS
from megactl.storage.foreign.opened import OpenFile
from megactl.storage.strict_json import loads
from megactl.storage.tensor_file import HEADER_LIMIT, parse_header

_AGAIN = "the file was cut short or is no safetensors file; save or copy it again"


def read_safetensors(file: OpenFile) -> Contents:
    """The tensors of a safetensors file, from its header alone. Raises CheckpointError where header and size do not fit each other."""
    length = int.from_bytes(file.read(0, 8), "little") if file.size >= 8 else -1
    if not 0 < length <= min(HEADER_LIMIT, file.size - 8):
        raise CheckpointError(f"{file.path}: {file.size} bytes, a header of {length} does not fit", _AGAIN)
    text = file.read(8, length)
    widths = {name: width for name, (_, width) in SAFETENSORS.items()}
    slots = parse_header(text, file.size, str(file.path), widths=widths, least=0)
    contents = Contents("safetensors", file.size, metadata=_metadata(loads(text, str(file.path))))
    for key, slot in slots.items():
        dtype, width = SAFETENSORS[slot.dtype]
        contents.tensors.append(Tensor((key,), dtype, slot.shape, slot.nbytes // width, slot.nbytes, key, (0, slot.nbytes)))
        contents.storages[key] = slot.nbytes
    return contents


def _metadata(table: dict[str, Any]) -> dict[str, str]:
    found = table.get("__metadata__")
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
