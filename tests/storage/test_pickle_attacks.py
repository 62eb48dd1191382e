"""Pickles and archives made to run code, to fill the memory or to take for ever. None is obeyed, each ends in a message.

A payload writes a canary file. Where plain pickle would obey, a process of its own shows that it does: so the canary is known to work.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from megactl.errors import CheckpointError
from megactl.storage.foreign import Contents, Limits, OpenFile, read_pickle, read_safetensors, read_torch_file
from megactl.storage.layouts import inspect

SHORT = struct.pack


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + SHORT("<I", len(data)) + data


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """GLOBAL, a tuple of arguments, REDUCE."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + b"".join(arguments) + b"tR"


def shell(canary: Path) -> str:
    return f"echo run > {canary}"


def python(canary: Path) -> str:
    return f"open({str(canary)!r},'w').write('run')"


def system(canary: Path) -> bytes:
    """What calls os.system."""
    return call("os", "system", text(shell(canary)))


def evaluate(canary: Path) -> bytes:
    """What calls eval."""
    return call("builtins", "eval", text(python(canary)))


def words(canary: Path) -> bytes:
    """["sh", "-c", ...]."""
    return b"]" + b"".join(text(word) + b"a" for word in ("sh", "-c", shell(canary)))


def compiled(canary: Path) -> bytes:
    """A code object."""
    return call("builtins", "compile", text(python(canary)), text("x"), text("exec"))


def mapped(canary: Path) -> bytes:
    """map(exec, [code]), which runs when it is iterated over."""
    return call("builtins", "map", b"cbuiltins\nexec\n", b"]" + text(python(canary)) + b"a")


def nested(data: bytes) -> bytes:
    """Bytes of up to 255."""
    return b"C" + bytes([len(data)]) + data


# name -> the pickle for a canary, which plain pickle.load obeys. Those in REFUSED attack by size, shape or confusion.
SYSTEM, GETATTR = b"cos\nsystem\n", "getattr"
RUN: dict[str, Callable[[Path], bytes]] = {
    "reduce os.system": lambda c: system(c) + b".",
    "reduce posix.system": lambda c: call("posix", "system", text(shell(c))) + b".",
    "reduce subprocess.check_output": lambda c: call("subprocess", "check_output", words(c)) + b".",
    "reduce builtins.eval": lambda c: evaluate(c) + b".",
    "reduce builtins.exec": lambda c: call("builtins", "exec", text(python(c))) + b".",
    "python 2's __builtin__.eval": lambda c: call("__builtin__", "eval", text(python(c))) + b".",
    "stack global": lambda c: b"\x80\x04" + text("os") + text("system") + b"\x93(" + text(shell(c)) + b"tR.",
    "stack global out of the memo": lambda c: (
        b"\x80\x04" + text("system") + b"\x940" + text("os") + b"\x940h\x01h\x00\x93(" + text(shell(c)) + b"tR."
    ),
    "stack global with a dotted name": lambda c: b"\x80\x04" + text("shutil") + text("os.system") + b"\x93(" + text(shell(c)) + b"tR.",
    "inst": lambda c: b"(" + text(shell(c)) + b"ios\nsystem\n.",
    "obj": lambda c: b"(" + SYSTEM + text(shell(c)) + b"o.",
    "newobj": lambda c: b"\x80\x02cbuiltins\nbytes\n(" + mapped(c) + b"t\x81.",
    "newobj_ex": lambda c: b"\x80\x04cbuiltins\nbytes\n(" + mapped(c) + b"t}\x92.",
    "build with __setstate__": lambda c: b"cfunctools\npartial\n(" + SYSTEM + b"tR(" + SYSTEM + b"(" + text(shell(c)) + b"t}Ntb)R.",
    "build changes a class": lambda c: (
        b"cargparse\nNamespace\n(N}" + text("__setstate__") + SYSTEM + b"stb0cargparse\nNamespace\n)\x81" + text(shell(c)) + b"b."
    ),
    "nested getattr and import": lambda c: (
        call("builtins", GETATTR, call("importlib", "import_module", text("os")), text("system")) + b"(" + text(shell(c)) + b"tR."
    ),
    "eval inside a list inside a dict": lambda c: b"}" + text("model") + b"]" + evaluate(c) + b"as.",
    "an eval that is popped away": lambda c: evaluate(c) + b"0N.",
    "an eval as a dictionary's key": lambda c: b"}" + evaluate(c) + b"Ns.",
    "map over exec, consumed by a list": lambda c: call("builtins", "list", mapped(c)) + b".",
    "runpy": lambda c: call("runpy", "_run_code", compiled(c), b"}") + b".",
    "code.InteractiveInterpreter": lambda c: (
        call("builtins", GETATTR, call("code", "InteractiveInterpreter"), text("runsource")) + b"(" + text(python(c)) + b"tR."
    ),
    "pickle.loads inside": lambda c: call("pickle", "loads", nested(system(c) + b".")) + b".",
    "operator.methodcaller": lambda c: (
        call("operator", "methodcaller", text("write_text"), text("run")) + b"(" + call("pathlib", "PosixPath", text(str(c))) + b"tR."
    ),
    "a pickle of protocol 5 in a frame": lambda c: b"\x80\x05\x95" + SHORT("<Q", 10) + system(c) + b".",
    "an item of an OrderedDict": lambda c: call("collections", "OrderedDict") + text("a") + system(c) + b"s.",
    "numpy.load after os.system": lambda c: system(c) + b"0" + call("numpy", "load", text("/dev/null")) + b".",
    "types.FunctionType": lambda c: b"ctypes\nFunctionType\n(" + compiled(c) + b"}tR)R.",
}

TENSOR = ("torch._utils", "_rebuild_tensor_v2")
META = ("torch._utils", "_rebuild_meta_tensor_no_storage")
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
SHAPE = b"(" + b"K\x02" * 1000 + b"t"
# A list that holds the one before it twice, sixty times over: 2^60 paths.
LAUGHS = b"]q\x00" + b"".join(b"0]h" + bytes([i]) + b"ah" + bytes([i]) + b"aq" + bytes([i + 1]) for i in range(60)) + b"."

REFUSED: dict[str, bytes] = {
    "newobj of subprocess.Popen": b"\x80\x02csubprocess\nPopen\n(]" + text("sh") + b"at\x81.",
    "torch.load of another file": call("torch.serialization", "load", text("/tmp/evil.pt")) + b".",
    "torch.storage._load_from_bytes": call("torch.storage", "_load_from_bytes", b"C\x01x") + b".",
    "torch.hub.load": call("torch.hub", "load", text("evil/repo"), text("m")) + b".",
    "numpy.load": call("numpy", "load", text("x.npy"), b"N\x88") + b".",
    "extension code of one byte": b"\x80\x02\x82\x01.",
    "extension code of two bytes": b"\x80\x02\x83\x01\x01.",
    "extension code of four bytes": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent id of a stranger": text("evil") + b"Q.",
    "persistent id as a line": b"Pevil\n.",
    "a persistent storage of an unknown class": b"(" + text("storage") + SYSTEM + text("0") + text("cpu") + b"K\x04tQ.",
    "bytes of 2^63 in 9": b"\x8e" + SHORT("<Q", 2**63) + b".",
    "text of 4 GiB in 5 bytes": b"X\xff\xff\xff\xff.",
    "a bytearray of 2^62": b"\x80\x05\x96" + SHORT("<Q", 2**62) + b".",
    "a long of 2 GiB": b"\x8b\xff\xff\xff\x7f.",
    "a negative length": b"\x8b\xff\xff\xff\xff.",
    "a long of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a tensor of 2^60 elements": call(*TENSOR, STORAGE, b"K\x00", b"\x8a\x08" + bytes(7) + b"\x10\x85", b"K\x01\x85", b"\x89N") + b".",
    "ten thousand lists in each other": b"]" * 10_000 + b"a" * 9_999 + b".",
    "tuples in each other": b")" + b"\x85" * 60_000 + b".",
    "a list that holds itself, as a key": b"}]q\x00h\x00aNsh\x00h\x00s.",
    "lists of lists of the same list": LAUGHS,
    "memo numbers without end": b"N" + b"".join(b"r" + SHORT("<I", 0xFFFFFFFF - i) for i in range(1000)) + b"p" + b"9" * 30 + b"\n.",
    "a memo number that was never given": b"h\x07.",
    "opcodes without end": b"N0" * 60_000 + b"N.",
    "a mark in place of a value": b"(.",
    "a mark inside a tuple": b"((\x86.",
    "an empty stack": b"\x81.",
    "an unknown opcode": b"(\xff.",
    "protocol 200": b"\x80\xc8N.",
    "nothing after the start": b"\x80\x04",
    "out-of-band buffers": b"\x80\x05\x97.",
    "a name of a megabyte": b"c" + b"a" * 1_000_000 + b"\nb\n.",
    "text that is no UTF-8": b"(X\x02\x00\x00\x00\xc3\x28.",
    "the same long list of pairs again and again": (
        b"]q\x00(" + b"(NNt" * 500 + b"e0" + b"ccollections\nOrderedDict\n(h\x00tR0" * 2000 + b"N."
    ),
    "a shape of a thousand dimensions": call(*META, b"ctorch\nfloat32\n", SHAPE, SHAPE) + b".",
    "terminal escapes in a name": b"cos\nsys\x1b]0;title\x07tem\n)R.",
}

LIMITS = Limits(nbytes=8 << 20, opcodes=50_000)


def as_zip(data: bytes, **records: bytes) -> bytes:
    """The pickle in the archive that torch.save writes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/version", "3\n")
        for name, content in records.items():
            archive.writestr(name.replace("__", "/"), content)
    return out.getvalue()


def read(path: Path, reader=read_torch_file) -> Contents | CheckpointError:
    """What reading gives: contents with their problems, or the error."""
    try:
        with OpenFile(path) as file:
            return reader(file, LIMITS)
    except CheckpointError as error:
        return error


def read_in_little_memory(path: Path, reader=read_torch_file) -> Contents | CheckpointError:
    """The same, and memory stays bounded. Watching it takes ten times as long as reading."""
    tracemalloc.start()
    try:
        return read(path, reader)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 150 << 20, f"{peak >> 20} MiB"


def answer(outcome: Contents | CheckpointError) -> str:
    return outcome.message if isinstance(outcome, CheckpointError) else "; ".join(outcome.problems)


@pytest.mark.parametrize("name", [*RUN, *REFUSED])
@pytest.mark.parametrize("form", ["bare", "zip", "legacy", "metadata"])
def test_nothing_runs_and_each_is_named(tmp_path, name, form):
    canary = tmp_path / "canary"
    data = RUN[name](canary) if name in RUN else REFUSED[name]
    if form == "zip":
        data = as_zip(data)
    elif form == "legacy":
        head = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        data = b"".join(head) + data + pickle.dumps([], protocol=2)
    path = tmp_path / ("x.metadata" if form == "metadata" else "x.pt")
    path.write_bytes(data)
    # What is inside an archive is read by the same machine as what lies bare: its memory is watched once.
    outcome = (read_in_little_memory if form == "bare" else read)(path, read_pickle if form == "metadata" else read_torch_file)
    assert not canary.exists()
    assert answer(outcome) or name in HARMLESS, name
    # As a user meets it: a finding, exit code 1, nothing run.
    if form == "zip":
        inventory = inspect(path, LIMITS)
        assert inventory.good == (name in HARMLESS) and not canary.exists()


# They only try to cost something: read in bounded time, there is nothing to complain about.
HARMLESS = {"lists of lists of the same list", "a list that holds itself, as a key"}


def test_there_are_at_least_thirty_kinds():
    assert len(RUN) + len(REFUSED) >= 60


def test_plain_pickle_obeys_each_of_the_first_kind(tmp_path):
    """One process for all: the payloads do what they are said to do, so a reader that runs nothing is seen to run nothing."""
    files = {}
    for index, (name, make) in enumerate(RUN.items()):
        canary = tmp_path / f"canary{index}"
        (tmp_path / f"{index}.pkl").write_bytes(make(canary))
        files[name] = canary
    code = (
        "import pickle, sys\n"
        f"for index in range({len(RUN)}):\n"
        "    try:\n        made = pickle.load(open(f'{sys.argv[1]}/{index}.pkl', 'rb'))\n"
        "        getattr(made, 'wait', lambda: 0)()\n"
        "    except Exception as error: print(index, repr(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    silent = [name for name, canary in files.items() if not canary.exists()]
    assert not silent, (silent, done.stdout, done.stderr)


def test_names_are_said_but_dangers_are_problems(tmp_path):
    def contents(data: bytes) -> Contents:
        (tmp_path / "x.pt").write_bytes(data)
        found = read(tmp_path / "x.pt")
        assert isinstance(found, Contents)
        return found

    user_class = contents(b"cmytrainer.config\nConfig\n)\x81.")
    assert not user_class.problems and "mytrainer.config.Config" in user_class.notes[0]
    function = contents(b"cmytrainer.io\nrebuild\n)R.")
    assert "mytrainer.io.rebuild" in function.problems[0]
    assert not contents(b"ctorch.nn.functional\ngelu\n.").problems
    assert not contents(b"cargparse\nNamespace\n)\x81}" + text("lr") + b"K\x01sb.").problems


ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {}


def archive_kind(words: str):
    def note(make):
        ARCHIVES[make.__name__] = (make, words)
        return make

    return note


GOOD = pickle.dumps({"a": 1}, protocol=2)


@archive_kind("two records")
def a_record_twice(good):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data.pkl", good)
        archive.writestr("x/data.pkl", call("os", "system", text("true")) + b".")
    return out.getvalue()


@archive_kind("leads out")
def a_path_that_leads_out(good):
    return as_zip(good, **{"../../etc/cron": b"x"})


@archive_kind("leads out")
def an_absolute_path(good):
    return as_zip(good, **{"/etc/cron": b"x"})


@archive_kind("at most")
def a_pickle_that_unpacks_to_a_gigabyte(good):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    return packed(data, 1 << 30)


@archive_kind("does not unpack")
def a_pickle_that_unpacks_to_more_than_it_says(good):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packed(b"".join(packer.compress(bytes(1 << 20)) for _ in range(16)) + packer.flush(), 100)


def packed(
    data: bytes, size: int, name: bytes = b"x/data.pkl", method: int = 8, stored: int | None = None, header: int = 0, count: int = 1
) -> bytes:
    """An archive of one record, by hand, with whatever sizes are said."""
    stored = len(data) if stored is None else stored
    local = b"PK\x03\x04" + SHORT("<HHHHHIIIHH", 20, 0, method, 0, 0, 0, stored & 0xFFFFFFFF, size & 0xFFFFFFFF, len(name), 0) + name
    entry = b"PK\x01\x02" + SHORT("<HHHHHHIIIHHHHHII", 20, 20, 0, method, 0, 0, 0, stored, size, len(name), 0, 0, 0, 0, 0, header) + name
    body = local + data
    return body + entry * count + b"PK\x05\x06" + SHORT("<HHHHIIH", 0, 0, count, count, len(entry) * count, len(body), 0)


@archive_kind("two records")
def the_same_entry_a_thousand_times(good):
    return packed(good, len(good), method=0, count=1000)


@archive_kind("reaches into")
def a_record_larger_than_the_file(good):
    return packed(good, 1 << 31, method=0, stored=1 << 31)


@archive_kind("no record at")
def a_record_somewhere_else(good):
    return packed(good, len(good) - 8, method=0, stored=len(good) - 8, header=7)


@archive_kind("method 99")
def a_method_nobody_knows(good):
    return packed(good, len(good), method=99)


@archive_kind("its end says")
def an_end_that_miscounts(good):
    data = bytearray(as_zip(good))
    at = data.rfind(b"PK\x05\x06")
    data[at + 10 : at + 12] = SHORT("<H", 77)
    return bytes(data)


@archive_kind("does not fit")
def a_directory_of_four_gigabytes(good):
    data = bytearray(as_zip(good))
    at = data.rfind(b"PK\x05\x06")
    data[at + 12 : at + 16] = SHORT("<I", 0xFFFFFFF0)
    return bytes(data)


@archive_kind("64-bit end")
def a_64_bit_end_that_is_not_there(good):
    data = bytearray(as_zip(good))
    at = data.rfind(b"PK\x05\x06")
    data[at + 16 : at + 20] = b"\xff\xff\xff\xff"
    return bytes(data)


@archive_kind("checksum")
def a_changed_pickle(good):
    data = as_zip(good)
    at = data.index(good)
    return data[: at + 6] + bytes([data[at + 6] ^ 1]) + data[at + 7 :]


@archive_kind("0 data.pkl")
def no_pickle(good):
    return packed(good, len(good), name=b"x/other", method=0)


@archive_kind("2 data.pkl")
def two_pickles(good):
    return as_zip(good, y__data__pkl=b"").replace(b"y/data/pkl", b"y/data.pkl")


@pytest.mark.parametrize("name", list(ARCHIVES))
def test_archives(tmp_path, name):
    make, words = ARCHIVES[name]
    path = tmp_path / "x.pt"
    path.write_bytes(make(GOOD))
    outcome = read_in_little_memory(path)
    assert isinstance(outcome, CheckpointError) and words in outcome.message, answer(outcome)


def test_overlapping_records(tmp_path):
    """Fifield's bomb: many entries of the directory that share one body."""
    name, data = b"x/data.pkl", GOOD + bytes(100)
    first = packed(data, len(data), name, 0)
    at = first.index(b"PK\x01\x02")
    length = first.index(b"PK\x05\x06") - at
    entries = first[at : at + length] + first[at : at + length].replace(b"x/data.pkl", b"x/data/0.0")
    (tmp_path / "x.pt").write_bytes(first[:at] + entries + b"PK\x05\x06" + SHORT("<HHHHIIH", 0, 0, 2, 2, len(entries), at, 0))
    assert "overlaps" in answer(read_in_little_memory(tmp_path / "x.pt"))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[' + b"4611686018427387904," * 3000 + b'1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
        b'{"a":{"dtype":"PICKLE","shape":[1],"data_offsets":[0,4]}}',
        b"[" * 100_000,
        b"[1]",
        b'{"a":1}',
        b"",
    ],
)
def test_safetensors_headers(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(SHORT("<Q", len(header)) + header + bytes(4))
    with OpenFile(tmp_path / "x.safetensors") as file, pytest.raises(CheckpointError):
        read_safetensors(file)


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(as_zip(GOOD))
    os.truncate(path, 1 << 40)
    assert isinstance(read_in_little_memory(path), CheckpointError)
    path.write_bytes(pickle.dumps({"a": "b"}, protocol=2)[:-1])
    os.truncate(path, 1 << 40)
    assert isinstance(read_in_little_memory(path), CheckpointError)
