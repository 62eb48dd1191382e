"""Files as they lie on disk: packed, encoded, cut, damaged, or no logs at all."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import sys
import tracemalloc

import pytest
from log_samples import ERAS

from megactl.errors import DataError
from megactl.report.logs.python_scanner import PythonScanner
from megactl.report.logs.reading import read_many, read_runs
from megactl.report.logs.records import Run, Unreadable


def lines(count):
    text = ERAS["2021"][0]
    return "".join(text.replace("        5/", f"{number:9d}/") + "\n" for number in range(1, count + 1))


def write(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def one(path):
    [found] = read_many([path])
    return found


PACKERS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.fixture(params=[*PACKERS, "zstandard"])
def pack(request):
    if request.param == "zstandard":
        return pytest.importorskip("zstandard").ZstdCompressor().compress
    return PACKERS[request.param]


def test_packed_logs_are_known_by_their_content(tmp_path, pack):
    run = one(write(tmp_path / "a.out", pack(lines(3000).encode())))
    assert len(run.iterations) == 3000 and run.warnings == []


def test_packed_parts_one_behind_another(tmp_path, pack):
    text = lines(3000).encode()
    run = one(write(tmp_path / "a.gz", pack(text[:100_001]) + pack(text[100_001:])))
    assert len(run.iterations) == 3000 and run.warnings == []


def test_of_a_cut_file_the_good_part_is_read(tmp_path, pack):
    draw = random.Random(3)
    text = "".join(f"{draw.random()} {line}\n" for line in lines(6000).splitlines())
    packed = pack(text.encode())
    run = one(write(tmp_path / "a.gz", packed[: len(packed) * 2 // 3]))
    assert 300 < len(run.iterations) < 6000
    assert "ends in the middle" in run.warnings[0]


def test_a_damaged_beginning_is_unreadable(tmp_path):
    found = one(write(tmp_path / "a.gz", gzip.compress(b"x" * 5000)[:12] + b"\xff" * 500))
    assert isinstance(found, Unreadable) and found.kind == "damaged" and "gzip" in found.reason


def test_damage_in_the_middle_is_a_warning(tmp_path):
    draw = random.Random(3)
    text = "".join(f"{draw.random()} {line}\n" for line in lines(6000).splitlines())
    packed = bytearray(gzip.compress(text.encode()))
    packed[len(packed) // 2 : len(packed) // 2 + 1000] = b"\xff" * 1000
    found = list(read_many([write(tmp_path / "a.gz", packed)]))
    # What comes out behind the damage may repeat what was before, until it is noticed.
    assert len(found[0].iterations) > 1000 and "damaged" in found[0].warnings[0]


def test_what_follows_packed_data_is_reported(tmp_path):
    run = one(write(tmp_path / "a.gz", gzip.compress(lines(5).encode()) + b"and then text\n"))
    assert len(run.iterations) == 5 and "not gzip" in run.warnings[0]


def test_zstandard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    found = one(write(tmp_path / "a.zst", b"\x28\xb5\x2f\xfd" + b"\0" * 100))
    assert found.kind == "unsupported" and "megactl[zstd]" in found.reason


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_other_encodings_of_unicode(tmp_path, encoding):
    run = one(write(tmp_path / "a.log", lines(500).encode(encoding)))
    assert len(run.iterations) == 500
    assert run.warnings == ([] if encoding == "utf-8-sig" else [run.warnings[0]])


def test_bytes_that_are_no_utf8_disturb_nothing(tmp_path):
    text = "Modèle chargé: RuntimeError: Größe\n".encode("latin-1") + lines(3).encode() + b"\xff\xfe\x80 RuntimeError: x\n"
    run = one(write(tmp_path / "a.log", text))
    assert len(run.iterations) == 3 and "\ufffd" in run.events[0].text


def test_a_hole_at_the_beginning_is_passed_over(tmp_path):
    # What is left when a log is truncated while its writer goes on at its old place.
    run = one(write(tmp_path / "a.log", b"\0" * 300_000 + lines(3).encode()))
    assert len(run.iterations) == 3


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"", "empty"), (b"\0" * 100_000, "empty"), (b"\x7fELF" + b"\0\1\2\3" * 999, "binary"), (b"PK\x03\x04rest", "binary"),
     (bytes(range(256)) * 64, "binary"), (random.Random(1).randbytes(100_000), "binary"), (gzip.compress(b""), "empty"),
     (gzip.compress(bytes(range(256)) * 64), "binary")],
    # Not the bytes themselves: those of gzip hold the time.
    ids=["nothing", "zeros", "program", "zip", "every-byte", "noise", "gzip-of-nothing", "gzip-of-every-byte"],
)  # fmt: skip
def test_what_is_no_log_is_said_to_be_none(tmp_path, data, kind):
    found = one(write(tmp_path / "a.out", data))
    assert isinstance(found, Unreadable) and (found.kind, bool(found.reason)) == (kind, True)


def test_bad_paths_leave_the_good_ones(tmp_path):
    good = write(tmp_path / "good.out", lines(3))
    found = list(read_many([tmp_path / "gone", good, tmp_path, write(tmp_path / "empty", b"")]))
    assert [type(item) for item in found] == [Unreadable, Run, Unreadable, Unreadable]
    assert [item.kind for item in found if isinstance(item, Unreadable)] == ["missing", "unreadable", "empty"]
    with pytest.raises(DataError, match="no such file"):
        read_runs(tmp_path / "gone")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path / "a.out", lines(1))
    path.chmod(0)
    assert "ermission" in one(path).reason


def test_text_of_another_kind_is_one_run_without_iterations(tmp_path):
    run = one(write(tmp_path / "README", "# A project\n\nIt does things.\n"))
    assert (run.system, len(run.iterations), run.events) == ("unknown", 0, [])


def test_half_a_last_line(tmp_path):
    text = lines(3)
    whole = text.rstrip("\n")
    for cut in range(1, 230):
        run = one(write(tmp_path / "a.out", whole[:-cut]))
        row = run.iterations
        assert len(row) in (2, 3)
        # Of the line that was cut there is what was finished, or nothing.
        assert all(value == first or value != value for value, first in zip(row.loss[2:], row.loss[:1], strict=False))
        assert list(row.seconds) == [3.5264] * len(row)


def test_memory_does_not_grow_with_what_is_no_iteration(tmp_path):
    def peak(repeated):
        noise = "".join(f"r6i4n5:40816:{number} [3] setting {number} of srun: error: task {number}\n" for number in range(1000))
        path = write(tmp_path / "a.out", noise * repeated)
        tracemalloc.start()
        run = one(path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(run.events) <= 16 and run.event_counts == {"crash": 1000 * repeated}
        return most

    # Eighteen thousand notes are more than are ever held back.
    assert peak(36) < 1.2 * peak(18)


def test_the_python_scanner_reads_the_same_file(tmp_path):
    path = write(tmp_path / "a.out", lines(50))
    assert repr(read_runs(path)) == repr(read_runs(path, scanner=PythonScanner(1 << 16)))
