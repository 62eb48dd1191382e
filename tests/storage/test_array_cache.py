"""The cache of built indices: shared, locked by the kernel, and never trusted when damaged."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from megactl.errors import DataError
from megactl.storage import array_cache
from megactl.storage.array_cache import FOLDER_NAME, ArrayCache, checksum

KEY = {"kind": "test", "n": 3}


def arrays():
    return {"a": np.arange(300_000, dtype=np.int32).reshape(-1, 2), "b": np.arange(7, dtype=np.uint32), "empty": np.zeros((0, 2), np.int64)}


class Recorder:
    """A builder that counts its calls, and a log that keeps its lines."""

    def __init__(self):
        self.calls, self.lines = 0, []

    def build(self):
        self.calls += 1
        return arrays()


def get(folder, recorder, chosen=None, key=KEY):
    return ArrayCache(folder, chosen, recorder.lines.append).get("sample index", key, recorder.build)


def same(found):
    return all(found[name].dtype == array.dtype and (found[name] == array).all() for name, array in arrays().items())


def test_built_once_then_read(tmp_path):
    recorder = Recorder()
    assert same(get(tmp_path, recorder)) and same(get(tmp_path, recorder))
    assert recorder.calls == 1
    assert get(tmp_path, recorder, key={**KEY, "n": 4}) and recorder.calls == 2
    names = os.listdir(tmp_path / FOLDER_NAME)
    assert sorted(name.rpartition(".")[2] for name in names) == ["cache", "cache", "lock", "lock"]


def cache_file(tmp_path):
    return next((tmp_path / FOLDER_NAME).glob("*.cache"))


@pytest.mark.parametrize("position", ["magic", "header", "first", "middle", "last"])
def test_a_flipped_bit_is_found_and_repaired(tmp_path, position):
    recorder = Recorder()
    get(tmp_path, recorder)
    path = cache_file(tmp_path)
    content = bytearray(path.read_bytes())
    data = content.index(arrays()["a"].tobytes()[:64])
    at = {"magic": 0, "header": 30, "first": data, "middle": data + 600_001, "last": content.rindex(arrays()["b"].tobytes()) + 27}[position]
    content[at] ^= 4
    path.write_bytes(content)
    assert same(get(tmp_path, recorder))
    assert recorder.calls == 2 and any("is damaged" in line for line in recorder.lines)


@pytest.mark.parametrize("size", [0, 5, 200, 600_000])
def test_a_truncated_file_is_found_and_repaired(tmp_path, size):
    recorder = Recorder()
    get(tmp_path, recorder)
    path = cache_file(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    assert same(get(tmp_path, recorder)) and recorder.calls == 2


def test_checksum_sees_every_byte():
    array = np.arange(40_003, dtype=np.uint8)
    before = checksum(array)
    for at in (0, 7, 8, 39_999, 40_002):
        array[at] ^= 1
        assert checksum(array) != before
        array[at] ^= 1
    assert checksum(array) == before


def _build_slowly(folder, marker, queue):
    def build():
        marker.write_text(str(os.getpid()))
        time.sleep(1.0)
        return arrays()

    lines = []
    found = ArrayCache(folder, None, lines.append).get("sample index", KEY, build)
    queue.put((int(found["a"].sum()), lines))


def test_other_processes_wait_for_the_builder_and_say_so(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_build_slowly, args=(tmp_path, tmp_path / f"built-{i}", queue)) for i in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join()
    builders = list(tmp_path.glob("built-*"))
    assert len(builders) == 1 and len({total for total, _ in results}) == 1
    waited = [line for _, lines in results for line in lines if line.startswith("waiting for the sample index: being built by pid")]
    assert len(waited) == 2 and waited[0].endswith(builders[0].read_text())


def test_a_killed_builder_blocks_nobody(tmp_path):
    code = (
        "import sys, time, pathlib\nfrom megactl.storage.array_cache import ArrayCache\n"
        "def build():\n    print('building', flush=True)\n    time.sleep(60)\n"
        "ArrayCache(pathlib.Path(sys.argv[1]), None, print).get('sample index', {'kind': 'test', 'n': 3}, build)\n"
    )
    builder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline().strip() == "building"
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    started, recorder = time.monotonic(), Recorder()
    assert same(get(tmp_path, recorder))
    assert recorder.calls == 1 and time.monotonic() - started < 5


def test_unwritable_data_folder_falls_back_and_says_so(tmp_path, monkeypatch):
    data, home = tmp_path / "data", tmp_path / "home"
    data.mkdir()
    (data / FOLDER_NAME).write_text("a file where the folder should be: not even root can write into it")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    recorder = Recorder()
    assert same(get(data, recorder))
    assert any("cannot be written" in line and str(home) in line for line in recorder.lines)
    assert list((home / "megactl" / "index").glob("*.cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / FOLDER_NAME))
    with pytest.raises(DataError, match="set --data-cache"):
        get(data, recorder)


def test_chosen_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-cache"):
        get(tmp_path, Recorder(), chosen=str(tmp_path / "file"))
    assert same(get(tmp_path, Recorder(), chosen=str(tmp_path / "new" / "cache")))
    assert not (tmp_path / FOLDER_NAME).exists()


def test_file_system_without_locks_still_builds(tmp_path, monkeypatch):
    import errno

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(array_cache.fcntl, "flock", refuse)
    recorder = Recorder()
    assert same(get(tmp_path, recorder)) and any("no locks" in line for line in recorder.lines)
