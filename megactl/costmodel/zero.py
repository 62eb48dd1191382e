"""What ZeRO 2 and 3 hold for a while beside a rank's shares: gradients of buckets under way, weights of units that run.

Resident bytes a parameter with d replicas, in 16 bits: 18 (stage 0), 6 + 12/d (1), 2 + 16/d (2), 18/d (3).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Units:
    """Elements on one rank: its parameters, the largest unit of its layers, the table of the vocabulary (0 where it has none).

    table_stays: embedding and head share the table on one rank, so that its gradient lives through a whole backward.
    """

    parameters: int
    layer: int
    table: int
    table_stays: bool


def live_bytes(zero: int, units: Units, *, replicas: int, bucket: int, prefetch: int, weight: int, gradient: int) -> int:
    """Bytes at the fullest moment. weight, gradient: bytes of an element; bucket: elements of a gradient bucket; prefetch: units ahead.

    Gradients: one bucket is filled while another travels, and what arrives of it from other replicas is a share more. From stage 3 on a
    bucket is a unit.
    Weights (stage 3): the unit that runs, those ahead of it and one that is kept because it is likely to be next.
    """
    if zero < 2:
        return 0
    largest = max(units.layer, 0 if units.table_stays else units.table)
    filled = largest if zero == 3 else min(units.parameters, max(bucket, largest))
    gradients = 2 * filled + (filled // replicas if replicas > 1 else 0) + (units.table if units.table_stays else 0)
    gathered = max(units.layer, units.table) + (prefetch + 1) * units.layer if zero == 3 else 0
    return gradient * gradients + weight * gathered
