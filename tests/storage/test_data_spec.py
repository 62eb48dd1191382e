"""What --data and --split mean."""

from dataclasses import replace
from pathlib import Path

import pytest

from megactl.errors import DataError
from megactl.storage.data_spec import parse_data, parse_split, recorded_metadata, split_ranges
from megactl.storage.dataset_metadata import DatasetMetadata, write_metadata


@pytest.mark.parametrize(
    "text, prefixes, weights",
    [
        ("a", ["a"], None),
        ("a.bin b.idx", ["a", "b"], None),
        ("0.7 a 0.3 b", ["a", "b"], (0.7, 0.3)),
        ("3 a", ["a"], (3.0,)),
        ("1 '/my data/a' 2 b", ["/my data/a", "b"], (1.0, 2.0)),
        ("data.v1", ["data.v1"], None),
    ],
)
def test_parse_data(text, prefixes, weights):
    spec = parse_data(text)
    assert spec.prefixes == tuple(map(Path, prefixes)) and spec.weights == weights


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "empty"),
        ("0.5 a b", "alternate"),
        ("a 0.5 b", "alternate"),
        ("0 a 1 b", "positive"),
        ("'a", "quot"),
        ("''", "end in a name"),
        ("1 a 1 /", "end in a name"),
    ],
)
def test_parse_data_refuses(text, words):
    with pytest.raises(DataError, match=words):
        parse_data(text)


def test_split():
    assert parse_split("1") == (1.0, 0.0, 0.0)
    assert parse_split("8,1,1") == (0.8, 0.1, 0.1)
    assert split_ranges("969,30,1", 1000) == {"train": (0, 969), "valid": (969, 999), "test": (999, 1000)}
    assert split_ranges("98,2,0", 7) == {"train": (0, 7), "valid": (7, 7), "test": (7, 7)}


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan", "1;2"])
def test_split_refuses(text):
    with pytest.raises(DataError, match="--split"):
        parse_split(text)


def test_split_ranges_cover_every_document():
    for count in (0, 1, 2, 3, 10, 999, 12345):
        ranges = list(split_ranges("969,30,1", count).values())
        assert ranges[0][0] == 0 and ranges[-1][1] == count
        assert all(ranges[i][1] == ranges[i + 1][0] for i in range(2))


def test_recorded_metadata(tmp_path):
    metadata = DatasetMetadata(
        tokenizer="byte",
        tokenizer_sha256=None,
        vocab_size=257,
        eod=256,
        append_eod=True,
        dtype="uint16",
        documents=1,
        sequences=1,
        tokens=1,
    )
    write_metadata(tmp_path / "a", metadata)
    write_metadata(tmp_path / "b", metadata)
    assert recorded_metadata(f"0.5 {tmp_path}/a 0.5 {tmp_path}/b") == metadata
    assert recorded_metadata(f"{tmp_path}/a {tmp_path}/unrecorded") is None
    write_metadata(tmp_path / "b", replace(metadata, vocab_size=300, tokenizer="t.json"))
    with pytest.raises(DataError, match="preprocess them with one tokenizer"):
        recorded_metadata(f"{tmp_path}/a {tmp_path}/b")
