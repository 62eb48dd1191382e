"""What a checkpoint holds, added up: bytes by part, by file and by parameter, and what was found wrong on the way.

Every byte of every file is counted in exactly one part, so that the parts add up to what `du --apparent-size` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megactl.storage.foreign import Contents, Tensor

WEIGHTS, MASTER, RNG, OTHER = "weights", "master", "rng", "other"
OVERHEAD, UNUSED, UNREAD = "overhead", "unused", "unread"
PART_MEANING = {
    WEIGHTS: "parameters (and buffers) of the model",
    MASTER: "the optimizer's copy of the parameters in full precision",
    RNG: "states of random number generators",
    OTHER: "tensors and arrays of no other part",
    OVERHEAD: "headers, pickles, padding, text files",
    UNUSED: "bytes of storages that no tensor views",
    UNREAD: "files that could not be read, or are of no known kind",
}
"""Parts that are always called so. Every other part is a moment of the optimizer, under its own name (exp_avg, exp_avg_sq, ...)."""

PROBLEM, WARNING, NOTE = "problem", "warning", "note"

Placed = tuple[str, str]
"""(part, name of the parameter) of a tensor."""
Classify = Callable[[Tensor], Placed]


@dataclass(frozen=True)
class Finding:
    """Something to say about a checkpoint. A problem means that it is damaged, incomplete or unsafe; a warning that it looks odd."""

    severity: str
    where: str
    message: str


@dataclass
class FileRow:
    """One file: what it is for, the coordinates in its name (tp, pp, dp, layer, ...), bytes by part. `read`: it could be read."""

    name: str
    role: str
    size: int
    rank: dict[str, int] = field(default_factory=dict)
    parts: Counter[str] = field(default_factory=Counter)
    read: bool = False


@dataclass
class ParameterRow:
    """One tensor of one part, all its pieces together: elements and bytes over all files, the shape of a piece, in how many files."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    elements: int = 0
    nbytes: int = 0
    pieces: int = 0


@dataclass
class Inventory:
    """A checkpoint, inspected. `layout` has the degrees that names and contents give (tp, pp, dp, zero; absent where unknown).

    `architecture`: the settings of the model by megactl's names, where the checkpoint holds them, and `unpredictable`: why no
    prediction can be made from them.
    """

    path: Path
    system: str
    title: str
    layout: dict[str, Any] = field(default_factory=dict)
    iteration: int | None = None
    files: list[FileRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    rows: dict[tuple[str, str, str], ParameterRow] = field(default_factory=dict)
    architecture: dict[str, Any] | None = None
    unpredictable: str | None = None

    def say(self, severity: str, where: str, message: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(severity, where, message))

    def lacks(self, names: list[str], why: str) -> None:
        """Files that should be there and are not."""
        if names:
            self.missing += names
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            self.say(PROBLEM, "", f"{len(names)} missing ({why}): {shown}")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(row.size for row in self.files)

    @property
    def parts(self) -> Counter[str]:
        """Bytes by part; their sum is `size`."""
        return sum((row.parts for row in self.files), Counter())

    @property
    def elements(self) -> Counter[str]:
        """Elements by part, over all files."""
        found: Counter[str] = Counter()
        for row in self.rows.values():
            found[row.part] += row.elements
        return found

    @property
    def dtypes(self) -> dict[str, Counter[str]]:
        """Bytes by element type, for each part."""
        found: dict[str, Counter[str]] = {}
        for row in self.rows.values():
            found.setdefault(row.part, Counter())[row.dtype] += row.nbytes
        return found

    @property
    def good(self) -> bool:
        """Whether nothing was found that makes it damaged, incomplete or unsafe."""
        return not any(finding.severity == PROBLEM for finding in self.findings)

    def add_parameter(self, place: Placed, dtype: str, shape: tuple[int, ...], elements: int, nbytes: int) -> None:
        """Count a piece of a tensor."""
        part, name = place
        row = self.rows.setdefault((name, part, dtype), ParameterRow(name, part, dtype, shape))
        row.elements, row.nbytes, row.pieces = row.elements + elements, row.nbytes + nbytes, row.pieces + 1

    def add_contents(self, row: FileRow, contents: Contents, classify: Classify) -> None:
        """Count a file that was read, and pass on what was odd about it."""
        row.read, row.parts = True, count_parts(contents, classify, self.add_parameter)
        # A damaged file may claim more than it has.
        row.parts[OVERHEAD] += max(0, row.size - row.parts.total())
        self.files.append(row)
        for severity, messages in ((PROBLEM, contents.problems), (WARNING, contents.warnings), (NOTE, contents.notes)):
            for message in messages:
                self.say(severity, row.name, message)

    def add_unread(self, row: FileRow, part: str = UNREAD) -> None:
        """Count a file whose inside is not known, or of no interest."""
        row.parts = Counter({part: row.size})
        self.files.append(row)


def count_parts(contents: Contents, classify: Classify, add: Callable[..., None] = lambda *_: None) -> Counter[str]:
    """Bytes of one file by part. Tensors that view the same bytes share them: the first one counts, also for `add`; bytes of a storage
    that no tensor views are `unused`."""
    parts: Counter[str] = Counter()
    views: dict[str, list[tuple[Tensor, Placed]]] = {}
    for tensor in contents.tensors:
        place = classify(tensor)
        if tensor.storage in contents.storages:
            views.setdefault(tensor.storage, []).append((tensor, place))
        else:
            add(place, tensor.dtype, tensor.shape, 0, 0)
    for key, size in contents.storages.items():
        parts[UNUSED] += _share(size, views.get(key, []), parts, add)
    for path, nbytes in contents.arrays:
        parts[RNG if any("rng" in word for word in path) else OTHER] += nbytes
    return +parts


def _share(size: int, views: list[tuple[Tensor, Placed]], parts: Counter[str], add: Callable[..., None]) -> int:
    """Give a storage's bytes to its views, and return those that are left."""
    left = min(size, _covered(views))
    unused, seen = size - left, set()
    for tensor, place in views:
        again = (tensor.extent, tensor.shape) in seen
        seen.add((tensor.extent, tensor.shape))
        taken = 0 if again else min(left, tensor.nbytes)
        left -= taken
        parts[place[0]] += taken
        # A tied weight is one parameter under two names.
        add(place, tensor.dtype, tensor.shape, tensor.numel if taken else 0, taken)
    return unused


def _covered(views: list[tuple[Tensor, Placed]]) -> int:
    """Bytes that at least one view touches; a view with gaps (a slice of columns) touches no more than it has."""
    covered, end = 0, 0
    for first, last in sorted({tensor.extent for tensor, _ in views}):
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return min(covered, sum({(tensor.extent, tensor.shape): tensor.nbytes for tensor, _ in views}.values()))
