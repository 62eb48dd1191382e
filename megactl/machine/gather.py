"""The nodes of a Slurm step tell what they found to the first one, over TCP, with Python alone: this must work where nothing else does.

The address and the port are those a training run of this step would use, so that the way is tried as well. Each node sends one line of
JSON; it is asked for its clock a few times, and let go.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megactl.config import slurm
from megactl.errors import RunError
from megactl.machine.check import NodeReport
from megactl.machine.sockets import listen

_LONGEST_LINE = 2**20
# A node that has connected speaks at once; what does not, such as a port scanner, must not hold up the others.
_SPEAK_SECONDS = 10.0
_RETRY_SECONDS = 0.2
_CLOCK_ROUNDS = 5


@dataclass(frozen=True)
class Place:
    """Where this task stands in its Slurm step. `names`: the nodes by number; `token` tells this step's nodes from strangers."""

    node: int
    nodes: int
    task: int
    local_task: int
    address: str
    port: int
    names: tuple[str, ...]
    token: str

    @property
    def name(self) -> str:
        """This node's name."""
        return self.names[self.node]


def place_of(environ: Mapping[str, str]) -> Place | None:
    """The place of this task under srun; None where it is alone. Raises ConfigError for a half-set environment."""
    if not slurm.inside_srun(environ) or (slurm.integer(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or 1) == 1:
        return None
    nodes = slurm.integer(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1
    text = next((environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST") if environ.get(name)), "")
    names = list(slurm.expand_hosts(text)) if text else []
    names += [f"node {number}" for number in range(len(names), nodes)]
    job, step = (slurm.integer(environ, *pair) or 0 for pair in (("SLURM_JOB_ID", "SLURM_JOBID"), ("SLURM_STEP_ID", "SLURM_STEPID")))
    return Place(
        node=slurm.integer(environ, "SLURM_NODEID") or 0,
        nodes=nodes,
        task=slurm.integer(environ, "SLURM_PROCID") or 0,
        local_task=slurm.integer(environ, "SLURM_LOCALID") or 0,
        address=slurm.master_address(environ),
        port=slurm.master_port(environ),
        names=tuple(names[:nodes]),
        token=f"{job}.{step}",
    )


@dataclass
class Gathered:
    """What arrived: the report of each node by its number, how far its clock is ahead (seconds), and who cannot see the run directory."""

    reports: dict[int, NodeReport] = field(default_factory=dict)
    clocks: dict[int, float] = field(default_factory=dict)
    apart: list[int] = field(default_factory=list)


class Collector:
    """The first node's side. Made before the node looks at itself, so that the others need not wait to connect."""

    def __init__(self, place: Place, run_dir: Path | None) -> None:
        self._place, self._run_dir = place, run_dir
        self._server = listen("", place.port)
        self._gathered = Gathered()

    def gather(self, own: NodeReport, seconds: float) -> Gathered:
        """The reports of all nodes that answer within `seconds`, this one's included."""
        gathered, end = self._gathered, time.monotonic() + seconds
        gathered.reports[self._place.node] = own
        with self._server:
            while len(gathered.reports) < self._place.nodes and (left := end - time.monotonic()) > 0:
                self._server.settimeout(left)
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
                    connection, _ = self._server.accept()
                    with connection:
                        connection.settimeout(_SPEAK_SECONDS)
                        self._hear(connection.makefile("rwb"))
        return gathered

    def _hear(self, stream: IO[bytes]) -> None:
        """One node's report. Raises ValueError, KeyError, TypeError or AssertionError for what is no report of this step's nodes."""
        document: dict[str, Any] = json.loads(stream.readline(_LONGEST_LINE))
        number = document["number"]
        if document["token"] != self._place.token or number not in range(self._place.nodes):
            raise ValueError("another step's")
        report = NodeReport.from_dict(document["report"])
        clock = min((self._ask_clock(stream) for _ in range(_CLOCK_ROUNDS)), key=lambda answer: answer[0])[1]
        mark = document["mark"]
        if mark is not None and self._run_dir is not None and not (self._run_dir / Path(mark).name).exists():
            self._gathered.apart.append(number)
        stream.write(b"done\n")
        stream.flush()
        self._gathered.reports[number], self._gathered.clocks[number] = report, clock

    @staticmethod
    def _ask_clock(stream: IO[bytes]) -> tuple[float, float]:
        """(time that the question took, how far the other clock is ahead), the answer taken to fall into the middle."""
        asked = time.time()
        stream.write(b"clock\n")
        stream.flush()
        there = float(stream.readline(100))
        answered = time.time()
        return answered - asked, there - (asked + answered) / 2


def tell(place: Place, report: NodeReport, run_dir: Path | None, seconds: float) -> None:
    """Another node's side: send the report to the first. Raises RunError where it cannot be reached within `seconds`."""
    end, where = time.monotonic() + seconds, f"{place.address}:{place.port}"
    with _mark(run_dir, place) as mark:
        document = {"token": place.token, "number": place.node, "report": report.as_dict(), "mark": mark}
        while True:
            try:
                with socket.create_connection((place.address, place.port), timeout=max(1.0, end - time.monotonic())) as connection:
                    _speak(connection.makefile("rwb"), document)
                return
            except OSError as error:
                if time.monotonic() + _RETRY_SECONDS >= end:
                    rule = f"{place.name} cannot reach the first node at {where}: {error.strerror or error}"
                    hint = "a training run would fail alike: open the port between the nodes, or set MASTER_ADDR to an address they reach"
                    raise RunError(rule, hint) from error
            time.sleep(_RETRY_SECONDS)


def _speak(stream: IO[bytes], document: dict[str, Any]) -> None:
    stream.write(json.dumps(document).encode() + b"\n")
    stream.flush()
    while (line := stream.readline(100)) == b"clock\n":
        stream.write(f"{time.time()!r}\n".encode())
        stream.flush()
    if line != b"done\n":
        raise ConnectionError("it hung up before it had heard everything")


@contextlib.contextmanager
def _mark(run_dir: Path | None, place: Place) -> Iterator[str | None]:
    """A file in the run directory for the first node to find: both must see the same folder. None where it cannot be made."""
    if run_dir is None:
        yield None
        return
    path, new = run_dir / f".megactl-doctor-{place.token}-{place.node}", not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        # That this node cannot write there is a finding of its own.
        yield None
        return
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)
        if new:
            # Left behind where another node's mark is still in it: that one removes it.
            with contextlib.suppress(OSError):
                run_dir.rmdir()
