"""Datasets: which tokens a sample holds, from one pair, from a blend, and generated."""

import numpy as np
import pytest

from megactl.config.schema import Data, Run, Training
from megactl.engine.data import BlendedDataset, GPTDataset, MockDataset, build_datasets
from megactl.errors import DataError
from megactl.storage.dataset_metadata import DatasetMetadata, write_metadata
from megactl.storage.indexed import IndexedDataset
from megactl.storage.indexed_writer import IndexedWriter
from megactl.storage.sample_index import build_sample_index

EOD = 60_000


def write_pair(prefix, documents, dtype="<u2"):
    writer = IndexedWriter(prefix, np.dtype(dtype))
    for document in documents:
        writer.add_sequence(np.asarray(document, np.int64))
        writer.end_document()
    writer.finish()
    return prefix


def make_documents(count, seed, first=0):
    """Documents of 1 to 40 numbered tokens, so that every token tells where it comes from."""
    lengths = np.random.default_rng(seed).integers(1, 41, count)
    ends = np.cumsum(lengths) + first
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@pytest.fixture
def pairs(tmp_path):
    return write_pair(tmp_path / "a", make_documents(300, 1)), write_pair(tmp_path / "b", make_documents(200, 2, first=30_000))


def run_of(data, *, seq_length=16, **settings):
    return Run(data=Data(data=data, **settings), training=Training(seq_length=seq_length))


def quiet(message):
    pass


@pytest.mark.parametrize("num_samples, seq_length", [(5, 4), (12, 4), (40, 7), (3, 30)])
def test_samples_are_consecutive_tokens_of_the_shuffled_documents(tmp_path, num_samples, seq_length):
    documents = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 10], [], [11, 12, 13, 14, 15, 16, 17], [18, 19, 20, 21]]
    data = IndexedDataset(write_pair(tmp_path / "P", documents))
    index = build_sample_index(data.lengths, 0, 6, num_samples=num_samples, seq_length=seq_length, seed=1234)
    stream = np.concatenate([np.array(documents[d], np.int64) for d in index.documents])
    dataset = GPTDataset(data, index, seq_length=seq_length, vocab_size=100)
    assert len(dataset) >= num_samples
    for i in range(len(dataset)):
        start = int(index.shuffle[i]) * seq_length
        sample = dataset.tokens(i)
        assert sample.dtype == np.int64 and sample.tolist() == stream[start : start + seq_length + 1].tolist()
    for bad in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset.tokens(bad)


def test_one_epoch_holds_every_token_once_as_an_input(pairs):
    built = build_datasets(run_of(str(pairs[0]), split="1"), {"train": 300}, 65_000, EOD, log=quiet)
    data = IndexedDataset(pairs[0])
    per_epoch = (data.num_tokens - 1) // 16
    train = built.train
    assert built.valid is None and built.test is None and len(train) == per_epoch and train.epochs == 1
    seen = np.sort(np.concatenate([train.tokens(i)[:-1] for i in range(len(train))]))
    assert len(seen) == per_epoch * 16 and len(np.unique(seen)) == len(seen)


def test_more_samples_than_an_epoch_go_on_with_the_next(pairs):
    lines = []
    train = build_datasets(run_of(str(pairs[0]), split="1"), {"train": 1000}, 65_000, EOD, log=lines.append).train
    assert len(train) >= 1000 and train.epochs == 3
    assert any("epochs of" in line for line in lines)


def test_splits_share_no_document(pairs):
    built = build_datasets(run_of(str(pairs[0]), split="80,15,5"), {"train": 50, "valid": 20, "test": 5}, 65_000, EOD, log=quiet)
    seen = [{int(t) for i in range(len(part)) for t in part.tokens(i)} for part in (built.train, built.valid, built.test)]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_seed_decides_the_order_and_nothing_else_does(pairs):
    def first(seed, **settings):
        run = Run(data=Data(data=str(pairs[0]), split="1", **settings), training=Training(seq_length=16, seed=seed))
        return build_datasets(run, {"train": 100}, 65_000, EOD, log=quiet).train.tokens(0).tolist()

    assert first(1) == first(1) != first(2)
    assert first(1, data_cache=str(pairs[0].parent / "elsewhere")) == first(1)


def test_blend_keeps_the_weights_and_each_datasets_order(pairs):
    run = run_of(f"0.7 {pairs[0]} 0.3 {pairs[1]}", split="1")
    blend = build_datasets(run, {"train": 200}, 65_000, EOD, log=quiet).train
    assert isinstance(blend, BlendedDataset) and len(blend) == 200
    from_b = [blend.tokens(i)[0] >= 30_000 for i in range(200)]
    assert sum(from_b) == 60
    alone = [blend.datasets[1].tokens(i).tolist() for i in range(60)]
    assert [blend.tokens(i).tolist() for i in range(200) if from_b[i]] == alone


@pytest.mark.parametrize("count", [1, 7, 50, 199, 1000, 5000])
def test_no_blend_ever_runs_out(pairs, count):
    """The failure users of Megatron know: a sample of the blend that its dataset does not have."""
    for data in (f"0.999 {pairs[0]} 0.001 {pairs[1]}", f"{pairs[0]} {pairs[1]}", f"1 {pairs[0]} 1 {pairs[1]} 5 {pairs[0]}"):
        blend = build_datasets(run_of(data, split="1"), {"train": count}, 65_000, EOD, log=quiet).train
        for i in {0, count // 2, count - 1}:
            assert len(blend.tokens(i)) == 17


def test_without_weights_all_data_is_seen_once_before_any_twice(pairs):
    sizes = [(IndexedDataset(prefix).num_tokens - 1) // 16 for prefix in pairs]
    blend = build_datasets(run_of(f"{pairs[0]} {pairs[1]}", split="1"), {"train": sum(sizes)}, 65_000, EOD, log=quiet).train
    seen = np.concatenate([blend.tokens(i)[:-1] for i in range(len(blend))])
    assert len(np.unique(seen)) == len(seen) == sum(sizes) * 16


def test_empty_split_says_what_to_set(tmp_path):
    prefix = write_pair(tmp_path / "P", [[1, 2, 3]] * 10)
    with pytest.raises(DataError, match="gives valid none of the 10 documents") as caught:
        build_datasets(run_of(str(prefix), split="100,0,0"), {"train": 1, "valid": 1}, 100, None, log=quiet)
    assert "--eval-interval 0" in str(caught.value)
    empty = write_pair(tmp_path / "Q", [[], []])
    with pytest.raises(DataError, match="hold no tokens"):
        build_datasets(run_of(str(empty), split="1"), {"train": 1}, 100, None, log=quiet)


def test_tokens_outside_the_vocabulary_are_named(pairs, tmp_path):
    train = build_datasets(run_of(str(pairs[0]), split="1"), {"train": 10}, 100, None, log=quiet).train
    with pytest.raises(DataError, match=r"must be in \[0, 100\)"):
        for i in range(10):
            train.tokens(i)
    negative = write_pair(tmp_path / "N", [[5, -1, 5, 5]], "<i4")
    with pytest.raises(DataError, match="token -1 in sample 0"):
        build_datasets(run_of(str(negative), seq_length=3, split="1"), {"train": 1}, 100, None, log=quiet).train.tokens(0)


def test_recorded_vocabulary_larger_than_the_models_is_refused_at_once(pairs):
    data = IndexedDataset(pairs[0])
    metadata = DatasetMetadata(
        tokenizer="t.json",
        tokenizer_sha256="0",
        vocab_size=50_257,
        eod=0,
        append_eod=True,
        dtype="uint16",
        documents=data.num_documents,
        sequences=len(data),
        tokens=data.num_tokens,
    )
    write_metadata(pairs[0], metadata)
    with pytest.raises(DataError, match="set --vocab-size 50257"):
        build_datasets(run_of(str(pairs[0])), {"train": 10}, 50_000, 0, log=quiet)


def test_no_data_and_float_data_are_refused(tmp_path):
    with pytest.raises(DataError, match="--mock-data"):
        build_datasets(Run(), {"train": 1}, 100, None, log=quiet)
    (tmp_path / "F.bin").write_bytes(np.zeros(4, "<f4").tobytes())
    index = bytearray(write_pair(tmp_path / "I", [[1, 2, 3, 4]], "<i4").with_suffix(".idx").read_bytes())
    index[17] = 7
    (tmp_path / "F.idx").write_bytes(index)
    with pytest.raises(DataError, match="holds float32"):
        build_datasets(run_of(str(tmp_path / "F")), {"train": 1}, 100, None, log=quiet)


def mock(**settings):
    return MockDataset(100, **{"seq_length": 64, "vocab_size": 1000, "seed": 7, **settings})


def test_mock_data_is_a_function_of_seed_and_index():
    assert mock().tokens(3).tolist() == mock().tokens(3).tolist()
    different = [mock().tokens(4), mock(seed=8).tokens(3), mock(stream=1).tokens(3)]
    assert all(other.tolist() != mock().tokens(3).tolist() for other in different)
    # Pinned: a resumed run on another version of numpy must see the same tokens.
    assert mock(seq_length=7).tokens(0).tolist() == PINNED


PINNED = [507, 3, 172, 180, 188, 196, 204, 212]


@pytest.mark.parametrize("vocab_size, eod", [(3, 2), (2, None), (257, 256), (1000, 0), (50_257, 50_256), (1000, 100)])
def test_mock_data_fits_every_vocabulary_and_can_be_learnt(vocab_size, eod):
    data = mock(vocab_size=vocab_size, eod=eod, seq_length=2000)
    tokens = np.stack([data.tokens(i) for i in range(20)])
    assert tokens.dtype == np.int64 and tokens.min() >= 0 and tokens.max() < vocab_size
    if eod is not None:
        assert 0.02 < (tokens == eod).mean() < 0.12
    successors = {}
    for before, after in zip(tokens[:, :-1].ravel().tolist(), tokens[:, 1:].ravel().tolist(), strict=True):
        successors.setdefault(before, []).append(after)
    likely = sum(max(np.bincount(after)) for key, after in successors.items() if key != eod)
    assert likely / sum(len(after) for key, after in successors.items() if key != eod) > 0.7


def test_mock_datasets_of_a_run():
    run = Run(data=Data(mock_data=True), training=Training(seq_length=8))
    built = build_datasets(run, {"train": 5, "valid": 2}, 100, 99, log=quiet)
    assert len(built.train) == 5 and len(built.valid) == 2 and built.test is None
    assert built.train.tokens(0).tolist() != built.valid.tokens(0).tolist()
    with pytest.raises(IndexError):
        built.train.tokens(5)
    with pytest.raises(DataError, match="--vocab-size 2"):
        build_datasets(run, {"train": 5}, 2, 0, log=quiet)
