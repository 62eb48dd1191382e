"""The .bin/.idx pair: Megatron's bytes, and a reader that finds damage instead of reading it."""

import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megactl.errors import DataError
from megactl.storage.dataset_metadata import DatasetMetadata, read_metadata, write_metadata
from megactl.storage.indexed import IndexedDataset
from megactl.storage.indexed_format import bin_path, idx_path, token_dtype
from megactl.storage.indexed_writer import IndexedWriter, WriterPosition, complete_pair

# Written by Megatron for the documents [5, 6, 7] and [8, 9] in uint16.
GOLDEN_IDX = bytes.fromhex(
    "4d4d494449445800000100000000000000080200000000000000030000000000000003000000020000000000000000000000"
    "0600000000000000000000000000000001000000000000000200000000000000"
)
GOLDEN_BIN = bytes.fromhex("05000600070008000900")


def write(prefix, documents, dtype="<u2"):
    """A pair whose documents are lists of sequences."""
    writer = IndexedWriter(prefix, np.dtype(dtype))
    for document in documents:
        for sequence in document:
            writer.add_sequence(np.array(sequence, np.int64))
        writer.end_document()
    writer.finish()
    return prefix


def test_bytes_are_megatrons(tmp_path):
    prefix = write(tmp_path / "P", [[[5, 6, 7]], [[8, 9]]])
    assert idx_path(prefix).read_bytes() == GOLDEN_IDX
    assert bin_path(prefix).read_bytes() == GOLDEN_BIN


def test_add_documents_writes_the_same_bytes(tmp_path):
    writer = IndexedWriter(tmp_path / "P", np.dtype("<u2"))
    writer.add_documents(np.array([5, 6, 7], "<u2"), np.array([3], np.int32))
    writer.add_documents(np.array([8, 9], "<u2"), np.array([2], np.int32))
    writer.finish()
    assert idx_path(tmp_path / "P").read_bytes() == GOLDEN_IDX


@pytest.mark.parametrize("name", ["P", "P.bin", "P.idx"])
def test_reads_back(tmp_path, name):
    write(tmp_path / "P", [[[1, 2], [3]], [], [[4, 5, 6], []]])
    data = IndexedDataset(tmp_path / name)
    assert (len(data), data.num_documents, data.num_tokens, data.metadata) == (4, 3, 6, None)
    assert [data.sequence(i).tolist() for i in range(4)] == [[1, 2], [3], [4, 5, 6], []]
    assert [data.document(i).tolist() for i in range(3)] == [[1, 2, 3], [], [4, 5, 6]]
    assert data.sequence(2, 1, 2).tolist() == [5]
    for index, start, stop in [(4, 0, None), (-1, 0, None), (2, 2, 1), (2, 0, 4)]:
        with pytest.raises(IndexError):
            data.sequence(index, start, stop)


@pytest.mark.parametrize("size, name", [(257, "uint16"), (65_499, "uint16"), (65_500, "int32")])
def test_data_type_follows_megatrons_threshold(size, name):
    assert token_dtype(size).name == name


@pytest.mark.parametrize(
    "code, dtype", [(1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (6, "<f8"), (7, "<f4"), (7, "<f8"), (8, "<u2")]
)
def test_every_data_type_code_is_read(tmp_path, code, dtype):
    # Code 7 with 8-byte values is what Megatron wrote in 2021.
    values, size = np.array([1, 2, 3], dtype), np.dtype(dtype).itemsize
    (tmp_path / "P.bin").write_bytes(values.tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 2, 3)
    (tmp_path / "P.idx").write_bytes(header + struct.pack("<2i2q3q", 1, 2, 0, size, 0, 1, 2))
    data = IndexedDataset(tmp_path / "P")
    assert data.dtype == np.dtype(dtype) and data.sequence(1).tolist() == [2, 3]


def test_multimodal_index_has_modes(tmp_path):
    prefix = write(tmp_path / "P", [[[1]], [[2]]])
    with idx_path(prefix).open("ab") as file:
        file.write(b"\0\1")
    assert IndexedDataset(prefix).modes.tolist() == [0, 1]


def test_empty_pair_is_readable(tmp_path):
    data = IndexedDataset(write(tmp_path / "P", []))
    assert (len(data), data.num_tokens) == (0, 0)


def damage(tmp_path, change):
    prefix = write(tmp_path / "P", [[[5, 6, 7]], [[8, 9]]])
    change(prefix)
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    return str(caught.value)


def set_bytes(path, offset, data):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: idx_path(p).unlink(), "does not exist"),
        (lambda p: bin_path(p).unlink(), "an .idx needs its .bin"),
        (lambda p: idx_path(p).write_bytes(b""), "is empty"),
        (lambda p: bin_path(p).write_bytes(b""), "truncated"),
        (lambda p: idx_path(p).write_bytes(GOLDEN_IDX[:20]), "truncated to 20 bytes"),
        (lambda p: idx_path(p).write_bytes(GOLDEN_IDX[:-1]), "is truncated: 2 sequences"),
        (lambda p: idx_path(p).write_bytes(GOLDEN_IDX + b"x"), "is too long"),
        (lambda p: idx_path(p).write_bytes(b"TNTIDX\0\0" + bytes(40)), "old TNTIDX format"),
        (lambda p: idx_path(p).write_bytes(b"PK\3\4" + bytes(60)), "an index starts with"),
        (lambda p: set_bytes(idx_path(p), 9, b"\2"), "version 2"),
        (lambda p: set_bytes(idx_path(p), 17, b"\x63"), "data type code 99"),
        (lambda p: set_bytes(idx_path(p), 18, b"\xff" * 8), "is truncated"),
        (lambda p: set_bytes(idx_path(p), 34, b"\xff" * 4), "has length -1"),
        (lambda p: set_bytes(idx_path(p), 50, b"\7"), "sequence 1 starts at byte 7"),
        (lambda p: set_bytes(idx_path(p), 66, b"\3"), "at document 1"),
        (lambda p: set_bytes(idx_path(p), 74, b"\1"), "it must run from 0 to the 2 sequences"),
        (lambda p: bin_path(p).write_bytes(GOLDEN_BIN[:-1]), "is truncated: the index describes 5 tokens = 10 bytes, it has 9"),
        (lambda p: bin_path(p).write_bytes(GOLDEN_BIN + b"xx"), "is too long"),
    ],
)
def test_damage_is_named(tmp_path, change, words):
    assert words in damage(tmp_path, change)


def test_missing_pair_names_a_near_one(tmp_path):
    write(tmp_path / "corpus_text_document", [[[1]]])
    with pytest.raises(DataError, match=r"did you mean .*corpus_text_document"):
        IndexedDataset(tmp_path / "corpus")


def test_writer_without_end_document_is_explained(tmp_path):
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 1)
    (tmp_path / "P.idx").write_bytes(header + struct.pack("<iqq", 1, 0, 0))
    (tmp_path / "P.bin").write_bytes(b"\1\0")
    with pytest.raises(DataError, match="end_document"):
        IndexedDataset(tmp_path / "P")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair with sequences of many lengths, several to a document."""
    random = np.random.default_rng(3)
    documents = [[random.integers(0, 60_000, random.integers(0, 9)) for _ in range(random.integers(1, 4))] for _ in range(40)]
    return write(tmp_path_factory.mktemp("pair") / "P", documents)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_of_the_index_is_found_or_harmless(pair, tmp_path, data):
    """Header, lengths and offsets contradict the file sizes after any change; only boundaries between documents can move unseen."""
    original = idx_path(pair).read_bytes()
    changed = bytearray(original)
    kind = data.draw(st.sampled_from(["bits", "cut", "grow", "block"]))
    if kind == "bits":
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del changed[data.draw(st.integers(0, len(changed) - 1)) :]
    elif kind == "grow":
        changed += data.draw(st.binary(min_size=1, max_size=40))
    else:
        start = data.draw(st.integers(0, len(changed) - 1))
        block = data.draw(st.binary(min_size=1, max_size=64))[: len(changed) - start]
        changed[start : start + len(block)] = block
    prefix = tmp_path / "Q"
    shutil.copy(bin_path(pair), bin_path(prefix))
    idx_path(prefix).write_bytes(changed)
    try:
        found = IndexedDataset(prefix)
    except DataError:
        return
    good = IndexedDataset(pair)
    if found.modes is not None:
        assert len(changed) == len(original) + len(good)  # grown by one byte a sequence: a valid multimodal index
    assert found.dtype.itemsize == good.dtype.itemsize
    assert found.lengths.tolist() == good.lengths.tolist() and found.offsets.tolist() == good.offsets.tolist()
    assert (np.diff(found.documents) >= 0).all() and found.documents[-1] == len(good)


def test_resume_cuts_back_and_gives_the_same_bytes(tmp_path):
    whole = write(tmp_path / "A", [[[1, 2]], [[3]], [[4, 5, 6]]])
    writer = IndexedWriter(tmp_path / "B", np.dtype("<u2"))
    writer.add_documents(np.array([1, 2], "<u2"), np.array([2], np.int32))
    position = writer.flush()
    writer.add_documents(np.array([9, 9, 9], "<u2"), np.array([3], np.int32))  # lost by the kill
    writer.flush()
    writer.close()
    again = IndexedWriter(tmp_path / "B", np.dtype("<u2"), resume=position)
    again.add_documents(np.array([3, 4, 5, 6], "<u2"), np.array([1, 3], np.int32))
    again.finish()
    assert idx_path(tmp_path / "B").read_bytes() == idx_path(whole).read_bytes()
    assert bin_path(tmp_path / "B").read_bytes() == bin_path(whole).read_bytes()
    with pytest.raises(DataError, match="state file says"):
        IndexedWriter(tmp_path / "B", np.dtype("<u2"), resume=WriterPosition(1000, 5, 5))


def test_completion_may_be_repeated_after_a_kill_between_its_renames(tmp_path):
    writer = IndexedWriter(tmp_path / "P", np.dtype("<u2"))
    writer.add_documents(np.array([5, 6, 7, 8, 9], "<u2"), np.array([3, 2], np.int32))
    position = writer.flush()
    writer.close()
    complete_pair(tmp_path / "P", np.dtype("<u2"), position)
    idx_path(tmp_path / "P").unlink()  # as if killed after the first rename
    complete_pair(tmp_path / "P", np.dtype("<u2"), position)
    assert idx_path(tmp_path / "P").read_bytes() == GOLDEN_IDX


def test_token_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(DataError, match="do not fit uint16"), IndexedWriter(tmp_path / "P", np.dtype("<u2")) as writer:
        writer.add_sequence(np.array([70_000]))


METADATA = DatasetMetadata(
    tokenizer="byte", tokenizer_sha256=None, vocab_size=257, eod=256, append_eod=True, dtype="uint16", documents=2, sequences=2, tokens=5
)


def test_metadata_round_trip_and_check(tmp_path):
    prefix = write(tmp_path / "P", [[[5, 6, 7]], [[8, 9]]])
    write_metadata(prefix, METADATA)
    assert IndexedDataset(prefix).metadata == METADATA
    write(tmp_path / "P", [[[5, 6, 7]], [[8, 9, 1]]])
    with pytest.raises(DataError, match=r"tokens = 5, but the pair has 6"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"vocab_size": True}, "vocab_size = True"),
        ({"eod": 257}, "eod = 257"),
        ({"schema_version": 9}, "schema_version 9"),
        ({"sources": None}, "sources = None"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, change, words):
    write_metadata(tmp_path / "P", METADATA)
    path = tmp_path / "P.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=words):
        read_metadata(tmp_path / "P")
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_metadata(tmp_path / "P")
