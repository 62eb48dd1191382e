"""Which dataset of a blend each sample comes from: always the one furthest behind its share. Source: Megatron-Core's helpers.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megactl.errors import DataError
from megactl.storage.native import native_module

MAX_DATASETS = np.iinfo(np.int16).max


def normalise(weights: Sequence[float]) -> np.ndarray:
    """Weights as shares of 1, float64. Raises DataError for weights that are not positive, finite numbers."""
    array = np.asarray(weights, np.float64)
    for position, weight in enumerate(array, 1):
        if not math.isfinite(weight) or weight <= 0:
            raise DataError(
                f"weight {weight:g} of dataset {position}: must be a positive number", "leave the dataset out instead of weighing it 0"
            )
    return array / array.sum()


def build_blending(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(dataset int16 [n], sample within it int64 [n]). `weights` are shares of the samples handed out, not of the datasets' sizes."""
    shares = normalise(weights)
    datasets, samples = _outputs(len(shares), num_samples)
    native = native_module()
    if native is not None:
        native.build_blending(shares, datasets, samples)
    else:
        _deal(shares.tolist(), [num_samples] * len(shares), datasets, samples)
    return datasets, samples


def build_exhaustive_blending(sizes: Sequence[int], num_samples: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """As `build_blending` in proportion to `sizes`, and no dataset gives more than its size. At most sum(sizes) samples (the default)."""
    array = np.asarray(sizes, np.int64)
    total = int(array.sum())
    wanted = total if num_samples is None else num_samples
    if wanted > total:
        raise DataError(f"{wanted} samples: the datasets hold {total} together", "ask for fewer, or blend with weights")
    datasets, samples = _outputs(len(array), wanted)
    native = native_module()
    if native is not None:
        native.build_exhaustive_blending(array, datasets, samples)
    else:
        _deal([size / total for size in array.tolist()], array.tolist(), datasets, samples)
    return datasets, samples


def _outputs(count: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    if count > MAX_DATASETS:
        raise DataError(f"{count} datasets: a blend has at most {MAX_DATASETS}", "merge some of them")
    return np.empty(num_samples, np.int16), np.empty(num_samples, np.int64)


def _deal(shares: list[float], limits: list[int], datasets: np.ndarray, samples: np.ndarray) -> None:
    """The loop of blending.cpp; the order of its floating-point operations is the same, so are the ties."""
    given = [0] * len(shares)
    for i in range(len(datasets)):
        progress = max(float(i), 1.0)
        chosen, largest = -1, -math.inf
        for candidate, share in enumerate(shares):
            behind = share * progress - given[candidate]
            if behind > largest and given[candidate] < limits[candidate]:
                chosen, largest = candidate, behind
        datasets[i], samples[i] = chosen, given[chosen]
        given[chosen] += 1
