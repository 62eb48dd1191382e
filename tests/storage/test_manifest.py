"""manifest.json without torch: strict parsing, refusals one by one, fuzzing, and verification of files."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.errors import CheckpointError
from megactl.storage import manifest as manifests
from megactl.storage import tensor_file
from megactl.storage.manifest import Entry, FileRecord, Header, Manifest
from megactl.storage.pieces import Region

ZEROS = "0" * 64
HEADER = Header(
    schema_version=1,
    megactl="0.1.0",
    step=100,
    consumed_samples=6400,
    precision="bf16",
    layout={"tp": 2, "cp": 1, "dp": 2, "pp": 1, "zero": 1},
    model={"hidden_size": 8, "layernorm_epsilon": 1e-5},
    tokenizer={"kind": "byte"},
    state={"rng": [1, 2]},
    created_at="2026-11-21T00:00:00+00:00",
    host="node-1",
)


def example() -> Manifest:
    """Two files, a tensor split by rows, one in flat ranges, a scalar."""
    one, two = "rank-00000.safetensors", "rank-00001.safetensors"
    files = (FileRecord(one, 100, ZEROS), FileRecord(two, 100, ZEROS))
    entries = (
        Entry("layers.0.w", "weight", (4, 3), Region(((0, 2), (0, 3))), "bfloat16", one, "a", ZEROS),
        Entry("layers.0.w", "weight", (4, 3), Region(((2, 4), (0, 3))), "bfloat16", two, "a", ZEROS),
        Entry("layers.0.w", "master", (4, 3), Region(((0, 4), (0, 3)), (0, 7)), "float32", one, "b", ZEROS),
        Entry("layers.0.w", "master", (4, 3), Region(((0, 4), (0, 3)), (7, 12)), "float32", two, "b", ZEROS),
        Entry("scale", "weight", (), Region(()), "float32", one, "c", ZEROS),
    )
    return Manifest(HEADER, files, entries)


def sealed(document) -> bytes:
    """The bytes of a document with a right checksum: what is tested is then the parser and not the seal."""
    body = json.dumps({key: value for key, value in document.items() if key != "checksum"}).encode()[:-1]
    return body + f',\n"checksum":{{"algorithm":"sha256","value":"{hashlib.sha256(body).hexdigest()}"}}}}\n'.encode()


DOCUMENT = json.loads(manifests.render(example()))


def changed(*path, value):
    """The example with the value at `path` replaced (or, for the value `...`, removed)."""
    document = copy.deepcopy(DOCUMENT)
    at = document
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return document


def test_a_manifest_comes_back():
    assert manifests.parse(manifests.render(example()), "m") == example()
    assert manifests.parse(sealed(DOCUMENT), "m") == example()


REFUSED = [
    (("schema_version",), 2, "reads versions up to 1"),
    (("schema_version",), 0, "at least 1"),
    (("schema_version",), True, "whole number"),
    (("schema_version",), ..., "has no 'schema_version'"),
    (("step",), -1, "at least 0"),
    (("step",), 1.0, "whole number"),
    (("precision",), "int4", "must be one of"),
    (("layout", "tp"), 0, "at least 1"),
    (("layout", "zero"), "1", "whole number"),
    (("layout", "ep"), 1, "unknown key 'ep'"),
    (("layout",), None, "must be an object"),
    (("tokenizer",), "byte", "object or null"),
    (("state",), [], "must be an object"),
    (("surprise",), 1, "unknown key 'surprise'"),
    (("files", 0, "file"), "../rank-00000.safetensors", "plain name"),
    (("files", 0, "file"), "/etc/passwd", "plain name"),
    (("files", 0, "file"), "rank-00000.safetensors\n", "plain name"),
    (("files", 0, "file"), "rank-00001.safetensors", "given once"),
    (("files", 0, "file"), "manifest.json", "plain name"),
    (("files", 0, "size"), 8, "at least 9"),
    (("files", 0, "header_checksum", "algorithm"), "md5", "must be one of sha256"),
    (("files", 0, "extra"), 0, "unknown key"),
    (("tensors",), {}, "must be a list"),
    (("tensors", 0), "x", "must be an object"),
    (("tensors", 0, "name"), "a/../b", "the name must be"),
    (("tensors", 0, "name"), "", "the name must be"),
    (("tensors", 0, "kind"), "momentum", "must be one of"),
    (("tensors", 0, "shape"), [4, 0], "at least 1"),
    (("tensors", 0, "shape"), [4, 4], "shape"),
    (("tensors", 0, "rectangle"), [[0, 2]], "dimensions"),
    (("tensors", 0, "rectangle"), [[0, 2], [0, 4]], "within"),
    (("tensors", 0, "rectangle"), [[-1, 2], [0, 3]], "within"),
    (("tensors", 0, "rectangle"), [[0, 2], [0, 3, 4]], "start, stop"),
    (("tensors", 0, "rectangle"), [[0, 1], [0, 3]], "3 of 12 elements are held by no piece"),
    (("tensors", 0, "rectangle"), [[0, 3], [0, 3]], r"elements \[2:3, 0:3\] are held by more than one"),
    (("tensors", 2, "flat_range"), [0, 6], "1 of 12 elements"),
    (("tensors", 2, "flat_range"), [0, 8], r"elements \[2:3, 1:2\] are held by more than one"),
    (("tensors", 2, "flat_range"), [0, 13], "flat range"),
    (("tensors", 2, "flat_range"), [3, 3], "flat range"),
    (("tensors", 2, "flat_range"), None, "more than one"),
    (("tensors", 1, "dtype"), "float32", "pieces of different types"),
    (("tensors", 0, "dtype"), "int8", "must be one of"),
    (("tensors", 0, "file"), "rank-00009.safetensors", "not in the list of files"),
    (("tensors", 0, "key"), "b", "used twice"),
    (("tensors", 0, "checksum", "value"), "0" * 63, "64 lower-case"),
    (("tensors", 0, "checksum", "value"), "A" * 64, "64 lower-case"),
    (("tensors", 0, "checksum"), ..., "has no 'checksum'"),
]


@pytest.mark.parametrize(("path", "value", "words"), REFUSED)
def test_refused(path, value, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        manifests.parse(sealed(changed(*path, value=value)), "m")
    assert caught.value.hint


@pytest.mark.parametrize("number", range(5))
def test_a_piece_that_is_missing_or_given_twice(number):
    missing = changed("tensors", number, value=...)
    if number != 4:  # without its only piece, the tensor is simply not there
        with pytest.raises(CheckpointError, match="held by no piece"):
            manifests.parse(sealed(missing), "m")
    twice = copy.deepcopy(DOCUMENT)
    twice["tensors"].append(dict(twice["tensors"][number], key="again"))
    with pytest.raises(CheckpointError, match="more than one piece"):
        manifests.parse(sealed(twice), "m")


def test_a_newer_schema_is_named_before_anything_else():
    data = json.dumps({"schema_version": 7, "whatever": 1}).encode()
    with pytest.raises(CheckpointError, match="schema_version = 7") as caught:
        manifests.parse(data, "m")
    assert "newer" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema_version":1}',
        b"[" * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
        b"{" + b'"a":{' * 50_000,
    ],
)
def test_what_is_not_a_manifest_at_all(data):
    with pytest.raises(CheckpointError):
        manifests.parse(data, "m")


@pytest.mark.parametrize("text", ['"step":100,"step":100', '"step":NaN', '"step":Infinity'])
def test_json_that_readers_disagree_on(text):
    with pytest.raises(CheckpointError, match="not valid JSON"):
        manifests.parse(sealed(DOCUMENT).replace(b'"step": 100', text.encode()), "m")


def test_a_change_without_a_new_checksum_is_seen():
    with pytest.raises(CheckpointError, match="does not match its own checksum"):
        manifests.parse(manifests.render(example()).replace(b'"step":100', b'"step":101'), "m")
    with pytest.raises(CheckpointError, match="does not match its own checksum"):
        manifests.parse(json.dumps(DOCUMENT, indent=1).encode(), "m")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Paths of every value in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


PLACES = [path for path in places(DOCUMENT) if path[0] != "checksum"]


@settings(max_examples=400, deadline=None)
@given(edits=st.lists(st.tuples(st.sampled_from(PLACES), JSON | st.just(...)), min_size=1, max_size=3))
def test_any_edit_is_read_faithfully_or_refused(edits):
    document = copy.deepcopy(DOCUMENT)
    for path, value in edits:
        at = document
        try:
            for key in path[:-1]:
                at = at[key]
            if value is ...:
                del at[path[-1]]
            else:
                at[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            pass  # an earlier edit removed the place
    try:
        parsed = manifests.parse(sealed(document), "m")
    except CheckpointError:
        return
    # Accepted: then writing it again must give the same document, nothing dropped or reinterpreted.
    again = json.loads(manifests.render(parsed))
    assert {**again, "checksum": 0} == {**document, "checksum": 0}


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60), at=st.integers(0, 3000), cut=st.integers(0, 60))
def test_any_bytes_are_refused_without_another_exception(data, at, cut):
    whole = manifests.render(example())
    damaged = whole[:at] + data + whole[at + cut :]
    if damaged != whole:
        with pytest.raises(CheckpointError):
            manifests.parse(damaged, "m")


def write_checkpoint(folder, array):
    """A one-tensor checkpoint made by hand, without torch."""
    name = "rank-00000.safetensors"
    written = tensor_file.write(
        folder / name, [tensor_file.Part("w", "float32", array.shape, lambda: memoryview(array.reshape(-1)).cast("B"))]
    )
    entry = Entry("w", "weight", array.shape, Region(tuple((0, n) for n in array.shape)), "float32", name, "w", written.tensors["w"])
    manifest = Manifest(HEADER, (FileRecord(name, written.size, written.header),), (entry,))
    (folder / manifests.FILE_NAME).write_bytes(manifests.render(manifest))
    return manifest


def test_verify_reads_every_byte(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_checkpoint(tmp_path, array)
    report = manifests.verify(tmp_path)
    assert report.ok and report.problems == () and report.files_checked == 1
    assert report.bytes_checked == (tmp_path / "rank-00000.safetensors").stat().st_size
    (tmp_path / "stray.txt").write_text("x")
    assert manifests.verify(tmp_path).notes == ("stray.txt: not part of the checkpoint",)


def test_verify_says_what_is_wrong_with_each_file(tmp_path):
    write_checkpoint(tmp_path, np.ones((3, 4), dtype=np.float32))
    file = tmp_path / "rank-00000.safetensors"
    good = file.read_bytes()
    for damaged, words in (
        (good[:-1] + b"\1", "weight of 'w' does not match"),
        (good[:-1], "bytes, the manifest says"),
        (None, "cannot be opened"),
    ):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        report = manifests.verify(tmp_path)
        assert not report.ok and words in report.problems[0] and "rank-00000.safetensors" in report.problems[0]


def test_verify_where_there_is_no_checkpoint(tmp_path):
    assert "has no manifest.json" in manifests.verify(tmp_path).problems[0]
    assert "no such checkpoint folder" in manifests.verify(tmp_path / "absent").problems[0]


def safetensors_bytes(table, data=b"") -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff" * 16, "does not fit the file"),
        (b"\x00" * 4, "does not fit the file"),
        (safetensors_bytes([]), "must be an object"),
        (safetensors_bytes({"w": {"dtype": "F32", "shape": [1]}}), "has no 'data_offsets'"),
        (safetensors_bytes({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, b"12345678"), "4 apart"),
        (safetensors_bytes({"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "4 apart"),
        (safetensors_bytes({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"), "must start at"),
        (safetensors_bytes({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"), "its tensors end at"),
        (safetensors_bytes({"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "must be one of"),
        (safetensors_bytes({"w": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}, b"1234"), "its tensors end at"),
    ],
)
def test_tensor_files_that_lie(tmp_path, content, words):
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(content)
    length = int.from_bytes(content[:8], "little")
    with pytest.raises(CheckpointError, match=words):
        tensor_file.TensorFile(path, size=len(content), header=tensor_file.digest(content[: 8 + length]))


def test_a_large_manifest_is_read_in_seconds():
    """32 layers of tensors in the pieces of tp 4 x dp 8: the coverage check must not be quadratic in the pieces."""
    file, entries = "rank-00000.safetensors", []
    for layer in range(32):
        for t in range(4):
            for d in range(8):
                region = Region(((t * 256, t * 256 + 256), (0, 100)), (d * 3200, d * 3200 + 3200))
                entries.append(Entry(f"layers.{layer}.w", "master", (1024, 100), region, "float32", file, f"{layer}/{t}/{d}", ZEROS))
    data = manifests.render(Manifest(HEADER, (FileRecord(file, 100, ZEROS),), tuple(entries)))
    start = time.perf_counter()
    manifests.parse(data, "m")
    assert time.perf_counter() - start < 5


def test_looking_at_a_checkpoint_needs_no_torch():
    modules = "manifest, pieces, checkpoint_folder, tensor_file, durable, strict_json"
    code = f"import sys; from megactl.storage import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == "False"
