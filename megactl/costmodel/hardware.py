"""Published peaks of GPUs, looked up by the name the driver reports. One row a GPU; an unknown GPU has none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Gpu:
    """A GPU: dense peaks in TFLOP/s by arithmetic type (no sparsity), memory bandwidth in GB/s and memory in GiB.

    It is recognised when every word of `words` is in the reported name and none of `without` is. fp32 is the rate of the
    ordinary cores, tf32 that of the tensor cores. Of consumer GPUs bf16 and fp16 are the rates with fp32 accumulation.
    `memory` is what the driver reports, rounded down; None where the same name is sold with different amounts.
    """

    name: str
    words: tuple[str, ...]
    peaks: Mapping[str, float]
    bandwidth: float
    memory: float | None = None
    without: tuple[str, ...] = ()

    def peak(self, precision: str) -> float | None:
        """Dense peak in TFLOP/s for fp8, fp16, bf16, tf32, fp32 or fp64; None where the GPU has no such unit or it is not listed."""
        return self.peaks.get(precision)

    def training_peak(self, precision: str | None = None) -> tuple[float | None, str]:
        """(peak in TFLOP/s or None, the precision it is for): that of `precision`, or of bf16, or of fp16 where the GPU has no bf16."""
        if precision is None:
            precision = "bf16" if "bf16" in self.peaks else "fp16"
        return self.peak(precision), precision


def _row(
    name: str, words: str, bandwidth: float, half: float | None = None, *, gib: float | None = None, without: str = "", **peaks: float
) -> Gpu:
    """`half` is the common rate of bf16 and fp16 on GPUs that have both."""
    both = {} if half is None else {"bf16": half, "fp16": half}
    return Gpu(name, tuple(words.split()), MappingProxyType({**both, **peaks}), bandwidth, gib, tuple(without.split()))


def gpus() -> tuple[Gpu, ...]:
    """The table, more specific rows first. Source: NVIDIA data sheets and architecture papers; dense rates."""
    return (
        _row("P100", "P100", 732, fp16=21.2, fp32=10.6, fp64=5.3),
        _row("V100S PCIe", "V100S", 1134, fp16=130, fp32=16.4, fp64=8.2, gib=31),
        _row("V100 PCIe", "V100 PCIE", 900, fp16=112, fp32=14, fp64=7),
        _row("V100 SXM", "V100", 900, fp16=125, fp32=15.7, fp64=7.8),
        _row("T4", "T4", 320, fp16=65, fp32=8.1, gib=14),
        # A 64 GB A100 is a custom part with more cores; its peak is not the data sheet's.
        _row("A100 80GB PCIe", "A100 80GB PCIE", 1935, 312, tf32=156, fp32=19.5, fp64=9.7, gib=79),
        _row("A100 80GB SXM", "A100 80GB", 2039, 312, tf32=156, fp32=19.5, fp64=9.7, gib=79),
        _row("A100", "A100", 1555, 312, tf32=156, fp32=19.5, fp64=9.7, without="64GB"),
        _row("A800", "A800", 2039, 312, tf32=156, fp32=19.5, fp64=9.7, without="40GB ACTIVE", gib=79),
        _row("A40", "A40", 696, 149.7, tf32=74.8, fp32=37.4, gib=44),
        _row("A30", "A30", 933, 165, tf32=82, fp32=10.3, fp64=5.2, gib=23),
        _row("A10", "A10", 600, 125, tf32=62.5, fp32=31.2, gib=22),
        _row("RTX A6000", "A6000", 768, 154.8, tf32=77.4, fp32=38.7, gib=47),
        _row("GeForce RTX 3090", "RTX 3090", 936, 71, tf32=35.6, fp32=35.6, without="TI LAPTOP", gib=23),
        _row("GeForce RTX 4090", "RTX 4090", 1008, 165.2, tf32=82.6, fp32=82.6, without="D LAPTOP", gib=23),
        _row("RTX 6000 Ada", "6000 ADA", 960, 364.2, tf32=182.1, fp32=91.1, gib=47),
        _row("L4", "L4", 300, 121, fp8=242, tf32=60, fp32=30.3, gib=22),
        _row("L40S", "L40S", 864, 362, fp8=733, tf32=183, fp32=91.6, gib=44),
        _row("L40", "L40", 864, 181, fp8=362, tf32=90.5, fp32=90.5, gib=44),
        # "HBM2e" alone does not tell the PCIe card from the 64 GB SXM part.
        _row("H100 PCIe", "H100 PCIE", 2039, 756, fp8=1513, tf32=378, fp32=51.2, fp64=25.6, gib=79),
        _row("H100 NVL", "H100 NVL", 3938, 835, fp8=1671, tf32=418, fp32=60, fp64=30, gib=93),
        _row("H100 SXM", "H100", 3352, 989, fp8=1979, tf32=494, fp32=66.9, fp64=33.5, without="HBM2E", gib=79),
        _row("H800 PCIe", "H800 PCIE", 2039, 756, fp8=1513, tf32=378, fp32=51.2, gib=79),
        _row("H800 SXM", "H800", 3352, 989, fp8=1979, tf32=494, fp32=66.9, gib=79),
        _row("H20", "H20", 4000, 148, fp8=296, tf32=74, fp32=44, gib=95),
        _row("H200 NVL", "H200 NVL", 4800, 835, fp8=1671, tf32=418, fp32=60, fp64=30, gib=139),
        _row("H200 SXM", "H200", 4800, 989, fp8=1979, tf32=494, fp32=66.9, fp64=33.5, gib=139),
        _row("GH200", "GH200", 4000, 989, fp8=1979, tf32=494, fp32=66.9, fp64=33.5),
        _row("B200", "B200", 8000, 2250, fp8=4500, tf32=1125, fp32=75, fp64=37, gib=178),
        _row("GB200", "GB200", 8000, 2500, fp8=5000, tf32=1250, fp32=80, fp64=40, gib=184),
    )


def find_gpu(name: str) -> Gpu | None:
    """The row for a name such as 'NVIDIA H100 80GB HBM3', 'Tesla V100-SXM2-32GB', 'a100-80' or 'h100sxm'; None where no row is certain.

    A MIG slice has a fraction of the peak that its name does not tell in FLOP/s, so it has no row.
    """
    words = _words(name)
    if "MIG" in words:
        return None
    return next((gpu for gpu in gpus() if words.issuperset(gpu.words) and words.isdisjoint(gpu.without)), None)


# What people write without a space: the model, and what kind of it or how much memory it has.
_JOINED = re.compile(r"([A-Z]{1,2}\d{2,3}S?)(SXM\d?|PCIE|NVL|(?:16|24|32|40|48|64|80|94|96|141|180|192)GB?)")
_SIZE = re.compile(r"(16|24|32|40|48|64|80|94|96|141|180|192)G?")


def _words(name: str) -> set[str]:
    """The words of a name in capitals. "H100sxm" is two of them, and "80" or "80G" is also 80GB, as `constraint=v100-32g` is typed."""
    found: set[str] = set()
    for word in re.findall(r"[A-Z0-9]+", name.upper()):
        joined = _JOINED.fullmatch(word)
        found.update({word, *(joined.groups() if joined else ())})
    sizes = {f"{match[1]}GB" for word in found if (match := _SIZE.fullmatch(word))}
    return found | sizes | {"SXM" for word in found if re.fullmatch(r"SXM\d", word)}


def gpu_memory(name: str) -> float | None:
    """GiB of a GPU's memory by its row, or by the amount in its name where it is sold with several; None where neither tells."""
    gpu = find_gpu(name)
    if gpu is None or gpu.memory is not None:
        return None if gpu is None else gpu.memory
    named = [int(word[:-2]) for word in _words(name) if re.fullmatch(r"\d+GB", word)]
    # The cards with 16 to 40 GB report some hundred MiB less than that many GiB.
    return min(named) - 1 if named and min(named) <= 40 else None


def peak_tflops(name: str, precision: str) -> float | None:
    """Dense peak of a reported GPU name in TFLOP/s; None (print n/a) where the GPU or its rate is unknown."""
    gpu = find_gpu(name)
    return None if gpu is None else gpu.peak(precision)
