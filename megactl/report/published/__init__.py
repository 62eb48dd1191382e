"""Figures that others have published, which benches print beside their own. Each file names its source in this module."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent

STRATEGIES = ("baseline", "sequence parallel", "selective", "both", "full")
"""What is not kept for backward: nothing is spared; --sp; --recompute selective; these two; --recompute full."""


@dataclass(frozen=True)
class RecomputeRow:
    """One measured training run: milliseconds an iteration and the largest peak of allocated memory over its GPUs, in MiB."""

    model: str
    tp: int
    pp: int
    seq_length: int
    strategy: str
    time_ms: float
    peak_mib: float


def recompute_rows() -> list[RecomputeRow]:
    """The recomputation study of the Megatron-LM-Benchmarks repository: GPT and BERT of 345M parameters on 8 V100.

    Its pages state neither micro-batch nor global batch; 2 (BERT), 4 (GPT) and 16 are what its memory and the scripts of its time fit.
    """
    with (_FOLDER / "recompute_v100.csv").open(encoding="utf-8", newline="") as file:
        return [
            RecomputeRow(
                row["model"], int(row["tp"]), int(row["pp"]), int(row["seq_length"]), row["strategy"],
                float(row["time_ms"]), float(row["peak_mib"]),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip
