"""Which tokens make up training sample i: Megatron's three indices, number for number.

    documents  [epochs x documents] the documents in shuffled order
    samples    [samples + 1, 2]     (position in `documents`, token offset) where each sample starts
    shuffle    [samples]            the order in which samples are handed out

Built from the sequence lengths alone. Source: Megatron-Core's GPTDataset and its helpers.cpp; random numbers are numpy's
RandomState, which numpy keeps frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megactl.errors import DataError
from megactl.storage.array_cache import ArrayCache
from megactl.storage.indexed import IndexedDataset
from megactl.storage.indexed_format import idx_path
from megactl.storage.native import native_module

# Part of every cache key: raise it when the numbers a builder produces change.
INDEX_VERSION = 1
# The last epoch is shuffled by itself where less than this share of it is used, so that no document is drawn
# from it long before the epochs before it are finished.
_FINAL_EPOCH_SHARE = 0.80


@dataclass(frozen=True)
class SampleIndex:
    """The three arrays (see the module), and how many passes over the documents they span."""

    documents: np.ndarray
    samples: np.ndarray
    shuffle: np.ndarray
    epochs: int

    def __len__(self) -> int:
        """Samples the index holds: at least as many as were asked for."""
        return len(self.shuffle)


def epochs_needed(tokens_per_epoch: int, num_samples: int, seq_length: int) -> int:
    """Passes over the data that give `num_samples` sequences and the one token more that the last label needs."""
    return max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))


def shuffle_in_place(random: np.random.RandomState, array: np.ndarray) -> None:
    """`random.shuffle(array)` for a contiguous 1-D array of 4- or 8-byte items; compiled, it is about five times faster on large ones."""
    native = native_module()
    if native is None:
        random.shuffle(array)
        return
    state = random.get_state(legacy=False)
    key = np.ascontiguousarray(state["state"]["key"], np.uint32)
    state["state"] = {"key": key, "pos": native.shuffle(array, key, state["state"]["pos"])}
    random.set_state(state)


def build_sample_index(lengths: np.ndarray, first: int, last: int, *, num_samples: int, seq_length: int, seed: int) -> SampleIndex:
    """The index over documents [first, last) with these `lengths` (int32 tokens, of all documents).

    Raises DataError where the range holds no tokens.
    """
    tokens_per_epoch = int(lengths[first:last].sum(dtype=np.int64))
    if tokens_per_epoch == 0:
        raise DataError(
            f"documents {first} to {last} hold no tokens; a sample needs {seq_length + 1}", "give this split more documents (--split)"
        )
    epochs = epochs_needed(tokens_per_epoch, num_samples, seq_length)
    total = (epochs * tokens_per_epoch - 1) // seq_length
    before_final = ((epochs - 1) * tokens_per_epoch - 1) // seq_length
    per_epoch = (tokens_per_epoch - 1) // seq_length
    apart = epochs > 1 and num_samples - before_final < int(_FINAL_EPOCH_SHARE * per_epoch)
    random = np.random.RandomState(seed)
    documents = _document_order(first, last, epochs, apart, random)
    samples = _sample_rows(lengths, documents, total, seq_length)
    shuffle = _sample_order(total, before_final if apart else total, random)
    return SampleIndex(documents, samples, shuffle, epochs)


def _document_order(first: int, last: int, epochs: int, apart: bool, random: np.random.RandomState) -> np.ndarray:
    """All epochs' documents shuffled together, or the last epoch's by themselves after the others."""
    dtype = np.int32 if last <= np.iinfo(np.int32).max else np.int64
    order = np.empty((epochs, last - first), dtype)
    order[:] = np.arange(first, last, dtype=dtype)
    for part in (order[:-1], order[-1:]) if apart else (order,):
        shuffle_in_place(random, part.reshape(-1))
    return order.reshape(-1)


def _sample_rows(lengths: np.ndarray, order: np.ndarray, total: int, seq_length: int) -> np.ndarray:
    """Row k is where token k x seq_length of the shuffled documents lies; int64 where int32 cannot count the documents."""
    dtype = np.int32 if len(order) <= np.iinfo(np.int32).max else np.int64
    native = native_module()
    if native is None:
        return _sample_rows_numpy(lengths, order, total, seq_length).astype(dtype)
    rows = np.empty((total + 1, 2), dtype)
    # The lengths lie unaligned in the file; compiled code may not read them there.
    native.build_sample_index(np.require(lengths, np.int32, ["C", "A"]), order, rows, seq_length)
    return rows


def _sample_rows_numpy(lengths: np.ndarray, order: np.ndarray, total: int, seq_length: int) -> np.ndarray:
    ends = np.cumsum(lengths[order], dtype=np.int64)
    wanted = np.arange(total + 1, dtype=np.int64) * seq_length
    # The first document that ends after the token; documents without tokens are passed over.
    positions = np.searchsorted(ends, wanted, side="right")
    rows = np.stack([positions, wanted - (ends - lengths[order])[positions]], axis=1)
    rows[0] = 0
    return rows


def _sample_order(total: int, joint: int, random: np.random.RandomState) -> np.ndarray:
    """A permutation of [0, total): the first `joint` samples among themselves, then the rest."""
    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    order = np.arange(total, dtype=dtype)
    shuffle_in_place(random, order[:joint])
    if joint < total:
        shuffle_in_place(random, order[joint:])
    return order


def cached_sample_index(
    dataset: IndexedDataset,
    first: int,
    last: int,
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    cache_folder: str | None = None,
    log: Callable[[str], None] = print,
) -> SampleIndex:
    """`build_sample_index` of a dataset, kept on disk and shared by the processes of this machine (see ArrayCache)."""
    path = idx_path(dataset.prefix)
    key = {
        "kind": "gpt-sample-index",
        "version": INDEX_VERSION,
        **file_identity(path),
        "documents": [first, last],
        "num_samples": num_samples,
        "seq_length": seq_length,
        "seed": seed,
    }

    def build() -> dict[str, np.ndarray]:
        index = build_sample_index(dataset.lengths, first, last, num_samples=num_samples, seq_length=seq_length, seed=seed)
        return {"documents": index.documents, "samples": index.samples, "shuffle": index.shuffle}

    arrays = ArrayCache(path.parent, cache_folder, log).get("sample index", key, build)
    return SampleIndex(arrays["documents"], arrays["samples"], arrays["shuffle"], len(arrays["documents"]) // (last - first))


def file_identity(path: Path) -> dict[str, object]:
    """What tells one state of a file from another without reading it."""
    status = path.stat()
    return {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
