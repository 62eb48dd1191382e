"""Mutated logs: nothing crashes or hangs, and both scanners make the same of them. A million lines at night, some thousands always."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from log_samples import LINES, mutated_text

from megactl.report.logs.anchors import ANCHORS, COMMON
from megactl.report.logs.python_scanner import PythonScanner
from megactl.report.logs.reading import read_many, read_runs
from megactl.report.logs.records import EVENT_KINDS, SYSTEMS, VALUE_COLUMNS, Run, Unreadable
from megactl.report.logs.scanning import Batch, make_scanner
from megactl.storage.native import native_module

ROOT = Path(__file__).resolve().parents[2]
SOME = ("save-checkpoint", "forward-compute")


def sound(run):
    """Whether a run holds together."""
    rows = run.iterations
    columns = [rows.total, rows.line, rows.interrupted, *(getattr(rows, name) for name in VALUE_COLUMNS), *rows.losses.values()]
    assert {len(column) for column in columns} == {len(rows)}
    assert run.system in SYSTEMS and {event.kind for event in run.events} <= set(EVENT_KINDS)
    assert sorted(run.iterations.line) == run.iterations.line.tolist() and run.first_line <= run.last_line + 1
    return True


def scan(scanner, text, pieces=1):
    size = len(text) // pieces + 1
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        scanner.feed(piece, len(piece))
    scanner.finish()
    return Batch(*scanner.take())


@pytest.mark.parametrize("seed", range(3))
def test_mutated_logs_are_read(tmp_path, seed):
    path = tmp_path / "x.out"
    path.write_bytes(mutated_text(1000, 100 + seed))
    assert all(sound(run) for run in read_runs(path))
    assert repr(read_runs(path)) == repr(read_runs(path, scanner=PythonScanner(1 << 16)))


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_read_or_refused(tmp_path, seed):
    draw = random.Random(seed)
    path = tmp_path / "x.out"
    path.write_bytes(bytes(draw.choices(b" |:()%{}.0123456789\n\r\x1b[eEiterationlossms", k=20_000)) + "\n".join(LINES).encode())
    for found in read_many([path]):
        assert isinstance(found, Unreadable) or sound(found)


HOSTILE = {
    "a line without an end": b"iteration 5/ 10 | elapsed time per iteration (ms): 1 | " * 60_000,
    "bars": b"|" * 3_000_000,
    "percents": b"%" * 3_000_000,
    "pairs": b"%|" * 1_500_000,
    "carriage returns": b"time (ms) | a: 1\r" * 200_000,
    "newlines": b"\n" * 3_000_000,
    "digits": b"iteration " + b"9" * 3_000_000,
    "dots": b"time across ranks (ms)\n" + b"." * 1_000_000 + b": (" * 500_000,
    "escapes": b"time (ms) | \x1b[" * 200_000,
    "heads": b"elapsed time per iteration" + b"iteration 1/ 1 |" * 200_000,
    "braces": b"[config.py:1:print]   json = {\n" + b"{" * 3_000_000,
    "brackets": b"TrainingArguments(" + b"(" * 60_000 + b"\n" + b"(" * 3_000_000,
    "colons": b"elapsed time per iteration | iteration 1/ 1 |" + b":" * 3_000_000,
    "blocks": b"- arguments -\n  a .. b\n" * 10_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_is_linear_whatever_the_input(tmp_path, name):
    """Three megabytes of each: any step that went back over the text would take minutes, the limit of pytest-timeout."""
    path = tmp_path / "x.out"
    path.write_bytes(HOSTILE[name])
    for found in read_many([path]):
        assert isinstance(found, Run)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_million_mutated_lines(tmp_path):
    if native_module() is None:
        pytest.skip("megactl._native is not built")
    path, lines, step = tmp_path / "x.out", 0, 5000
    while lines < 1_000_000:
        text = mutated_text(step, lines)
        lines += step
        whole = scan(make_scanner(1 << 16), text)
        assert whole == scan(make_scanner(1 << 16), text, pieces=37)
        path.write_bytes(text)
        for found in read_many([path]):
            assert isinstance(found, Unreadable) or sound(found)
        if lines % 50_000 == 0:
            assert whole == scan(PythonScanner(1 << 16), text)
            assert scan(make_scanner(1 << 16, SOME), text) == scan(PythonScanner(1 << 16, SOME), text)


def fuzzer(folder):
    """The standalone fuzzer with sanitizers, built."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    binary = folder / "fuzz_log_scanner"
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = Path(__file__).with_name("fuzz_log_scanner.cpp")
    subprocess.run([compiler, *flags, f"-I{ROOT / 'megactl' / 'csrc'}", str(source), "-o", str(binary)], check=True, timeout=600)
    return binary


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_a_million_lines_under_sanitizers(tmp_path):
    (tmp_path / "table").write_bytes(b"".join(b"%d %d %s\n" % (anchor.kinds, anchor.follow, anchor.text) for anchor in ANCHORS))
    (tmp_path / "common").write_bytes(COMMON)
    (tmp_path / "lines").write_text("\n".join(line.replace("\r", " ") for line in LINES))
    binary, files = fuzzer(tmp_path), [str(tmp_path / name) for name in ("table", "common", "lines")]
    answer = subprocess.run([str(binary), *files, "1000000", str(int(time.time()))], capture_output=True, text=True, timeout=3000)
    assert answer.returncode == 0, f"{answer.stdout}\n{answer.stderr}"
