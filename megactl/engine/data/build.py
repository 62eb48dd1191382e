"""From the settings of a run to its three datasets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megactl.config.schema import Run
from megactl.engine.data.datasets import BlendedDataset, GPTDataset, MockDataset, TokenDataset
from megactl.errors import DataError
from megactl.storage.array_cache import ArrayCache
from megactl.storage.blending import build_blending, build_exhaustive_blending, normalise
from megactl.storage.data_spec import SPLITS, DataSpec, parse_data, recorded_metadata, split_ranges
from megactl.storage.indexed import IndexedDataset
from megactl.storage.sample_index import INDEX_VERSION, cached_sample_index

# Megatron asks each dataset of a blend for this much more than its share. Kept, because the number asked for decides the shuffle.
_SURPLUS = 0.005


@dataclass(frozen=True)
class Datasets:
    """The three splits; None where no samples were asked for."""

    train: TokenDataset | None
    valid: TokenDataset | None
    test: TokenDataset | None


@dataclass(frozen=True)
class _Request:
    """One split of one run."""

    run: Run
    split: str
    samples: int
    vocab_size: int
    log: Callable[[str], None]


def build_datasets(run: Run, samples: dict[str, int], vocab_size: int, eod: int | None, log: Callable[[str], None] = print) -> Datasets:
    """The datasets of `run.data` with at least `samples["train" | "valid" | "test"]` samples of `run.training.seq_length` tokens.

    Where a split holds fewer, it is gone through several times. Every process calls this; one of each machine builds the indices, and the
    others wait for it. Raises DataError for damaged files, an empty split that is asked for, or data of a larger vocabulary.
    """
    assert set(samples) <= set(SPLITS)
    wanted = {split: samples.get(split, 0) for split in SPLITS}
    if run.data.mock_data:
        return _mock_datasets(run, wanted, vocab_size, eod)
    if run.data.data is None:
        raise DataError("no training data", "set --data PREFIX, or --mock-data to try a layout without data")
    spec = parse_data(run.data.data)
    sources = [IndexedDataset(prefix) for prefix in spec.prefixes]
    # Raises where the pairs disagree on the tokenizer.
    recorded_metadata(run.data.data)
    for source in sources:
        _check_source(source, vocab_size, log)
    built: dict[str, TokenDataset | None] = dict.fromkeys(SPLITS)
    for split, count in wanted.items():
        if count > 0:
            built[split] = _build_split(spec, sources, _Request(run, split, count, vocab_size, log))
    return Datasets(**built)


def _mock_datasets(run: Run, wanted: dict[str, int], vocab_size: int, eod: int | None) -> Datasets:
    built: dict[str, TokenDataset | None] = dict.fromkeys(SPLITS)
    for stream, (split, count) in enumerate(wanted.items()):
        if count > 0:
            built[split] = MockDataset(
                count, seq_length=run.training.seq_length, vocab_size=vocab_size, eod=eod, seed=run.training.seed, stream=stream
            )
    return Datasets(**built)


def _check_source(source: IndexedDataset, vocab_size: int, log: Callable[[str], None]) -> None:
    """What can be known before the first batch is read."""
    if not np.issubdtype(source.dtype, np.integer):
        raise DataError(f"{source.prefix}: holds {source.dtype.name}; token ids are integers", "name a pair made from text")
    recorded = source.metadata.vocab_size if source.metadata is not None else 0
    if recorded > vocab_size:
        rule = f"was made with {recorded} tokens, the model has {vocab_size}"
        raise DataError(f"{source.prefix}: {rule}", f"set --vocab-size {recorded}, or leave it out")
    if source.num_documents < len(source):
        log(f"{source.prefix}: has {len(source)} sequences in {source.num_documents} documents; each sequence is shuffled by itself")


def _build_split(spec: DataSpec, sources: list[IndexedDataset], request: _Request) -> TokenDataset:
    ranges = [_range(source, request) for source in sources]
    if len(sources) == 1:
        return _gpt_dataset(sources[0], ranges[0], request.samples, request)
    sizes = [_samples_in_epoch(source, bounds, request.run.training.seq_length) for source, bounds in zip(sources, ranges, strict=True)]
    choices, samples, counts = _blend(spec, sizes, request, sources[0].prefix.parent)
    datasets = [_gpt_dataset(source, bounds, count, request) for source, bounds, count in zip(sources, ranges, counts, strict=True)]
    return BlendedDataset(datasets, choices, samples)


def _range(source: IndexedDataset, request: _Request) -> tuple[int, int]:
    """The documents of the split. Raises DataError where there are none, or none with tokens."""
    first, last = split_ranges(request.run.data.split, len(source))[request.split]
    setting = f"--split {request.run.data.split}"
    if first == last:
        # What it takes for one document: half a document rounds up to one, so a full share of 1/n is on the safe side.
        hint = f"give {request.split} a share of at least 1/{len(source)}" if len(source) > 2 else "use more documents"
        off = ", or set --eval-interval 0 to do without" if request.split == "valid" else ""
        rule = f"gives {request.split} none of the {len(source)} documents of {source.prefix}"
        raise DataError(f"{setting}: {rule}", hint + off)
    if not int(source.lengths[first:last].sum(dtype=np.int64)):
        raise DataError(f"{setting}: the {last - first} documents of {request.split} in {source.prefix} hold no tokens", "change --split")
    return first, last


def _samples_in_epoch(source: IndexedDataset, bounds: tuple[int, int], seq_length: int) -> int:
    tokens = int(source.lengths[bounds[0] : bounds[1]].sum(dtype=np.int64))
    # At least one: a dataset shorter than a sample is repeated to fill it.
    return max(1, (tokens - 1) // seq_length)


def _blend(spec: DataSpec, sizes: list[int], request: _Request, folder: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(dataset, sample within it) of each sample, and how many samples each dataset must have."""
    wanted = request.samples
    weights = list(spec.weights) if spec.weights is not None else [float(size) for size in sizes]
    # Without weights everything is seen once before anything is seen twice.
    once = spec.weights is None and wanted <= sum(sizes)
    key = {"kind": "blend", "version": INDEX_VERSION, "weights": weights, "once": once, "samples": wanted}

    def build() -> dict[str, np.ndarray]:
        choices, samples = build_exhaustive_blending(sizes, wanted) if once else build_blending(weights, wanted)
        return {"choices": choices, "samples": samples}

    arrays = ArrayCache(folder, request.run.data.data_cache, request.log).get("blending index", key, build)
    used = np.bincount(arrays["choices"], minlength=len(sizes)).tolist()
    shares = normalise(weights).tolist()
    # What is used is the bound that matters: Megatron's formula alone can be too small by a sample, and then fails late in a run.
    asked = [math.ceil(math.ceil(wanted * share) * (1 + _SURPLUS)) for share in shares]
    counts = used if once else [max(pair) for pair in zip(used, asked, strict=True)]
    return arrays["choices"], arrays["samples"], counts


def _gpt_dataset(source: IndexedDataset, bounds: tuple[int, int], count: int, request: _Request) -> GPTDataset:
    run = request.run
    seq_length = run.training.seq_length
    index = cached_sample_index(
        source,
        *bounds,
        num_samples=count,
        seq_length=seq_length,
        seed=run.training.seed,
        cache_folder=run.data.data_cache,
        log=request.log,
    )
    tokens = int(source.lengths[bounds[0] : bounds[1]].sum(dtype=np.int64))
    request.log(
        f"{request.split}: {count} samples of {seq_length} tokens = {count * seq_length / tokens:.3g} epochs of {source.prefix} "
        f"({bounds[1] - bounds[0]} documents, {tokens} tokens)"
    )
    return GPTDataset(source, index, seq_length=seq_length, vocab_size=request.vocab_size)
