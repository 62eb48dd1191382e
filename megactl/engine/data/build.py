"""From the settings of a run to its three datasets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megactl.config.schema import Run
from megactl.costmodel.parameters import has_sentence_head
from megactl.engine.data.bert import BertDataset, BlendedPairs, MockPairs, PairDataset
from megactl.engine.data.datasets import BlendedDataset, GPTDataset, MockDataset, TokenDataset
from megactl.engine.data.masking import MaskingRules, MaskingVocabulary, PairMasker
from megactl.errors import DataError
from megactl.storage.array_cache import ArrayCache
from megactl.storage.blending import build_blending, build_exhaustive_blending, normalise
from megactl.storage.data_spec import SPLITS, DataSpec, check_form, parse_data, recorded_metadata, split_ranges
from megactl.storage.indexed import IndexedDataset
from megactl.storage.inspect import recorded_tokenizer
from megactl.storage.sample_index import INDEX_VERSION, cached_sample_index
from megactl.storage.sentence_index import build_sentence_index, cached_sentence_index
from megactl.storage.special_tokens import pair_tokens
from megactl.storage.tokenizer import load_tokenizer

# Megatron asks each dataset of a blend for this much more than its share. Kept, because the number asked for decides the shuffle.
_SURPLUS = 0.005

AnyDataset = TokenDataset | PairDataset


@dataclass(frozen=True)
class Datasets:
    """The three splits; None where no samples were asked for."""

    train: AnyDataset | None
    valid: AnyDataset | None
    test: AnyDataset | None


@dataclass(frozen=True)
class _Request:
    """One split of one run."""

    run: Run
    split: str
    samples: int
    vocab_size: int
    log: Callable[[str], None]
    masker: PairMasker | None = None

    @property
    def bert(self) -> bool:
        """Whether documents are runs of sentences, and samples pairs of them."""
        return self.masker is not None


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
        _check_source(source, run.model.architecture, vocab_size)
    masker = _masker(run, sources[0]) if run.model.architecture == "bert" else None
    built: dict[str, AnyDataset | None] = dict.fromkeys(SPLITS)
    for split, count in wanted.items():
        if count > 0:
            built[split] = _build_split(spec, sources, _Request(run, split, count, vocab_size, log, masker))
    return Datasets(**built)


def _mock_datasets(run: Run, wanted: dict[str, int], vocab_size: int, eod: int | None) -> Datasets:
    common = {"seq_length": run.training.seq_length, "vocab_size": vocab_size, "seed": run.training.seed}
    make: Callable[..., AnyDataset] = partial(MockDataset, eod=eod, **common)
    if run.model.architecture == "bert":
        make = partial(MockPairs, rules=_masking_rules(run), elsewhere=run.data.sentence_task == "nsp", **common)
    built = {split: make(count, stream=stream) if count > 0 else None for stream, (split, count) in enumerate(wanted.items())}
    return Datasets(**built)


def _check_source(source: IndexedDataset, architecture: str, vocab_size: int) -> None:
    """What can be known before the first batch is read."""
    if not np.issubdtype(source.dtype, np.integer):
        raise DataError(f"{source.prefix}: holds {source.dtype.name}; token ids are integers", "name a pair made from text")
    recorded = source.metadata.vocab_size if source.metadata is not None else 0
    if recorded > vocab_size:
        rule = f"was made with {recorded} tokens, the model has {vocab_size}"
        raise DataError(f"{source.prefix}: {rule}", f"set --vocab-size {recorded}, or leave it out")
    check_form(source.prefix, architecture, sentences=source.holds_sentences)


def _masking_rules(run: Run) -> MaskingRules:
    data = run.data
    return MaskingRules(data.mask_probability, data.mask_ngrams, data.whole_word_masking, has_sentence_head(run.model))


def _masker(run: Run, source: IndexedDataset) -> PairMasker:
    """Masking with the ids of the run's tokenizer. Raises DataError where it has none of the tokens that a pair needs."""
    recorded = source.metadata.tokenizer if source.metadata is not None else None
    spec = run.data.tokenizer
    # Another file than the recorded one is not compared with it: the same vocabulary may come in several forms.
    tokenizer = load_tokenizer(spec) if spec is not None and spec != recorded else recorded_tokenizer(source)
    ids = pair_tokens(tokenizer)
    vocabulary = MaskingVocabulary(tokenizer.vocab_size, ids.cls, ids.sep, ids.mask, ids.pad, tokenizer.continues())
    return PairMasker(_masking_rules(run), vocabulary, run.training.seq_length)


def _build_split(spec: DataSpec, sources: list[IndexedDataset], request: _Request) -> AnyDataset:
    ranges = [_range(source, request) for source in sources]
    make = _bert_dataset if request.bert else _gpt_dataset
    if len(sources) == 1:
        return make(sources[0], ranges[0], request.samples, request)
    # Only a blend without weights asks how much there is; for sentences that takes a pass over their lengths.
    sizes = [_samples_in_epoch(source, bounds, request) for source, bounds in zip(sources, ranges, strict=True)] if not spec.weights else []
    choices, samples, counts = _blend(spec, sizes, request, sources[0].prefix.parent)
    datasets = [make(source, bounds, count, request) for source, bounds, count in zip(sources, ranges, counts, strict=True)]
    return BlendedPairs(datasets, choices, samples) if request.bert else BlendedDataset(datasets, choices, samples)


def _range(source: IndexedDataset, request: _Request) -> tuple[int, int]:
    """The documents of the split. Raises DataError where there are none, or none with tokens."""
    documents = source.num_documents if request.bert else len(source)
    first, last = split_ranges(request.run.data.split, documents)[request.split]
    setting = f"--split {request.run.data.split}"
    if first == last:
        # What it takes for one document: half a document rounds up to one, so a full share of 1/n is on the safe side.
        hint = f"give {request.split} a share of at least 1/{documents}" if documents > 2 else "use more documents"
        off = ", or set --eval-interval 0 to do without" if request.split == "valid" else ""
        rule = f"gives {request.split} none of the {documents} documents of {source.prefix}"
        raise DataError(f"{setting}: {rule}", hint + off)
    sequences = (int(source.documents[first]), int(source.documents[last])) if request.bert else (first, last)
    if not int(source.lengths[slice(*sequences)].sum(dtype=np.int64)):
        raise DataError(f"{setting}: the {last - first} documents of {request.split} in {source.prefix} hold no tokens", "change --split")
    return first, last


def _samples_in_epoch(source: IndexedDataset, bounds: tuple[int, int], request: _Request) -> int:
    if request.bert:
        documents = source.documents[bounds[0] : bounds[1] + 1]
        return len(build_sentence_index(documents, source.lengths, num_samples=1, name=str(source.prefix), **_pair_options(request)))
    seq_length = request.run.training.seq_length
    tokens = int(source.lengths[bounds[0] : bounds[1]].sum(dtype=np.int64))
    # At least one: a dataset shorter than a sample is repeated to fill it.
    return max(1, (tokens - 1) // seq_length)


def _blend(spec: DataSpec, sizes: list[int], request: _Request, folder: Path) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """(dataset, sample within it) of each sample, and how many samples each dataset must have."""
    wanted = request.samples
    weights = list(spec.weights) if spec.weights else [float(size) for size in sizes]
    # Without weights everything is seen once before anything is seen twice.
    once = spec.weights is None and wanted <= sum(sizes)
    key = {"kind": "blend", "version": INDEX_VERSION, "weights": weights, "once": once, "samples": wanted}

    def build() -> dict[str, np.ndarray]:
        choices, samples = build_exhaustive_blending(sizes, wanted) if once else build_blending(weights, wanted)
        return {"choices": choices, "samples": samples}

    arrays = ArrayCache(folder, request.run.data.data_cache, request.log).get("blending index", key, build)
    used = np.bincount(arrays["choices"], minlength=len(weights)).tolist()
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


def _pair_options(request: _Request) -> dict[str, Any]:
    """What decides which sentences make up a sample."""
    run = request.run
    return {
        "seq_length": run.training.seq_length,
        "short_probability": run.data.short_seq_probability,
        "seed": run.training.seed,
        "min_sentences": 2 if has_sentence_head(run.model) else 1,
    }


def _bert_dataset(source: IndexedDataset, bounds: tuple[int, int], count: int, request: _Request) -> BertDataset:
    assert request.masker is not None
    run, (first, last) = request.run, bounds
    options = {"cache_folder": run.data.data_cache, "log": request.log}
    rows = cached_sentence_index(source, first, last, num_samples=count, **_pair_options(request), **options)
    sentences = int(source.documents[last]) - int(source.documents[first])
    request.log(f"{request.split}: {len(rows)} samples of {source.prefix} ({last - first} documents, {sentences} sentences)")
    elsewhere = run.data.sentence_task == "nsp"
    return BertDataset(source, rows, request.masker, first=first, last=last, seed=run.training.seed, elsewhere=elsewhere)
