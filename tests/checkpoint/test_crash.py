"""A save stopped after any one of its operating-system steps, by a kill or by a power cut, leaves the old checkpoint or the new one.

The save runs in a forked child in which `os` is wrapped: at step n the child undoes what a disk may still lose, and dies on the spot
(no handler and no `finally` runs). The parent then looks at what is left with the ordinary code.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from megactl.engine.checkpoint import find, sweep  # noqa: E402
from megactl.errors import CheckpointError  # noqa: E402
from megactl.storage import durable  # noqa: E402

STEPS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
DIED = 42


class Disk:
    """Counts steps, remembers what has not reached the disk, and loses it at the end.

    kill: nothing is lost. data: files written and not synced become empty. power: also, names made in folders not synced since are gone
    and renames there have not happened.
    """

    def __init__(self, root: Path, stop: int, loses: str) -> None:
        self.root, self.stop, self.loses, self.count = root, stop, loses, 0
        self.real = {name: getattr(os, name) for name in STEPS}
        self.dirty: set[str] = set()  # files with data not synced
        self.made: dict[str, set[str]] = {}  # folder -> names created and not synced
        self.moved: list[tuple[str, str, bytes | None]] = []  # renames whose folder is not synced: from, to, file overwritten
        self.paths: dict[int, str] = {}
        for name in STEPS:
            setattr(os, name, self._step(name))

    def _step(self, name):
        def run(*args, **kwargs):
            self.count += 1
            if self.count == self.stop:
                self._die(name, args)
            result = self.real[name](*args, **kwargs)
            getattr(self, f"_{name}", lambda *_: None)(result, *args)
            return result

        return run

    def _die(self, name, args):
        if name == "write":
            # A write is not one moment: half of it may be there.
            self.real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
            self.dirty.add(self.paths[args[0]])
        if self.loses in ("data", "power"):
            for path in self.dirty:
                if os.path.exists(path):
                    os.truncate(path, 0)
        if self.loses == "power":
            self._forget_names()
        os._exit(DIED)

    def _forget_names(self):
        for source, target, old in reversed(self.moved):
            self.real["rename"](target, source)
            if old is not None:
                Path(target).write_bytes(old)
            self._renamed(target, source)
        for path in [path for paths in self.made.values() for path in paths]:
            if os.path.isdir(path):
                for name in STEPS:
                    setattr(os, name, self.real[name])
                shutil.rmtree(path)
            elif os.path.exists(path):
                self.real["unlink"](path)

    def _open(self, descriptor, path, flags=0, *_):
        # shutil.rmtree opens relative to a folder's descriptor; those names are being deleted and need no tracking.
        if os.path.isabs(path):
            self.paths[descriptor] = str(path)
            if flags & os.O_CREAT:
                self._made_name(path)
                self.dirty.add(str(path))

    def _made_name(self, path):
        self.made.setdefault(os.path.dirname(path), set()).add(str(path))

    def _write(self, _, descriptor, *rest):
        self.dirty.add(self.paths[descriptor])

    def _mkdir(self, _, path, *rest):
        self._made_name(path)

    def _fsync(self, _, descriptor):
        path = self.paths[descriptor]
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self.made.pop(path, None)
            self.moved = [move for move in self.moved if os.path.dirname(move[1]) != path]
        else:
            self.dirty.discard(path)

    def _renamed(self, source, target):
        def moved(path):
            return str(target) + path[len(str(source)) :] if path == str(source) or path.startswith(f"{source}/") else path

        self.dirty = {moved(path) for path in self.dirty}
        self.made = {moved(folder): {moved(path) for path in paths} for folder, paths in self.made.items()}

    def _rename(self, _, source, target):
        self._renamed(source, target)
        self.moved.append((str(source), str(target), None))

    def _replace(self, _, source, target):
        self._renamed(source, target)
        self.moved.append((str(source), str(target), self.overwritten))

    overwritten: bytes | None = None


def stopped_save(kit, root: Path, stop: int, loses: str, step: int, tensors, keep: int, sabotage=None) -> bool:
    """Whether a save of `tensors` died at its step number `stop`; False: it ended before."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, DIED), "the save itself failed"
        return code == DIED
    try:
        if sabotage is not None:
            setattr(durable, *sabotage)
        disk = Disk(root, stop, loses)
        pointer = root / "latest"
        disk.overwritten = pointer.read_bytes() if pointer.exists() else None
        kit.save(root, step, tensors, keep=keep)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


DAILY = (("overwrite", "kill"), ("only one kept", "data"))
SCENARIOS = {"first": ([], 5, 2), "next": ([5], 6, 2), "overwrite": ([5], 5, 2), "retention": ([5, 6], 7, 2), "only one kept": ([5], 6, 1)}


def enumerate_stops(kit, folder: Path, scenario: str, loses: str, sabotage=None):
    """(step number, seeds found, seeds allowed) for a save stopped at each of its steps in turn; seed s is the state of the save of step s,
    99 the new one, None no checkpoint, 'damaged' none that is good."""
    before, step, keep = SCENARIOS[scenario]
    prepared = folder / "prepared"
    for old in before:
        kit.save(prepared, old, kit.state(old), keep=0)
    allowed = {before[-1] if before else None, 99}
    states = {seed: kit.state(seed) for seed in {*before, 99}}
    for stop in range(1, 500):
        root = folder / f"stop-{stop}"
        if before:
            shutil.copytree(prepared, root)
        died = stopped_save(kit, root, stop, loses, step, states[99], keep, sabotage)
        yield stop, what_is_found(kit, root, states), allowed if died else {99}, root
        shutil.rmtree(root, ignore_errors=True)
        if not died:
            return
    raise AssertionError("a save of more than 500 steps")


def what_is_found(kit, root: Path, states):
    try:
        path = find(root, lambda message: None)
        if path is None:
            return None
        loaded = kit.load(path, states[99])
    except CheckpointError:
        return "damaged"
    return next((seed for seed, tensors in states.items() if kit.same(loaded, tensors)), "a mixture")


# A power cut loses all that the others lose; what they leave instead is tried by day where a checkpoint is replaced or deleted.
STOPS = [
    pytest.param(scenario, loses, marks=() if loses == "power" or (scenario, loses) in DAILY else pytest.mark.nightly)
    for scenario in SCENARIOS
    for loses in ("kill", "data", "power")
]


@pytest.mark.parametrize(("scenario", "loses"), STOPS)
def test_old_or_new_after_a_stop_at_any_step(memory_path, kit, scenario, loses):
    stops, new = 0, kit.state(99)
    for stop, found, allowed, root in enumerate_stops(kit, memory_path, scenario, loses):
        assert found in allowed, f"stopped at step {stop}: found {found}"
        # The next start clears up, finds the same, and can save.
        sweep(root, lambda message: None)
        assert not list(root.glob(".*"))
        assert what_is_found(kit, root, {seed: kit.state(seed) for seed in (5, 6, 99)}) == found
        assert kit.same(kit.load(kit.save(root, 8, new), new), new)
        stops += 1
    assert stops > 15


@pytest.mark.parametrize("broken", ["write_file", "sync_folder"])
def test_the_power_cut_is_a_real_test(memory_path, kit, broken):
    """Without a sync the simulated disk must lose a checkpoint, or the tests above prove nothing."""

    def write_without_sync(path, data):
        descriptor = durable.create(path)
        durable.write_all(descriptor, data)
        os.close(descriptor)

    sabotage = (broken, write_without_sync if broken == "write_file" else lambda path: None)
    results = [found in allowed for _, found, allowed, _ in enumerate_stops(kit, memory_path, "only one kept", "power", sabotage)]
    assert not all(results)
