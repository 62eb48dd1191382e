"""What the tests of `megactl doctor` and the processes they start share. Imports little, since every process waits for it."""

from __future__ import annotations

from megactl.machine.check import Check, NodeReport
from megactl.machine.gather import Place

REPORT = NodeReport("n2", (Check("versions", "torch", "2.13", alike="problem"), Check("host", "clock", "off", "warning", "set it")))


def place(number: int, port: str, nodes: int = 2, token: str = "7.0") -> Place:
    """Node `number` of a step of `nodes` with one task each, all of them on this machine."""
    return Place(number, nodes, number, 0, "127.0.0.1", int(port), tuple(f"n{index + 1}" for index in range(nodes)), token)


# A stand-in for torch that imports at once: the part of it that the probe asks. Its folder goes on PYTHONPATH as `torch`.

SOURCE = """
import os
if os.environ.get("BROKEN_TORCH") == "1":
    raise ImportError("libcudart.so.13: cannot open shared object file")
if os.environ.get("BROKEN_TORCH") == "2":
    os.kill(os.getpid(), 11)
if os.environ.get("BROKEN_TORCH") == "3":
    import time
    time.sleep(60)
__version__ = os.environ.get("FAKE_TORCH", "2.13.0")
class version:
    cuda = hip = None
class cuda:
    is_available = staticmethod(lambda: False)
class distributed:
    is_available = is_gloo_available = staticmethod(lambda: True)
class backends:
    class cudnn:
        version = staticmethod(lambda: None)
"""
