"""What one file of a checkpoint holds: its tensors with their places in the tree, its storages, and what is odd about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megactl.errors import CheckpointError
from megactl.storage.foreign.nodes import ArrayRef, Mapping, Object, TensorRef

Path = tuple[str, ...]

_DEPTH = 200
_NODES = 20_000_000


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: where it hangs in the tree, type, shape, and which bytes of which storage it views (None: it has no data)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    numel: int
    nbytes: int
    storage: str | None
    extent: tuple[int, int]


@dataclass
class Contents:
    """One file, read. `storages` are bytes by key; `arrays` are numpy arrays, whose bytes lie inside the pickle (path, bytes).

    `problems` make the file unfit or unsafe, `warnings` and `notes` do not. `tree` is the value itself, for looking up facts such as the
    iteration (None for safetensors); `metadata` is the text that safetensors carry.
    """

    kind: str
    size: int
    tensors: list[Tensor] = field(default_factory=list)
    storages: dict[str, int] = field(default_factory=dict)
    arrays: list[tuple[Path, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tree: Any = None
    metadata: dict[str, str] = field(default_factory=dict)


def leaves(root: Any, where: str) -> Iterator[tuple[Path, TensorRef | ArrayRef]]:
    """Tensors and arrays under `root`, in order, each with the keys that lead to it; what is reached twice is given once, but for tensors.

    Raises CheckpointError for a tree that is deeper than any checkpoint.
    """
    seen: set[int] = set()
    stack: list[tuple[Path, Any]] = [((), root)]
    for _ in range(_NODES):
        if not stack:
            return
        path, node = stack.pop()
        if isinstance(node, TensorRef | ArrayRef):
            yield path, node
        if id(node) in seen or not (children := _children(node)):
            continue
        if len(path) >= _DEPTH:
            raise CheckpointError(f"{where}: values are nested deeper than {_DEPTH}, which no checkpoint is", "do not load this file")
        seen.add(id(node))
        stack.extend(((*path, name), child) for name, child in reversed(children) if not isinstance(child, _SCALARS))
    raise CheckpointError(f"{where}: more than {_NODES} values", "do not load this file")


_SCALARS = (str, bytes, int, float, bool, type(None))


def _children(node: Any) -> list[tuple[str, Any]]:
    """What hangs below a node, with the name each would be called by."""
    if isinstance(node, list | tuple):
        return [(str(index), child) for index, child in enumerate(node)]
    if isinstance(node, Mapping):
        return [(_name(key), value) for key, value in node.pairs]
    if isinstance(node, Object):
        found = [(_name(key), value) for key, value in node.pairs]
        for group in (node.arguments, node.items):
            found += [(str(index), child) for index, child in enumerate(group)]
        for state in node.state if isinstance(node.state, tuple) else (node.state,):
            found += [(_name(key), value) for key, value in state.pairs] if isinstance(state, Mapping) else [("state", state)]
        return found
    if isinstance(node, ArrayRef):
        return [("values", part) for part in node.parts]
    return []


def _name(key: Any) -> str:
    if isinstance(key, str):
        return key[:400]
    if isinstance(key, int | float):
        return _number(key)
    return "(" + ", ".join(map(_part, key[:4])) + ")" if isinstance(key, tuple) else "?"


def _part(key: Any) -> str:
    """A part of a key that is a tuple: Megatron's distributed optimizer keys its buffers by (torch.bfloat16, torch.float32)."""
    return key[:100] if isinstance(key, str) else _number(key) if isinstance(key, int | float) else getattr(key, "name", "?")


def _number(key: int | float) -> str:
    # Python refuses to print a whole number of thousands of digits, and so it should.
    return str(key) if isinstance(key, float) or key.bit_length() <= 64 else "?"
