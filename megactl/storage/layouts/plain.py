"""Files of torch.save, pickles and safetensors that belong to no system, alone or in a folder."""

from __future__ import annotations

from pathlib import Path

from megactl.errors import CheckpointError
from megactl.storage.foreign import Contents, Limits, OpenFile, read_torch_file
from megactl.storage.layouts import facts
from megactl.storage.layouts.folder import TORCH_SUFFIXES, Folder, add_files, guess, read_contents, rest
from megactl.storage.layouts.inventory import PROBLEM, FileRow, Inventory


class PlainFolder:
    """Torch and safetensors files under any names."""

    system = "files"
    title = "folder of torch or safetensors files"

    def matches(self, folder: Folder) -> bool:
        """Any file of a known kind, directly in the folder."""
        return any("/" not in name and (Path(name).suffix in TORCH_SUFFIXES or name.endswith(".safetensors")) for name in folder.sizes)

    def inspect(self, folder: Folder) -> Inventory:
        """Every file by itself."""
        inventory = Inventory(folder.path, self.system, self.title)
        add_files(inventory, folder, rest(folder, []))
        return inventory


def inspect_file(path: Path, limits: Limits) -> Inventory:
    """One file, whatever its name says: safetensors by its ending, everything else as torch's or a pickle."""
    inventory = Inventory(path, "file", "single file")
    row = FileRow(path.name, "file", 0)
    try:
        with OpenFile(path) as file:
            row.size = file.size
        contents = read_contents(path, limits) or _as_torch(path, limits)
    except CheckpointError as error:
        inventory.add_unread(row)
        inventory.say(PROBLEM, path.name, error.message.removeprefix(f"{path}: "))
        return inventory
    inventory.title = f"single file ({contents.kind})"
    _take_facts(inventory, contents)
    inventory.add_contents(row, contents, guess(contents))
    return inventory


def _as_torch(path: Path, limits: Limits) -> Contents:
    with OpenFile(path) as file:
        return read_torch_file(file, limits)


def _take_facts(inventory: Inventory, contents: Contents) -> None:
    top = facts.mapping(contents.tree)
    for key in ("iteration", "global_step", "global_steps", "step"):
        if inventory.iteration is None:
            inventory.iteration = facts.whole(top.get(key))
    inventory.architecture, inventory.unpredictable = facts.from_megatron(facts.arguments(contents.tree))
