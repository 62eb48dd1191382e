"""Bytes that `--offload optimizer` and `--offload parameters` keep in host memory.

A parameter of a rank's share, in 16 bits: master and moments 12, its weight 2. In fp32 the weight is its own master: 12 bytes where it has
a copy on the device, 12 as well where it has none, 4 for the parameters alone. Beside that a few pieces of staging memory.
"""

from __future__ import annotations

# Elements that go over the link at a time: long enough for its full speed, and two of them are little memory.
PIECE = 2**23
# Pieces under way in each direction: one is copied while another is worked on.
LANES = 2


def host_bytes(targets: frozenset[str], *, parameters: int, zero: int, replicas: int, weight: int, main: int, largest: int) -> int:
    """Bytes in a rank's host memory, activations apart.

    targets: what `--offload` names. parameters: those of the rank; largest: elements of its largest bucket, which no piece exceeds.
    weight, main: bytes of a weight and of a master.
    """
    share = -(-parameters // replicas)
    held = share if zero else parameters
    masters = 3 * main * held
    if "optimizer" not in targets:
        return weight * share if "parameters" in targets else 0
    own_weights = weight * share if "parameters" in targets and weight != main else 0
    # What the processors write is read from where it is, unless it is rounded on the way to a device that has it.
    low = weight if "parameters" not in targets and weight != main else 0
    return masters + own_weights + LANES * min(PIECE, largest) * (main + low)
