"""Timing of alternatives that do one job: in turn, in an order shuffled each round, so that a machine's changes of speed hit all alike.

On a GPU by the device's clock, with the inputs out of its cache and the host's launches hidden; on a CPU by the host's clock.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

# Larger than any cache of a GPU that is sold (H100: 50 MB, H200: 60 MB, B200: 126 MB).
_FLUSH_BYTES = 256 * 2**20
# A GPU's clock is no faster, so a wait of this many cycles a second is long enough.
_CYCLES_PER_S = 2e9
_MIN_ROUNDS, _MAX_ROUNDS, _WARM_UPS = 7, 500, 3
# Two contestants count as equal within this, whatever the rounds say: clocks and placement in memory alone move a kernel by as much.
_ALIKE = 0.02


@dataclass(frozen=True)
class Contestant:
    """One way to do the job. `run` is timed and gets what `prepare` (not timed) returned, or None."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, in the order of the rounds; `host` is how long the call kept the host (equal to `seconds` on a CPU)."""

    seconds: tuple[float, ...]
    host: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Seconds of the fastest round."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, _, high = quartiles(self.seconds)
        return (high - low) / 2 / self.median

    def as_dict(self) -> dict[str, float | int]:
        """For JSON; times in seconds."""
        facts = {"median_s": self.median, "min_s": self.minimum, "spread": self.spread, "host_median_s": statistics.median(self.host)}
        return {**facts, "rounds": len(self.seconds)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The three quartiles, observed values included; of one value, that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@dataclass(frozen=True)
class Comparison:
    """How long one took against another, round by round: `ratio` is the median of time / other's time, low and high its quartiles."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """slower or faster where the quartiles agree on it and the difference is more than 2 %, else equal."""
        if self.low > 1.0 and self.ratio > 1.0 + _ALIKE:
            return "slower"
        return "faster" if self.high < 1.0 and self.ratio < 1.0 - _ALIKE else "equal"


def compare(one: Timing, other: Timing) -> Comparison:
    """`one` against `other`, measured in the same rounds: rounds are paired, so that what slowed both down cancels."""
    low, middle, high = quartiles([a / b for a, b in zip(one.seconds, other.seconds, strict=True)])
    return Comparison(middle, low, high)


class Clock(Protocol):
    """Times one call of a contestant."""

    def sample(self, contestant: Contestant, *, warm: bool) -> tuple[float, float]:
        """(seconds, seconds of the host) of one call. `warm`: the inputs may be in the cache, and are where they fit."""


class HostClock:
    """For CPUs. With one thread of torch it reads the CPU time of the process: what else runs on the machine then takes nothing from it.

    With several it reads the wall, for their CPU times add up to more than anybody waits.
    """

    def __init__(self) -> None:
        self._now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def sample(self, contestant: Contestant, *, warm: bool) -> tuple[float, float]:
        """See Clock. With `warm` one call that is not counted brings the inputs back: another contestant may have pushed them out."""
        if warm:
            contestant.run(contestant.prepare())
        prepared = contestant.prepare()
        start = self._now()
        contestant.run(prepared)
        seconds = self._now() - start
        return seconds, seconds


class DeviceClock:
    """For CUDA devices: events around the call.

    Before it the device reads a buffer larger than its cache. Reading, since written lines would have to be stored during the timed call.
    Then it waits while the host enqueues the call, so that the gaps between launches are not measured (`host` says how long that took).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.ones(_FLUSH_BYTES // 4, device=device)
        self._host: dict[int, float] = {}

    def sample(self, contestant: Contestant, *, warm: bool) -> tuple[float, float]:
        """See Clock. The cache is emptied in any case, so `warm` changes nothing."""
        prepared = contestant.prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait = 2.0 * self._host.get(id(contestant), 0.0) + 50e-6
        self._buffer.sum()
        torch.cuda._sleep(int(wait * _CYCLES_PER_S))
        begin.record()
        start = time.perf_counter()
        contestant.run(prepared)
        host = time.perf_counter() - start
        end.record()
        torch.cuda.synchronize(self._device)
        # A call that was slow for once (a compilation, a page fault) must not make all later waits long.
        self._host[id(contestant)] = min(host, 0.01, self._host.get(id(contestant), 1.0) * 1.5)
        return begin.elapsed_time(end) / 1e3, host


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def clock_name(device: torch.device) -> str:
    """What `clock_for` reads, in words."""
    if device.type == "cuda":
        return "the device's clock"
    return "CPU time of the process" if torch.get_num_threads() == 1 else "wall time"


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector waits meanwhile: it would run in whichever call happens to allocate."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def interleave(
    contestants: Sequence[Contestant], clock: Clock, *, seconds: float, warm: bool = False, seed: int = 0, max_rounds: int = _MAX_ROUNDS
) -> dict[str, Timing]:
    """Timing of each contestant by name. Rounds go on for `seconds` of wall time, at least 7 and at most `max_rounds` of them."""
    assert len({item.name for item in contestants}) == len(contestants)
    order, shuffler = list(contestants), random.Random(seed)
    samples: dict[str, list[tuple[float, float]]] = {item.name: [] for item in contestants}
    for item in [item for item in order for _ in range(_WARM_UPS)]:
        clock.sample(item, warm=warm)
    gc.collect()
    with _no_collection():
        deadline = time.perf_counter() + seconds
        for done in range(max(max_rounds, _MIN_ROUNDS)):
            if done >= _MIN_ROUNDS and time.perf_counter() >= deadline:
                break
            shuffler.shuffle(order)
            for item in order:
                samples[item.name].append(clock.sample(item, warm=warm))
    return {name: Timing(*zip(*values, strict=True)) for name, values in samples.items()}


def use_threads(count: int) -> None:
    """Let torch's operators, and ours, use this many CPU threads."""
    torch.set_num_threads(count)


def cache_bytes(device: torch.device) -> int | None:
    """Size of the last-level cache: of the GPU its L2, of a CPU what the kernel says of core 0. None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        scale = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * scale)
    return max(sizes, default=None)
