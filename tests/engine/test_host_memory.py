"""Host memory for offloading, without a GPU: of exact size, given back, and asked for in words that help."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest

torch = pytest.importorskip("torch")

from megactl.engine import host_memory  # noqa: E402
from megactl.engine.host_memory import CopyStream, host_tensor  # noqa: E402
from megactl.errors import RunError  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(("numel", "dtype"), [(1, torch.bfloat16), (4097, torch.float32), (64, torch.float64), (0, torch.float32)])
def test_a_host_tensor_is_zero_and_of_its_size(numel, dtype):
    found = host_tensor(numel, dtype, CPU)
    assert found.shape == (numel,) and found.dtype == dtype and not found.any()
    assert found.untyped_storage().nbytes() == numel * dtype.itemsize
    assert found.data_ptr() % mmap.PAGESIZE == 0


def test_pages_go_with_the_last_view_and_are_unlocked_before(monkeypatch):
    class Pages(host_memory._Pages):
        pass

    seen = []
    monkeypatch.setattr(host_memory, "_Pages", lambda *a, **k: seen.append(weakref.ref(made := Pages(*a, **k))) or made)
    found = host_tensor(1000, torch.float32, CPU)
    mapped = []
    # When it is unlocked the pages must still be there to be read.
    seen[0]()._unlock = lambda pages=seen[0]: mapped.append("unlocked")
    view = found[10:20].view(2, 5)
    del found
    gc.collect()
    assert seen[0]() is not None and not mapped
    view.fill_(1.0)
    del view
    gc.collect()
    assert seen[0]() is None and mapped == ["unlocked"]


def test_memory_that_is_not_there_is_an_error():
    with pytest.raises(RunError) as error:
        host_tensor(2**60, torch.uint8, CPU)
    assert str(2**60) in error.value.message and "offload less" in str(error.value)


class Runtime:
    """A CUDA runtime that locks nothing."""

    def __init__(self, code: int) -> None:
        self.code, self.calls = code, []

    def cudaHostRegister(self, *arguments):
        self.calls.append(("register", *arguments))
        return self.code

    def cudaHostUnregister(self, *arguments):
        self.calls.append(("unregister", *arguments))

    @staticmethod
    def cudaGetErrorString(code):
        return f"error {code}"


def test_for_a_gpu_exactly_these_bytes_are_locked_and_unlocked(monkeypatch):
    runtime = Runtime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    found = host_tensor(1000, torch.float32, torch.device("cuda"))
    address = found.data_ptr()
    assert runtime.calls == [("register", address, 4000, 0)]
    del found
    gc.collect()
    assert runtime.calls[1:] == [("unregister", address)]


def test_what_cuda_does_not_lock_is_an_error(monkeypatch):
    runtime = Runtime(2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(RunError, match="4000 bytes of host memory cannot be page-locked: error 2"):
        host_tensor(1000, torch.float32, torch.device("cuda"))
    gc.collect()
    assert [name for name, *_ in runtime.calls] == ["register"]


def test_copies_on_a_cpu_are_over_when_they_return():
    link, done = CopyStream(CPU), []
    event = link.start(lambda: done.append(1), after=[None])
    assert done == [1] and event is None
    link.wait(event), CopyStream.finish(event)
    with link.behind():
        done.append(2)
    assert done == [1, 2]
