"""Files of torch.save, in the zip format (torch 1.6 and later) and the one before it; neither tensors nor code of the file are loaded.

A zip file is `<name>/data.pkl` and one record `<name>/data/<key>` a storage. The older format is five pickles (a magic number, a version,
facts of the machine, the value, the keys of its storages) and then each storage as a 64-bit count and its elements.
"""

from __future__ import annotations

from megactl.errors import CheckpointError
from megactl.storage.foreign.contents import Contents, Tensor, leaves
from megactl.storage.foreign.names import Names
from megactl.storage.foreign.nodes import ArrayRef, TensorRef
from megactl.storage.foreign.opened import OpenFile
from megactl.storage.foreign.pickle_machine import Limits, Machine, Short
from megactl.storage.foreign.zip_archive import ZipArchive

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_FIRST_READ = 1 << 20
_NAMES_SHOWN = 8
_AGAIN = "the file was cut short or damaged; save or copy it again, or use another checkpoint"


def read_torch_file(file: OpenFile, limits: Limits) -> Contents:
    """The contents of a torch.save file of either format, or of a bare pickle. Raises CheckpointError for damage."""
    if file.size == 0:
        raise CheckpointError(f"{file.path}: is empty", _AGAIN)
    head = file.read(0, min(8, file.size))
    if head.startswith(ZIP_MAGIC):
        return _read_zip(file, limits)
    if head[:1] not in (b"\x80", b"(", b"}", b"]", b"c"):
        # A file whose end is missing still begins like one; anything else is not torch's.
        raise CheckpointError(f"{file.path}: begins with {head!r}, which is neither a torch file nor a pickle", "give a file of torch.save")
    return _read_pickles(file, limits)


def read_pickle(file: OpenFile, limits: Limits) -> Contents:
    """The contents of a file that is one pickle and nothing else, such as `.metadata` of a distributed checkpoint."""
    names = Names(str(file.path), limits.opcodes)
    if file.size > limits.nbytes:
        raise limits.too_many(str(file.path), f"{limits.nbytes} bytes")
    tree, end = Machine(file.read(0, file.size), str(file.path), names, limits).run()
    return _finish(Contents("pickle", file.size, tree=tree), tree, names, file, {}, file.size - end)


def _read_zip(file: OpenFile, limits: Limits) -> Contents:
    archive = ZipArchive(file)
    pickles = [name for name in archive.records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        rule = f"a zip archive with {len(pickles)} data.pkl, torch.save writes one"
        raise CheckpointError(f"{file.path}: {rule}", "give a file of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    names = Names(str(file.path), limits.opcodes)
    data = archive.read(archive.records[pickles[0]], limits.nbytes)
    tree, _ = Machine(data, str(file.path), names, limits).run()
    sizes, packed = {}, 0
    for name, record in archive.records.items():
        if name.startswith(f"{prefix}data/"):
            archive.data_start(record)
            sizes[name.removeprefix(f"{prefix}data/")] = record.stored
            packed += record.method != 0
    contents = Contents("torch zip", file.size, tree=tree)
    if packed:
        contents.problems.append(f"{packed} storages are compressed, which torch.save never does: their sizes are those on disk")
    if f"{prefix}constants.pkl" in archive.records:
        contents.notes.append("a TorchScript archive: its code was not read")
    return _finish(contents, tree, names, file, sizes, 0)


def _read_pickles(file: OpenFile, limits: Limits) -> Contents:
    """The format before zip, told by its magic number, or a pickle of any other origin."""
    names = Names(str(file.path), limits.opcodes)
    length = min(_FIRST_READ, file.size, limits.nbytes)
    while True:
        data = file.read(0, length)
        try:
            return _parse_pickles(file, data, names, limits)
        except Short:
            if length == file.size:
                raise
            if length == limits.nbytes:
                raise limits.too_many(str(file.path), f"{limits.nbytes} bytes") from None
            length = min(8 * length, file.size, limits.nbytes)
            names = Names(str(file.path), limits.opcodes)


def _parse_pickles(file: OpenFile, data: bytes, names: Names, limits: Limits) -> Contents:
    where = str(file.path)
    tree, at = Machine(data, where, names, limits).run()
    if tree != _LEGACY_MAGIC if type(tree) is int else True:
        return _finish(Contents("pickle", file.size, tree=tree), tree, names, file, {}, file.size - at)
    version, at = Machine(data, where, names, limits, at).run()
    if type(version) is not int or version != _LEGACY_VERSION:
        raise CheckpointError(f"{where}: is not in version {_LEGACY_VERSION} of torch's old format, the only one there is", _AGAIN)
    _, at = Machine(data, where, names, limits, at).run()
    tree, at = Machine(data, where, names, limits, at).run()
    keys, at = Machine(data, where, names, limits, at).run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{where}: its list of storages is not a list of keys", _AGAIN)
    sizes = {}
    for key in keys:
        if key not in names.storages:
            raise CheckpointError(f"{where}: has a storage {key[:40]!r} that nothing refers to, so its size is not known", _AGAIN)
        storage = names.storages[key]
        found = int.from_bytes(file.read(at, 8), "little")
        if found != storage.numel:
            raise CheckpointError(f"{where}: storage {key[:40]!r} has {found} elements, the pickle says {storage.numel}", _AGAIN)
        at += 8 + storage.nbytes
        sizes[key] = storage.nbytes
        if at > file.size:
            raise CheckpointError(f"{where}: {file.size} bytes, storage {key[:40]!r} ends at {at}: the file was cut short", _AGAIN)
    return _finish(Contents("torch before 1.6", file.size, tree=tree), tree, names, file, sizes, file.size - at)


def _finish(contents: Contents, tree: object, names: Names, file: OpenFile, sizes: dict[str, int], behind: int) -> Contents:
    """Put tensors, storages and what is odd into `contents`. `sizes` are the bytes really there for each storage."""
    for path, leaf in leaves(tree, str(file.path)):
        if isinstance(leaf, ArrayRef):
            contents.arrays.append((path, leaf.nbytes))
        else:
            contents.tensors.append(_tensor(path, leaf, contents.problems))
    contents.storages = sizes
    contents.problems += _storage_problems(names, sizes)
    unknown = [key for key in sizes if key not in names.storages]
    if unknown:
        contents.warnings.append(f"{len(unknown)} storages belong to no tensor, the first is {unknown[0][:40]!r}")
    contents.problems += names.oddities
    if behind:
        contents.problems.append(f"{behind} bytes follow its end")
    if names.dangers:
        rule = "which no checkpoint needs: a plain torch.load or pickle.load would run it; here it was neither imported nor called"
        contents.problems.append(f"refers to {_listed(list(names.dangers))}, {rule}")
    if names.opaque:
        contents.notes.append(f"holds objects of {_listed(list(names.opaque))}: not loaded, only tensors inside them are counted")
    return contents


def _tensor(path: tuple[str, ...], leaf: TensorRef, problems: list[str]) -> Tensor:
    storage, extent = leaf.storage, leaf.extent
    if storage is not None and extent[1] > storage.nbytes:
        problems.append(f"{'.'.join(path)[:200]}: ends at byte {extent[1]} of a storage of {storage.nbytes} bytes")
        extent = (min(extent[0], storage.nbytes), storage.nbytes)
    return Tensor(path, leaf.dtype, leaf.shape, leaf.numel, leaf.nbytes, storage.key if storage else None, extent)


def _storage_problems(names: Names, sizes: dict[str, int]) -> list[str]:
    missing = [key for key in names.storages if key not in sizes]
    found = []
    if missing:
        found.append(f"{len(missing)} of {len(names.storages)} storages are missing, the first is {missing[0][:40]!r}")
    wrong = [(key, storage.nbytes) for key, storage in names.storages.items() if key in sizes and sizes[key] != storage.nbytes]
    found += [f"storage {key[:40]!r} has {sizes[key]} bytes, the pickle says {nbytes}" for key, nbytes in wrong[:_NAMES_SHOWN]]
    return found


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
