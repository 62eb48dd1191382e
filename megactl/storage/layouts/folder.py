"""A checkpoint's folder: its files, read one at a time, so that one damaged file does not hide the others."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megactl.errors import CheckpointError
from megactl.storage.foreign import Contents, Limits, OpenFile, Tensor, read_pickle, read_safetensors, read_torch_file
from megactl.storage.foreign.opened import unreadable
from megactl.storage.layouts.inventory import OVERHEAD, PROBLEM, FileRow, Inventory
from megactl.storage.layouts.parts import of_state_dict

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".th", ".tar", ".opt", ".distcp"})
TEXT_SUFFIXES = frozenset(
    {".json", ".txt", ".md", ".yaml", ".yml", ".toml", ".py", ".model", ".jsonl", ".gitattributes", ".csv", ".sh", ".jinja"}
)
_TEXT_LIMIT = 16 * 1024 * 1024
_FILES = 2_000_000
_PICKLES = (".metadata",)

Classifier = Callable[[Contents], Callable[[Tensor], tuple[str, str]]]


def guess(contents: Contents) -> Callable[[Tensor], tuple[str, str]]:
    """The classifier of a file that no layout claims."""
    return of_state_dict(contents.tensors)


@dataclass(frozen=True)
class Planned:
    """A file of a layout: what it is for, the coordinates in its name, and how its tensors are told apart (None: it is not opened)."""

    name: str
    role: str
    rank: dict[str, int] = field(default_factory=dict)
    classify: Classifier | None = guess


class Folder:
    """The files under `path`, by their names relative to it (with "/"), and their sizes in bytes."""

    def __init__(self, path: Path, limits: Limits) -> None:
        """Raises CheckpointError where the folder cannot be listed, or holds more files than any checkpoint."""
        self.path, self.limits = path, limits
        self.sizes = dict(sorted(_listed(path)))
        self.folders = {name.rpartition("/")[0] for name in self.sizes}

    def matching(self, pattern: str) -> dict[str, re.Match[str]]:
        """Files whose whole name matches a regular expression, with the match."""
        expression = re.compile(pattern, re.ASCII)
        return {name: match for name in self.sizes if (match := expression.fullmatch(name))}

    def read(self, name: str) -> Contents | None:
        """The contents of a file, None for a kind that holds no tensors. Raises CheckpointError for damage."""
        return read_contents(self.path / name, self.limits)

    def text(self, name: str) -> str | None:
        """A small text file, None where it is absent or cannot be read."""
        try:
            with OpenFile(self.path / name) as file:
                return file.read(0, min(file.size, _TEXT_LIMIT)).decode("utf-8", "replace")
        except CheckpointError:
            return None


def _listed(root: Path) -> Iterable[tuple[str, int]]:
    count = 0
    for folder, folders, names in os.walk(root, onerror=_refused):
        folders.sort()
        for name in names:
            path = Path(folder, name)
            try:
                size = path.stat().st_size
            except OSError:
                # A link that leads nowhere; reading it names it.
                size = 0
            count += 1
            if count > _FILES:
                raise CheckpointError(f"{root}: holds more than {_FILES} files", "give the folder of one checkpoint")
            yield path.relative_to(root).as_posix(), size


def _refused(error: OSError) -> None:
    raise unreadable(Path(error.filename or "."), error)


def read_contents(path: Path, limits: Limits) -> Contents | None:
    """The contents of a file by its name's ending and its first bytes; None for one that is neither torch's nor safetensors."""
    if path.suffix == ".safetensors":
        with OpenFile(path) as file:
            return read_safetensors(file)
    if path.name in _PICKLES:
        with OpenFile(path) as file:
            return read_pickle(file, limits)
    if path.suffix in TORCH_SUFFIXES:
        with OpenFile(path) as file:
            return read_torch_file(file, limits)
    return None


def add_files(
    inventory: Inventory, folder: Folder, plan: Iterable[Planned], notice: Callable[[Planned, Contents], None] = lambda *_: None
) -> None:
    """Read the planned files into the inventory. `notice` sees each one's contents before they are let go."""
    for planned in plan:
        row = FileRow(planned.name, planned.role, folder.sizes[planned.name], planned.rank)
        if planned.classify is None:
            inventory.add_unread(row, OVERHEAD)
            continue
        try:
            contents = folder.read(planned.name)
        except CheckpointError as error:
            inventory.add_unread(row)
            inventory.say(PROBLEM, planned.name, error.message.removeprefix(f"{folder.path / planned.name}: "))
            continue
        if contents is None:
            inventory.add_unread(row, OVERHEAD if is_text(planned.name) else "unread")
            continue
        inventory.add_contents(row, contents, planned.classify(contents))
        notice(planned, contents)


def rest(folder: Folder, plan: Iterable[Planned]) -> list[Planned]:
    """The files that `plan` leaves out: read where they are of a known kind."""
    known = {planned.name for planned in plan}
    return [Planned(name, "other", {}, None if is_text(name) else guess) for name in folder.sizes if name not in known]


def is_text(name: str) -> bool:
    """Whether a name is that of a text file, or of a hidden one such as `.gitignore`, or has no ending at all."""
    return Path(name).suffix in TEXT_SUFFIXES or ("." not in Path(name).name.lstrip(".") and not name.endswith(_PICKLES))
