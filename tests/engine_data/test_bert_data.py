"""BERT's datasets: which sentences a sample holds, from one pair, from a blend, and generated; and its batches."""

import itertools
import json

import numpy as np
import pytest
import torch

from megactl.config.schema import Data, Model, Run, Training
from megactl.engine.data import BatchLoader, BertDataset, BlendedPairs, MockPairs, PairDataset, build_datasets, make_pair_batch
from megactl.engine.data.masking import MaskingRules
from megactl.errors import DataError
from megactl.storage.indexed import IndexedDataset
from megactl.storage.indexed_writer import IndexedWriter
from megactl.storage.tokenizer import load_tokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
VOCABULARY = 30_000


def quiet(message):
    pass


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *(f"{'##' if i % 3 == 0 else ''}t{i}" for i in range(5, VOCABULARY))]) + "\n")
    return path


def write_sentences(prefix, documents):
    writer = IndexedWriter(prefix, np.dtype("<u2"))
    for document in documents:
        for sentence in document:
            writer.add_sequence(np.asarray(sentence, np.int64))
        writer.end_document()
    writer.finish()
    return prefix


def make_documents(count, seed, first=5):
    """Documents of 0 to 8 sentences of 1 to 12 numbered tokens, so that every token tells where it comes from."""
    draw, documents, token = np.random.default_rng(seed), [], first
    for _ in range(count):
        document = []
        for length in draw.integers(1, 13, draw.integers(0, 9)):
            document.append(np.arange(token, token + length))
            token += int(length)
        documents.append(document)
    assert token < VOCABULARY
    return documents


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return write_sentences(folder / "a", make_documents(300, 1)), write_sentences(folder / "b", make_documents(200, 2, first=15_000))


def run_of(data, vocab, *, seq_length=32, seed=1234, sentence_head=True, **settings):
    settings = {"split": "1", "tokenizer": str(vocab) if vocab else None, **settings}
    return Run(
        model=Model(architecture="bert", sentence_head=sentence_head),
        data=Data(data=data, **settings),
        training=Training(seq_length=seq_length, seed=seed),
    )


def train_set(run, count=500):
    return build_datasets(run, {"train": count}, VOCABULARY, None, log=quiet).train


def parts(item):
    """The tokens of A and of B before masking."""
    original = np.where(item.loss_mask == 1, item.labels, item.tokens)[: item.length]
    types = item.token_types[: item.length]
    return [original[types == number][int(number == 0) : -1].tolist() for number in (0, 1)]


def consecutive(tokens):
    return all(two == one + 1 for one, two in itertools.pairwise(tokens))


def test_pairs_are_consecutive_sentences_of_one_document_in_either_order(pairs, vocab):
    data, dataset = IndexedDataset(pairs[0]), train_set(run_of(str(pairs[0]), vocab))
    assert isinstance(dataset, BertDataset) and len(dataset) >= 500
    # Tokens are numbered from 5 on, so a document is a range of them.
    document_of = np.repeat(np.arange(data.num_documents), np.diff([0, *np.cumsum(data.lengths)[np.array(data.documents[1:]) - 1]]))
    flags = []
    for i in range(len(dataset)):
        item = dataset.sample(i)
        a, b = parts(item)
        assert consecutive(a) and consecutive(b) and len(a) and len(b)
        assert len({int(document_of[token - 5]) for token in a + b}) == 1
        assert (a[0] > b[-1]) == item.flag
        flags.append(item.flag)
    assert 0.4 < np.mean(flags) < 0.6


def test_next_sentence_task_takes_the_second_part_from_another_document(pairs, vocab):
    data = IndexedDataset(pairs[0])
    ends = np.cumsum(data.lengths) + 5
    dataset = train_set(run_of(str(pairs[0]), vocab, sentence_task="nsp"))
    elsewhere = set()
    for i in range(len(dataset)):
        item = dataset.sample(i)
        a, b = parts(item)
        assert consecutive(a) and consecutive(b) and len(a) and len(b)
        of_a, of_b = (
            int(np.searchsorted(data.documents, int(np.searchsorted(ends, part[0], side="right")), side="right")) for part in (a, b)
        )
        assert (of_a != of_b) == item.flag
        assert item.flag or a[-1] < b[0]
        elsewhere |= {of_b} if item.flag else set()
    assert len(elsewhere) > 100
    assert 0.4 < np.mean([dataset.sample(i).flag for i in range(500)]) < 0.6


def test_one_document_has_no_other_one(tmp_path, vocab):
    prefix = write_sentences(tmp_path / "P", [[], [[5, 6], [7], [8, 9]], []])
    assert len(train_set(run_of(str(prefix), vocab), 3)) >= 3
    with pytest.raises(DataError, match="--sentence-task sop"):
        train_set(run_of(str(prefix), vocab, sentence_task="nsp"), 3)


def test_without_the_head_a_sample_is_one_part(pairs, vocab):
    dataset = train_set(run_of(str(pairs[0]), vocab, sentence_head=False))
    for i in range(len(dataset)):
        item = dataset.sample(i)
        assert not item.token_types.any() and not item.flag
        assert consecutive(parts(item)[0])
    assert make_pair_batch(dataset, 0, 2).sentence_labels is None


def test_a_sample_depends_on_seed_and_index_alone(pairs, vocab, tmp_path):
    def tokens(i, **settings):
        return train_set(run_of(str(pairs[0]), vocab, **settings)).sample(i).tokens.tolist()

    assert tokens(3) == tokens(3, data_cache=str(tmp_path)) != tokens(4)
    assert tokens(3, seed=5) != tokens(3)
    # The seed may be at the end of its range.
    assert tokens(3, seed=2**32 - 1) == tokens(3, seed=2**32 - 1)


def test_blend_keeps_the_weights_and_each_datasets_order(pairs, vocab):
    blend = train_set(run_of(f"0.7 {pairs[0]} 0.3 {pairs[1]}", vocab), 200)
    assert isinstance(blend, BlendedPairs) and isinstance(blend, PairDataset) and blend.pair and len(blend) == 200
    from_b = [parts(blend.sample(i))[0][0] >= 15_000 for i in range(200)]
    assert sum(from_b) == 60
    alone = [blend.datasets[1].sample(i).tokens.tolist() for i in range(60)]
    assert [blend.sample(i).tokens.tolist() for i in range(200) if from_b[i]] == alone


@pytest.mark.parametrize("count", [1, 50, 700])
def test_blend_without_weights_never_runs_out(pairs, vocab, count):
    blend = train_set(run_of(f"{pairs[0]} {pairs[1]}", vocab), count)
    assert [blend.sample(i).length > 3 for i in {0, count - 1}]


def test_splits_share_no_document(pairs, vocab):
    run = run_of(str(pairs[0]), vocab, split="80,15,5")
    built = build_datasets(run, {"train": 50, "valid": 20, "test": 5}, VOCABULARY, None, log=quiet)
    seen = [{token for i in range(len(part)) for side in parts(part.sample(i)) for token in side} for part in (built.train, built.valid)]
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_form_of_the_data_must_be_the_models(tmp_path, pairs, vocab):
    documents = write_sentences(tmp_path / "D", [[[5, 6, 7]], [[8, 9]]])
    with pytest.raises(DataError, match="--split-sentences"):
        train_set(run_of(str(documents), vocab))
    with pytest.raises(DataError, match="use --model bert"):
        build_datasets(Run(data=Data(data=str(pairs[0]), split="1")), {"train": 1}, VOCABULARY, None, log=quiet)


def test_recorded_form_decides_where_there_is_one(tmp_path, vocab):
    prefix = write_sentences(tmp_path / "P", [[[5, 6, 7]], [[8, 9]]])
    facts = {"tokenizer": str(vocab), "vocab_size": VOCABULARY, "append_eod": False, "dtype": "uint16", "sources": [], "checksums": {}}
    facts |= {"documents": 2, "sequences": 2, "tokens": 5, "schema_version": 1, "split_sentences": True}
    facts |= {"tokenizer_sha256": load_tokenizer(vocab).describe()["sha256"]}
    (tmp_path / "P.json").write_text(json.dumps(facts))
    assert len(train_set(run_of(str(prefix), vocab, sentence_head=False), 2)) == 2
    with pytest.raises(DataError, match="none of the 2 documents has two sentences"):
        train_set(run_of(str(prefix), vocab), 2)
    (tmp_path / "P.json").write_text(json.dumps(facts | {"split_sentences": "yes"}))
    with pytest.raises(DataError, match="split_sentences = 'yes'"):
        train_set(run_of(str(prefix), vocab), 2)


def test_tokenizer_must_be_known_and_have_the_tokens_of_a_pair(pairs, tmp_path):
    with pytest.raises(DataError, match="--tokenizer"):
        train_set(run_of(str(pairs[0]), None))
    with pytest.raises(DataError, match=r"has no \[CLS\], \[SEP\], \[MASK\], \[PAD\]"):
        train_set(run_of(str(pairs[0]), "byte"))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    dataset = train_set(run_of(str(pairs[0]), tmp_path / "vocab.txt"))
    with pytest.raises(DataError, match=r"must be in \[0, 6\)"):
        dataset.sample(0)


def test_a_tokenizer_that_has_changed_since_is_noticed(tmp_path, vocab):
    prefix = write_sentences(tmp_path / "P", [[[5, 6], [7]], [[8], [9]]])
    copy = tmp_path / "vocab.txt"
    copy.write_bytes(vocab.read_bytes())
    facts = {"tokenizer": str(copy), "tokenizer_sha256": load_tokenizer(copy).describe()["sha256"], "vocab_size": VOCABULARY}
    facts |= {"append_eod": False, "dtype": "uint16", "sources": [], "checksums": {}, "split_sentences": True}
    facts |= {"documents": 2, "sequences": 4, "tokens": 5, "schema_version": 1}
    (tmp_path / "P.json").write_text(json.dumps(facts))
    # A resolved run names the recorded one itself.
    for spec in (None, copy):
        assert len(train_set(run_of(str(prefix), spec), 2)) >= 2
    copy.write_text(copy.read_text().replace("t5\n", "u5\n"))
    for spec in (None, copy):
        with pytest.raises(DataError, match="was made with another tokenizer"):
            train_set(run_of(str(prefix), spec), 2)
    assert len(train_set(run_of(str(prefix), vocab), 2)) >= 2


def test_batches_are_padded_to_one_shape(pairs, vocab):
    dataset = train_set(run_of(str(pairs[0]), vocab))
    batch = make_pair_batch(dataset, 3, 4)
    samples = [dataset.sample(i) for i in range(3, 7)]
    for field, number in (("tokens", 0), ("token_types", 1), ("labels", 2), ("loss_mask", 3)):
        tensor = getattr(batch, field)
        assert tensor.is_contiguous() and tensor.tolist() == [item[number].tolist() for item in samples]
    assert [batch.tokens.dtype, batch.token_types.dtype, batch.labels.dtype, batch.loss_mask.dtype] == [torch.int64] * 3 + [torch.float32]
    assert batch.padding_mask.dtype == torch.bool and batch.padding_mask.sum(1).tolist() == [item.length for item in samples]
    assert (batch.padding_mask == (batch.tokens != PAD)).all() or (batch.loss_mask[batch.tokens == PAD] == 1).any()
    assert batch.position_ids.tolist() == [list(range(32))] * 4 and batch.segments is None
    assert batch.sentence_labels.dtype == torch.int64 and batch.sentence_labels.tolist() == [int(item.flag) for item in samples]
    with pytest.raises(DataError, match="has "):
        make_pair_batch(dataset, len(dataset), 1)


@pytest.mark.parametrize("micro, ranks, steps", [(1, 1, 12), (2, 3, 2), (3, 2, 2)])
def test_every_layout_reads_the_same_samples_in_a_step(pairs, vocab, micro, ranks, steps):
    dataset = train_set(run_of(str(pairs[0]), vocab))
    loaders = [BatchLoader(dataset, micro, rank, ranks, eod=None) for rank in range(ranks)]
    rows = [row for index in range(steps) for loader in loaders for row in loader.micro_batch(24, index).tokens.tolist()]
    assert rows == [dataset.sample(24 + i).tokens.tolist() for i in range(micro * ranks * steps)]
    with loaders[0].prefetch([(24, 0), (24, 1)]) as batches:
        assert [batch.tokens.tolist() for batch in batches] == [loaders[0].micro_batch(24, i).tokens.tolist() for i in range(2)]


def mock(count=300, *, pair=True, **settings):
    return MockPairs(count, MaskingRules(pair=pair), **{"seq_length": 64, "vocab_size": 256, "seed": 7, **settings})


@pytest.mark.parametrize(
    "pair, elsewhere, vocab_size, seq_length",
    [(True, False, 256, 64), (True, True, 9, 64), (False, False, 8, 8), (True, True, 30_522, 512)],
)
def test_mock_pairs_have_structure_to_learn(pair, elsewhere, vocab_size, seq_length):
    data = mock(pair=pair, elsewhere=elsewhere, vocab_size=vocab_size, seq_length=seq_length)
    flags, lengths, size = [], [], min(vocab_size - 5, 8)

    def follows(one, two):
        return (one - 5) // size == (two - 5) // size and (two - one) % size == 1 % size

    for i in range(300):
        item = data.sample(i)
        a, b = parts(item) if pair else (parts(item)[0], [])
        assert min(a + b) >= 5 and item.tokens.max() < vocab_size and item.loss_mask.any()
        for part in (a, b):
            assert all(follows(one, two) for one, two in itertools.pairwise(part))
        if pair:
            assert follows(a[-1], b[0]) != item.flag
            flags.append(item.flag)
        lengths.append(item.length)
    assert max(lengths) <= seq_length and min(lengths) < max(lengths)
    assert not pair or 0.4 < np.mean(flags) < 0.6


def test_mock_pairs_are_a_function_of_seed_stream_and_index():
    assert mock().sample(3).tokens.tolist() == mock().sample(3).tokens.tolist()
    for other in (mock().sample(4), mock(seed=8).sample(3), mock(stream=1).sample(3)):
        assert other.tokens.tolist() != mock().sample(3).tokens.tolist()
    with pytest.raises(IndexError):
        mock().sample(300)
    with pytest.raises(DataError, match="--vocab-size 7"):
        mock(vocab_size=7)


def test_mock_data_of_a_bert_run():
    run = Run(model=Model(architecture="bert"), data=Data(mock_data=True), training=Training(seq_length=32))
    built = build_datasets(run, {"train": 5, "valid": 2}, 256, None, log=quiet)
    assert isinstance(built.train, MockPairs) and len(built.valid) == 2 and built.test is None
    assert make_pair_batch(built.train, 0, 5).padding_mask.sum(1).unique().numel() > 1
