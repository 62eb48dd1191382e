"""Loading: any rank asks for any regions of any tensors; whatever layout they were saved in, the elements are put together."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch

from megactl.engine.checkpoint.group import RankGroup, SingleProcess
from megactl.engine.checkpoint.piece import Piece, check, host_bytes
from megactl.errors import CheckpointError
from megactl.storage import manifest as manifests
from megactl.storage import tensor_file
from megactl.storage.manifest import Entry, Header, Manifest
from megactl.storage.pieces import Window, overlaps, whole
from megactl.storage.tensor_file import DTYPES, TensorFile

# Runs in which the weight is its own master copy: none is stored beside it.
_OWN_MASTER = ("fp32", "fp64")


@dataclass
class _Read:
    """One stored piece and where its elements go: (window of the stored piece, request, window of the request)."""

    entry: Entry
    targets: list[tuple[Window, Piece, Window]] = field(default_factory=list)

    @property
    def direct(self) -> Piece | None:
        """The request that is this very piece, byte for byte in CPU memory: it can be read in place."""
        if len(self.targets) != 1:
            return None
        request = self.targets[0][1]
        same = request.region == self.entry.region and request.dtype == self.entry.dtype
        return request if same and request.tensor.device.type == "cpu" else None


def load(path: Path, requests: Sequence[Piece], *, verify: bool = True, group: RankGroup | None = None) -> Header:
    """Fill each request's tensor in place from the checkpoint folder `path`; return the header.

    Only pieces that meet a request are read; with `verify` each of them is read whole and compared with its checksum. Types must be
    those stored, with two exceptions: in an fp32 or fp64 run `weight` also stands for `master`, and `weight` is given in any type, rounded
    from the master copy. With a `group` the call is collective and all ranks raise where one fails. Raises CheckpointError; tensors are
    then partly filled.
    """
    group = group or SingleProcess()
    header, error = None, None
    try:
        header = _load(path, list(requests), verify)
    except Exception as caught:
        # Kept until every rank has spoken: raising here would leave the others in the next collective.
        error = caught
    failures = group.all_ok(error is None, str(error))
    if error is not None:
        raise error
    if failures:
        raise CheckpointError(f"{path}: another rank could not load it: {failures[0]}")
    assert header is not None
    return header


def load_full(path: Path, kind: str = "weight", *, verify: bool = True) -> dict[str, torch.Tensor]:
    """Every tensor of one kind, whole, on the CPU, in its stored type, from any layout: name -> tensor. Raises CheckpointError."""
    manifest = manifests.read(path)
    requests = []
    for name in dict.fromkeys(entry.name for entry in manifest.entries):
        entries = _stored(manifest, name, kind)
        if entries:
            shape, dtype = entries[0].shape, getattr(torch, entries[0].dtype)
            requests.append(Piece(name, kind, shape, whole(shape).rectangle, None, torch.empty(shape, dtype=dtype)))
    if not requests:
        kinds = ", ".join(sorted({entry.kind for entry in manifest.entries}))
        raise CheckpointError(f"{path}: holds no tensors of kind '{kind}'", f"ask for one of {kinds}")
    load(path, requests, verify=verify)
    return {request.name: request.tensor for request in requests}


def _load(path: Path, requests: list[Piece], verify: bool) -> Header:
    check(requests)
    manifest = manifests.read(path)
    reads = _plan(path, manifest, requests)
    for record in manifest.files:
        work = [read for read in reads if read.entry.file == record.file]
        if not work:
            continue
        # The pool is the inner one: its threads have ended before the file is closed, also where one of them failed.
        with manifests.open_file(path, record, manifest.by_file[record.file]) as file, ThreadPoolExecutor(tensor_file.threads()) as pool:
            damage = [text for text in pool.map(partial(_fill, file, verify), work) if text is not None]
        if damage:
            raise CheckpointError(damage[0], "use another checkpoint (megactl checkpoint verify says which are good)")
    return manifest.header


def _plan(path: Path, manifest: Manifest, requests: Sequence[Piece]) -> list[_Read]:
    """Which stored pieces to read and where their elements go. Raises CheckpointError naming every request that cannot be met."""
    reads: dict[tuple[str, str], _Read] = {}
    problems = []
    for request in requests:
        entries = _stored(manifest, request.name, request.kind, request.dtype)
        problem = _mismatch(manifest, entries, request)
        if problem is not None:
            problems.append(f"{request.kind} of '{request.name}': {problem}")
            continue
        filled = 0
        for entry in _candidates(entries, request):
            pairs = overlaps(entry.region, request.region)
            filled += sum(prod(window.sizes) for window, _ in pairs)
            if pairs:
                read = reads.setdefault((entry.file, entry.key), _Read(entry))
                read.targets += [(window, request, target) for window, target in pairs]
        assert filled == request.region.elements, "a validated manifest covers every element once"
    if problems:
        shown = [*problems[:10], f"and {len(problems) - 10} more"] if len(problems) > 10 else problems
        raise CheckpointError("\n  ".join([f"{path} does not fit this run:", *shown]), "use the model and precision it was saved with")
    return list(reads.values())


def _candidates(entries: list[Entry], request: Piece) -> list[Entry]:
    """The pieces that can meet a request: the very one where the layouts agree (the usual resume), else all of the tensor."""
    region = request.region
    return next(([entry] for entry in entries if entry.region == region), entries)


def _stored(manifest: Manifest, name: str, kind: str, dtype: str | None = None) -> list[Entry]:
    """The pieces that answer for (name, kind) in type `dtype` (None: any). Empty where nothing may."""
    weight, master = manifest.tensors.get((name, "weight"), []), manifest.tensors.get((name, "master"), [])
    if not master and manifest.header.precision in _OWN_MASTER:
        master = weight
    if kind == "master":
        return master
    if kind == "weight":
        return weight if weight and dtype in (None, weight[0].dtype) else master or weight
    return manifest.tensors.get((name, kind), [])


def _mismatch(manifest: Manifest, entries: list[Entry], request: Piece) -> str | None:
    """Why `entries` cannot answer the request, or None."""
    if not entries:
        names = {entry.name for entry in manifest.entries}
        if request.name in names:
            return f"not stored; stored are {', '.join(sorted({entry.kind for entry in manifest.entries if entry.name == request.name}))}"
        close = difflib.get_close_matches(request.name, names, 1)
        return "not stored" + (f"; the closest name is '{close[0]}'" if close else "")
    first = entries[0]
    if first.shape != tuple(request.logical_shape):
        return f"stored with shape {list(first.shape)}, the run has {list(request.logical_shape)}"
    # A weight may be rounded from its master copy; any other change of type would change what the optimizer remembers.
    from_master = request.kind == "weight" and (first.kind == "master" or manifest.header.precision in _OWN_MASTER)
    if first.dtype != request.dtype and not from_master:
        return f"stored as {first.dtype}, the run has {request.dtype}"
    return None


def _fill(file: TensorFile, verify: bool, read: _Read) -> str | None:
    """Read one stored piece and copy it to its requests; the sentence that says it is damaged, or None."""
    entry, direct = read.entry, read.direct
    width = DTYPES[entry.dtype][1]
    first, end = 0, entry.region.elements
    if direct is None and not verify:
        first = min(window.span[0] for window, _, _ in read.targets)
        end = max(window.span[1] for window, _, _ in read.targets)
    buffer = torch.empty((end - first,), dtype=getattr(torch, entry.dtype)) if direct is None else direct.tensor
    data = host_bytes(buffer)
    file.read_into(entry.key, data, first * width)
    if verify and tensor_file.digest(data) != entry.checksum:
        return manifests.mismatch(file.path.parent, entry)
    if direct is None:
        for window, request, target in read.targets:
            _view(request.tensor.detach().view(-1), target).copy_(_view(buffer, window, first))
    return None


def _view(flat: torch.Tensor, window: Window, base: int = 0) -> torch.Tensor:
    """The elements of `window` in a piece's memory, of which `flat` holds those from `base` on."""
    return flat[window.span[0] - base :].as_strided(window.sizes, window.strides)
