"""The allow-list: which names of a pickle mean something to a reader of checkpoints, and what they mean. None of them is imported.

A name that is not here becomes an opaque `Object`. How loudly that is said depends on what a plain `pickle.load` would have done:
`dangers` are functions it would have called and modules no checkpoint needs, `opaque` are classes it would have made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from megactl.errors import CheckpointError
from megactl.storage.foreign.dtypes import STORAGES, TORCH
from megactl.storage.foreign.nodes import ArrayRef, Global, Mapping, Object, StorageRef, TensorRef

_DIMENSIONS = 64
_ELEMENTS = 1 << 62
_SHOWN = 120

# Classes and functions of the standard library that checkpoints hold: values, no behaviour.
_PLAIN: dict[str, tuple[str, ...]] = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "collections": ("deque", "Counter"),
    "_codecs": ("encode",),
    "copyreg": ("_reconstructor", "__newobj__"),
    "copy_reg": ("_reconstructor",),
    "functools": ("partial",),
    "uuid": ("UUID",),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "random": ("Random",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
    "pathlib._local": ("PosixPath", "PurePosixPath", "WindowsPath", "Path"),
}
_BUILTINS = ("object", "set", "frozenset", "list", "tuple", "dict", "bytes", "bytearray", "int", "long", "float", "complex", "str",
             "unicode", "bool", "slice", "range", "xrange", "NoneType", "Ellipsis")  # fmt: skip
_BUILTIN_MODULES = ("builtins", "__builtin__")
_NUMPY_CORES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_RANDOM = ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor")
_TORCH_FUNCTIONS = frozenset({"torch.serialization._get_layout", "torch.serialization._get_dtype", "torch._utils._get_dtype"})

_TORCH_CLASSES = {
    "torch": ("Size", "device", "Tensor", "Generator", "layout", "memory_format", "dtype"),
    "torch.nn.parameter": ("Parameter", "Buffer"),
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
}  # fmt: skip

Interpret = Callable[["Names", tuple[Any, ...]], Any]


class Names:
    """What one file's pickles refer to: storages by key, and the names outside the allow-list. `where` names the file in messages.

    `budget` bounds work that one opcode can ask for again and again, such as reading a long list of pairs.
    """

    def __init__(self, where: str, budget: int = 10_000_000) -> None:
        self.where = where
        self.storages: dict[str, StorageRef] = {}
        self.dangers: dict[str, None] = {}
        self.opaque: dict[str, None] = {}
        self.oddities: dict[str, None] = {}
        self.budget = budget

    def refer(self, name: Global) -> None:
        """Note a name as it is read. Importing a module runs it, so the standard library's are reported even where nothing is called."""
        if _known(name):
            return
        if name.module.partition(".")[0] in sys.stdlib_module_names or name.module in _BUILTIN_MODULES:
            self.dangers[_short(name)] = None
        else:
            self.opaque[_short(name)] = None

    def call(self, callee: Any, arguments: tuple[Any, ...]) -> Any:
        """What `callee(*arguments)` stands for; `Object` where the name is not known."""
        if not isinstance(callee, Global):
            self.dangers["the result of another call"] = None
            return Object(callee, arguments)
        interpret = _MEANINGS.get((callee.module, callee.name))
        if interpret is not None:
            return interpret(self, arguments)
        if not _known(callee) and not _looks_like_a_class(callee.name):
            self.opaque.pop(_short(callee), None)
            self.dangers[_short(callee)] = None
        return Object(callee, arguments)

    def change(self, target: Global) -> None:
        """A state given to a class or function itself would change it for the whole process."""
        self.dangers[f"a state for {_short(target)} itself"] = None

    def stateful(self, target: Any) -> bool:
        """Whether a state on `target` may be passed by: parameters and tensors may carry attributes."""
        return isinstance(target, TensorRef)

    def extension(self, code: int) -> Object:
        """A number in place of a name: the meaning is whatever the reading process has registered (copyreg)."""
        self.dangers[f"extension code {code} of copyreg"] = None
        return Object(None)

    def persistent(self, identity: Any) -> Any:
        """torch's ('storage', class, key, location, numel[, view]) and ('module', class, file, source)."""
        if isinstance(identity, tuple) and len(identity) in (5, 6) and _text(identity[0]) == "storage":
            return self._storage(identity)
        if isinstance(identity, tuple) and len(identity) == 4 and _text(identity[0]) == "module":
            return identity[1]
        self.dangers["a persistent id that is not torch's"] = None
        return Object(None)

    def _storage(self, identity: tuple[Any, ...]) -> StorageRef:
        kind, key, numel = identity[1], identity[2], identity[4]
        view = identity[5] if len(identity) == 6 else None
        dtype = STORAGES.get(kind.name) if isinstance(kind, Global) and kind.module.partition(".")[0] == "torch" else None
        if dtype is None or not isinstance(key, str) or not _whole(numel):
            raise ValueError("a storage whose type, key or size is not torch's")
        start = view[1] if isinstance(view, tuple) and len(view) == 3 else 0
        if not _whole(start):
            raise ValueError("a storage view whose start is not a whole number")
        storage = StorageRef(key, dtype, TORCH[dtype], numel, start)
        first = self.storages.setdefault(key, storage)
        if first.nbytes != storage.nbytes:
            self.oddities[f"storage {key[:40]} is {first.nbytes} bytes in one place and {storage.nbytes} in another"] = None
        return storage

    def charge(self, work: int) -> None:
        """Pay for `work` steps. Raises CheckpointError when one file asks for too many."""
        self.budget -= work
        if self.budget < 0:
            raise CheckpointError(f"{self.where}: the pickle asks for the same work again and again", "do not load this file")

    def fill_array(self, array: ArrayRef, state: Any) -> None:
        """The state numpy gives an array: (version, shape, dtype, Fortran order, bytes or a list of objects)."""
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ValueError("an array's state that is not numpy's")
        shape, dtype, _, data = state[-4:]
        array.shape = sizes_of(shape)
        array.dtype = _numpy_dtype(dtype)
        if isinstance(data, list):
            array.parts.append(data)
        elif isinstance(data, str | bytes):
            array.nbytes = len(data)
        else:
            raise ValueError("an array without bytes")


def _short(name: Global) -> str:
    text = str(name)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _looks_like_a_class(name: str) -> bool:
    return name.rpartition(".")[2].lstrip("_")[:1].isupper()


def _known(name: Global) -> bool:
    if (name.module, name.name) in _MEANINGS or name.name in _PLAIN.get(name.module, ()) or str(name) in _TORCH_FUNCTIONS:
        return True
    if name.module in _BUILTIN_MODULES:
        return name.name in _BUILTINS
    if name.module == "numpy" or name.module in _NUMPY_CORES or name.module.startswith("numpy.dtypes"):
        return name.module.startswith("numpy.dtypes") or name.name in ("dtype", "ndarray", "generic") or _looks_like_a_number(name.name)
    if name.module == "numpy.random._pickle":
        return name.name in _RANDOM
    if name.module.partition(".")[0] == "torch":
        return name.name in TORCH or name.name in STORAGES or _torch_class(name)
    return False


def _looks_like_a_number(name: str) -> bool:
    return name.rstrip("0123456789_") in ("float", "int", "uint", "complex", "bool", "str", "bytes", "void")


def _torch_class(name: Global) -> bool:
    return name.name in _TORCH_CLASSES.get(name.module, ())


def _text(value: Any) -> str | None:
    # Python 2 wrote these words as bytes.
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else None


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < _ELEMENTS


def sizes_of(value: Any) -> tuple[int, ...]:
    """A shape or stride: a short tuple of whole numbers, bare or as torch.Size."""
    if isinstance(value, Object) and isinstance(value.made_by, Global) and str(value.made_by) == "torch.Size":
        value = value.arguments[0] if value.arguments else ()
    if not isinstance(value, tuple | list) or len(value) > _DIMENSIONS or not all(_whole(item) for item in value):
        raise ValueError("a shape that is not a short tuple of whole numbers")
    return tuple(value)


def _torch_dtype(value: Any) -> str:
    if not isinstance(value, Global) or value.name not in TORCH:
        raise ValueError("a tensor whose type is not torch's")
    return value.name


def _numpy_dtype(value: Any) -> str:
    if isinstance(value, Object) and isinstance(value.made_by, Global) and value.made_by.name == "dtype" and value.arguments:
        return (_text(value.arguments[0]) or "unknown")[:16]
    return "unknown"


def _view(storage: Any, dtype: str | None, offset: Any, shape: Any, stride: Any) -> TensorRef:
    if not isinstance(storage, StorageRef) or not _whole(offset):
        raise ValueError("a tensor without a storage or an offset")
    sizes, steps = sizes_of(shape), sizes_of(stride)
    if len(sizes) != len(steps):
        raise ValueError(f"a tensor with {len(sizes)} dimensions and {len(steps)} strides")
    kind = storage.dtype if dtype is None else dtype
    return TensorRef(storage, kind, TORCH[kind], storage.start + offset, sizes, steps)


def _tensor_v2(names: Names, arguments: tuple[Any, ...]) -> TensorRef:
    """torch._utils._rebuild_tensor[_v2](storage, offset, size, stride, ...)."""
    storage, offset, shape, stride = arguments[:4]
    return _view(storage, None, offset, shape, stride)


def _tensor_v3(names: Names, arguments: tuple[Any, ...]) -> TensorRef:
    """torch._utils._rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, ...)."""
    storage, offset, shape, stride, _, _, dtype = arguments[:7]
    return _view(storage, _torch_dtype(dtype), offset, shape, stride)


def _parameter(names: Names, arguments: tuple[Any, ...]) -> Any:
    """torch._utils._rebuild_parameter[_with_state](data, ...), torch._tensor._rebuild_from_type_v2 without its subclass."""
    if not isinstance(arguments[0], TensorRef | Object):
        raise ValueError("a parameter without a tensor")
    return arguments[0]


def _meta(names: Names, arguments: tuple[Any, ...]) -> TensorRef:
    """torch._utils._rebuild_meta_tensor_no_storage(dtype, size, stride, ...): a shape without data."""
    dtype, shape, stride = arguments[:3]
    kind = _torch_dtype(dtype)
    return TensorRef(None, kind, TORCH[kind], 0, sizes_of(shape), sizes_of(stride))


def _from_type(names: Names, arguments: tuple[Any, ...]) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, class, arguments, state): a subclass over what `function` makes."""
    function, _, inner = arguments[:3]
    if not isinstance(inner, tuple):
        raise ValueError("arguments that are not a tuple")
    return names.call(function, inner)


def _numpy_tensor(names: Names, arguments: tuple[Any, ...]) -> Any:
    """torch._utils._rebuild_device_tensor_from_numpy(array, ...): the array holds the bytes."""
    return arguments[0]


def _ordered(names: Names, arguments: tuple[Any, ...]) -> Mapping:
    """collections.OrderedDict(pairs), collections.defaultdict(factory, pairs), dict(pairs)."""
    made, pairs = Mapping(), arguments[-1] if arguments else None
    if isinstance(pairs, Mapping):
        names.charge(len(pairs.pairs))
        made.pairs.extend(pairs.pairs)
    elif isinstance(pairs, list | tuple):
        names.charge(len(pairs))
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError("a dictionary made from something that is not pairs")
        made.pairs.extend((pair[0], pair[1]) for pair in pairs)
    return made


def _same(names: Names, arguments: tuple[Any, ...]) -> Any:
    """Containers made from one other: set([..]), list((..)); _codecs.encode(text, 'latin1') is as long as its text."""
    return arguments[0] if arguments else []


def _bytes(names: Names, arguments: tuple[Any, ...]) -> Any:
    """bytes(): how protocols before 3 write empty ones."""
    return arguments[0] if arguments else b""


def _array(names: Names, arguments: tuple[Any, ...]) -> ArrayRef:
    """numpy's _reconstruct(class, shape, type): an empty array, whose state follows."""
    return ArrayRef()


def _array_from_buffer(names: Names, arguments: tuple[Any, ...]) -> ArrayRef:
    """numpy's _frombuffer(bytes, dtype, shape, order) of protocol 5."""
    data, dtype, shape = arguments[:3]
    array = ArrayRef()
    names.fill_array(array, (shape, dtype, False, data))
    return array


def _scalar(names: Names, arguments: tuple[Any, ...]) -> ArrayRef:
    """numpy's scalar(dtype, bytes)."""
    array = ArrayRef()
    names.fill_array(array, ((), arguments[0], False, arguments[1] if len(arguments) > 1 else b""))
    return array


def _meanings() -> dict[tuple[str, str], Interpret]:
    table: dict[tuple[str, str], Interpret] = {
        ("collections", "OrderedDict"): _ordered,
        ("collections", "defaultdict"): _ordered,
        ("_codecs", "encode"): _same,
        ("torch._utils", "_rebuild_tensor"): _tensor_v2,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
        ("torch._utils", "_rebuild_qtensor"): _tensor_v2,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._utils", "_rebuild_meta_tensor_no_storage"): _meta,
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): _numpy_tensor,
        # A sparse tensor is its indices and values; they are found among the arguments.
        ("torch._utils", "_rebuild_sparse_tensor"): lambda names, arguments: Object(Global("torch", "sparse"), arguments),
        ("torch._utils", "_rebuild_nested_tensor"): lambda names, arguments: Object(Global("torch", "nested"), arguments),
        ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    }
    for core in _NUMPY_CORES:
        table |= {(core, "_reconstruct"): _array, (core, "_frombuffer"): _array_from_buffer, (core, "scalar"): _scalar}
    for module in _BUILTIN_MODULES:
        table |= {(module, name): _same for name in ("set", "frozenset", "list", "tuple", "bytearray")}
        table[module, "bytes"] = _bytes
        table[module, "dict"] = _ordered
    return table


_MEANINGS = _meanings()
