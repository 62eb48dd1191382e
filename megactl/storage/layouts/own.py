"""megactl's own checkpoints, by their manifest; see docs/checkpoint-format.md."""

from __future__ import annotations

from math import prod
from pathlib import Path

from megactl.errors import CheckpointError
from megactl.storage import manifest
from megactl.storage.layouts.folder import Folder
from megactl.storage.layouts.inventory import NOTE, OVERHEAD, PROBLEM, UNREAD, FileRow, Inventory
from megactl.storage.tensor_file import DTYPES

_KIND = {"weight": "weights", "master": "master"}


class Own:
    """`manifest.json` beside `rank-*.safetensors`."""

    system = "megactl"
    title = "megactl"

    def matches(self, folder: Folder) -> bool:
        """The manifest, or rank files that have lost it."""
        return manifest.FILE_NAME in folder.sizes or bool(folder.matching(r"rank-\d{5,9}\.safetensors"))

    def inspect(self, folder: Folder) -> Inventory:
        """Bytes from the manifest, files against it. Tensor data are not read: `megactl checkpoint verify` does that."""
        inventory = Inventory(folder.path, self.system, self.title)
        try:
            found = manifest.read(folder.path)
        except CheckpointError as error:
            inventory.say(PROBLEM, manifest.FILE_NAME, error.message.removeprefix(f"{folder.path / manifest.FILE_NAME}: "))
            for name, size in folder.sizes.items():
                inventory.add_unread(FileRow(name, "other", size))
            return inventory
        header = found.header
        inventory.iteration, inventory.layout = header.step, dict(header.layout)
        inventory.architecture = {f"model.{name}": value for name, value in header.model.items()} | {"training.precision": header.precision}
        self._count(inventory, folder, found)
        return inventory

    def _count(self, inventory: Inventory, folder: Folder, found: manifest.Manifest) -> None:
        for record in found.files:
            size = folder.sizes.get(record.file)
            if size is None:
                inventory.lacks([record.file], "named in the manifest")
                continue
            row = FileRow(
                record.file, "tensors", size, {"rank": int(Path(record.file).stem.removeprefix("rank-"))}, read=size == record.size
            )
            if row.read:
                self._tensors(inventory, row, found.by_file[record.file])
                inventory.files.append(row)
            else:
                inventory.add_unread(row)
                inventory.say(PROBLEM, record.file, f"{size} bytes, the manifest says {record.size}: the file was cut short or replaced")
        known = {record.file for record in found.files}
        for name, size in folder.sizes.items():
            if name == manifest.FILE_NAME:
                inventory.add_unread(FileRow(name, "manifest", size, read=True), OVERHEAD)
            elif name not in known:
                inventory.add_unread(FileRow(name, "other", size), UNREAD)
                inventory.say(NOTE, name, "is not part of the checkpoint")

    def _tensors(self, inventory: Inventory, row: FileRow, entries: list[manifest.Entry]) -> None:
        for entry in entries:
            elements = prod(entry.region.shape)
            nbytes = elements * DTYPES[entry.dtype][1]
            part = _KIND.get(entry.kind, entry.kind)
            row.parts[part] += nbytes
            inventory.add_parameter((part, entry.name), entry.dtype, entry.shape, elements, nbytes)
        row.parts[OVERHEAD] += row.size - row.parts.total()
