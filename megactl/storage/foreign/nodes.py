"""What a pickle describes, as inert values: nothing here is the object it stands for, and nothing of it can be called.

Numbers, strings, bytes, lists and tuples stand for themselves; sets are lists. A dictionary is a list of pairs, because hashing a key
that a stranger chose can cost any amount of time, and a deeply nested tuple overflows the stack.
"""

from __future__ import annotations

from math import prod
from typing import Any


class Global:
    """The name of a class or function. It is never imported."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Mapping:
    """A dictionary as pairs in the order stored. `state` is what an OrderedDict carries beside its items."""

    __slots__ = ("pairs", "state")

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []
        self.state: Any = None

    def get(self, key: str, default: Any = None) -> Any:
        """The value under a string key; the last one where a key is stored twice, as in Python."""
        for stored, value in reversed(self.pairs):
            if isinstance(stored, str) and stored == key:
                return value
        return default

    def strings(self) -> dict[str, Any]:
        """The items whose keys are strings."""
        return {key: value for key, value in self.pairs if isinstance(key, str)}


class Object:
    """An object of some class, or the result of some function: what would have made it, and with what."""

    __slots__ = ("arguments", "items", "made_by", "pairs", "state")

    def __init__(self, made_by: Any, arguments: tuple[Any, ...] = ()) -> None:
        self.made_by, self.arguments = made_by, arguments
        self.state: Any = None
        self.items: list[Any] = []
        self.pairs: list[tuple[Any, Any]] = []

    def attributes(self) -> dict[str, Any]:
        """The attributes its state would set: a dictionary, or the (dictionary, slots) of a class with slots."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        return {key: value for state in states if isinstance(state, Mapping) for key, value in state.strings().items()}


class StorageRef:
    """A block of elements outside the pickle: torch's key for it, its type, how many elements of that type, and the first one meant
    (the old format has views of storages)."""

    __slots__ = ("dtype", "itemsize", "key", "numel", "start")

    def __init__(self, key: str, dtype: str, itemsize: int, numel: int, start: int = 0) -> None:
        self.key, self.dtype, self.itemsize, self.numel, self.start = key, dtype, itemsize, numel, start

    @property
    def nbytes(self) -> int:
        """Size of the whole block in bytes."""
        return self.numel * self.itemsize


class TensorRef:
    """A tensor: a view of a storage (None: it has no data, as on the meta device). `offset` and `stride` count elements."""

    __slots__ = ("dtype", "itemsize", "offset", "shape", "storage", "stride")

    def __init__(
        self, storage: StorageRef | None, dtype: str, itemsize: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.storage, self.dtype, self.itemsize, self.offset, self.shape, self.stride = storage, dtype, itemsize, offset, shape, stride

    @property
    def numel(self) -> int:
        """Elements of the view."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the view, 0 without data."""
        return self.numel * self.itemsize if self.storage is not None else 0

    @property
    def extent(self) -> tuple[int, int]:
        """[first, last + 1) byte of the storage that the view touches."""
        if not self.numel:
            return (0, 0)
        first = self.offset * self.itemsize
        return (first, first + (1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))) * self.itemsize)


class ArrayRef:
    """A numpy array or scalar whose bytes lie inside the pickle itself."""

    __slots__ = ("dtype", "nbytes", "parts", "shape")

    def __init__(self) -> None:
        self.dtype: str = "unknown"
        self.shape: tuple[int, ...] = ()
        self.nbytes = 0
        self.parts: list[Any] = []
