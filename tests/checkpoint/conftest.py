"""What the checkpoint tests share: small states cut in pieces, ranks as threads or as forked gloo processes, and reading them back."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from megactl.engine import checkpoint  # noqa: E402
from megactl.engine.checkpoint import Piece, SingleProcess  # noqa: E402
from megactl.storage import checkpoint_folder  # noqa: E402

LAYOUT = {"tp": 1, "cp": 1, "dp": 1, "pp": 1, "zero": 0}


def header(**changes):
    """A valid header for save."""
    base = {
        "consumed_samples": 64,
        "layout": LAYOUT,
        "precision": "bf16",
        "model": {"hidden_size": 8},
        "tokenizer": None,
        "state": {"lr": 0.5},
    }
    return base | changes


def state(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """A model and its optimizer, different for each seed: (name, kind) -> tensor."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in (("embedding.word.weight", (10, 4)), ("layers.0.mlp.bias", (7,)), ("scale", ())):
        master = torch.randn(shape, generator=generator)
        found[name, "master"], found[name, "weight"] = master, master.bfloat16()
        found[name, "exp_avg"], found[name, "exp_avg_sq"] = (torch.randn(shape, generator=generator) for _ in range(2))
    return found


def whole_pieces(tensors) -> list[Piece]:
    """Each tensor as one piece."""
    return [
        Piece(name, kind, tuple(tensor.shape), tuple((0, n) for n in tensor.shape), None, tensor.clone())
        for (name, kind), tensor in tensors.items()
    ]


def save(root: Path, step: int, tensors, *, keep: int = 2, protect: Path | None = None, **changes) -> Path:
    """Save whole tensors from a single process."""
    return checkpoint.save(
        root, step=step, pieces=whole_pieces(tensors), header=header(**changes), group=SingleProcess(), keep=keep, protect=protect
    )


def load(path: Path, like) -> dict[tuple[str, str], torch.Tensor]:
    """Load whole tensors of the names, kinds, shapes and types of `like` into poisoned memory."""
    requests = whole_pieces({key: torch.full_like(tensor, torch.nan) for key, tensor in like.items()})
    checkpoint.load(path, requests)
    return {(request.name, request.kind): request.tensor for request in requests}


def same(one, other) -> bool:
    """Bitwise the same tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


def take(tensor: torch.Tensor, region) -> torch.Tensor:
    """The elements of a region by plain indexing: the independent oracle of the geometry."""
    block = tensor[tuple(slice(start, stop) for start, stop in region.rectangle)].contiguous()
    return block if region.flat_range is None else block.reshape(-1)[region.flat_range[0] : region.flat_range[1]].clone()


class ThreadGroup:
    """A RankGroup whose ranks are threads of this process."""

    def __init__(self, shared, rank: int) -> None:
        self.shared, self.rank, self.size = shared, rank, shared.parties

    def _exchange(self, value):
        self.shared.values[self.rank] = value
        self.shared.wait(timeout=30)
        values = list(self.shared.values)
        self.shared.wait(timeout=30)
        return values

    def gather(self, value):
        values = self._exchange(value)
        return values if self.rank == 0 else None

    def broadcast(self, value):
        return self._exchange(value)[0]

    def all_ok(self, ok, message):
        return [text for text in self._exchange(None if ok else f"rank {self.rank}: {message}") if text is not None]

    def barrier(self):
        self._exchange(None)


def run_threads(size: int, work) -> list:
    """work(group) on `size` threads; the result or the exception of each."""
    shared = threading.Barrier(size)
    shared.values = [None] * size
    results = [None] * size

    def one(rank):
        try:
            results[rank] = work(ThreadGroup(shared, rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def run_processes(size: int, folder: Path, work, seconds: float = 60) -> list[int]:
    """work(group) on `size` forked gloo ranks; exit codes (0 done, 3 CheckpointError with exit code 1, 1 anything else, -n by signal n)."""
    store = folder / f"store-{random.randrange(1 << 30)}"
    children = [_fork(rank, size, store, work) for rank in range(size)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < size and time.monotonic() < deadline:
        for pid in children:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    hung = [pid for pid in children if pid not in codes]
    for pid in hung:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not hung, f"{len(hung)} of {size} ranks hung"
    return [codes[pid] for pid in children]


def _fork(rank: int, size: int, store: Path, work) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        work(checkpoint.ProcessGroup())
        code = 0
    except checkpoint_folder.CheckpointError as error:
        code = 3 if error.exit_code == 1 else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # Never back into pytest: this is a copy of it.
        os._exit(code)


class Kit:
    """The functions above, for tests that cannot import this file by name."""

    header = staticmethod(header)
    state = staticmethod(state)
    whole_pieces = staticmethod(whole_pieces)
    save = staticmethod(save)
    load = staticmethod(load)
    same = staticmethod(same)
    take = staticmethod(take)
    run_threads = staticmethod(run_threads)
    run_processes = staticmethod(run_processes)


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory where there is one: hundreds of saves, and a real sync costs milliseconds each."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def kit():
    return Kit
