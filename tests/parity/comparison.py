"""Ranks against the reference: every number, every rectangle, and that together they cover every tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

import numpy as np

from parity.jobs import Pieces, RankResult
from parity.reference import Arrays, Trajectory


def deviations(
    results: Sequence[RankResult],
    reference: Trajectory,
    tolerance: float,
    overflows: Set[int] = frozenset(),
    scales: Sequence[float] | None = None,
) -> list[str]:
    """What differs by more than `tolerance`, one line each, beginning with its kind; empty where the ranks agree with the reference.

    In the iterations `overflows` (from 1) the norm must be infinite and the update skipped; in no other may it be.
    `scales`: the loss scale that each iteration must have had.
    """
    found: list[str] = []
    for rank, result in enumerate(results):
        found += _numbers(f"loss on rank {rank}", result.losses, reference.losses, tolerance)
        found += _numbers(f"parts of the loss on rank {rank}", sum(result.parts, ()), sum(reference.parts, ()), tolerance)
        norms = [math.inf if step in overflows else norm for step, norm in enumerate(reference.norms, 1)]
        found += _numbers(f"norm on rank {rank}", result.norms, norms, tolerance)
        found += _numbers(f"evaluation on rank {rank}", result.eval_losses, reference.eval_losses, tolerance)
        skipped = {step for step, flag in enumerate(result.skipped, 1) if flag}
        found += [] if skipped == overflows else [f"skipped on rank {rank}: {sorted(skipped)} instead of {sorted(overflows)}"]
        if scales is not None and result.scales != tuple(scales):
            found.append(f"loss scale on rank {rank}: {result.scales} instead of {tuple(scales)}")
        # Equal bits, not only equal within the tolerance: ranks decide by these numbers, and must decide alike.
        numbers = [(r.losses, r.parts, r.norms, r.scales) for r in (result, results[0])]
        same = numbers[0] == numbers[1]
        found += [] if same else [f"unequal losses or norms on ranks 0 and {rank}"]
    for step, arrays in enumerate(reference.gradients):
        found += _tensors(f"gradient in step {step + 1}", [r.gradients[step] for r in results], arrays, tolerance)
    return found + _tensors("weight", [r.weights for r in results], reference.weights, tolerance)


def _numbers(what: str, got: Sequence[float], expected: Sequence[float], tolerance: float) -> list[str]:
    found = []
    for step, (a, b) in enumerate(zip(got, expected, strict=True), start=1):
        # Written so that a NaN counts as a deviation, and infinity equals itself alone.
        if not (a == b or abs(a - b) <= tolerance * abs(b) < math.inf):
            found.append(f"{what}, step {step}: {a!r} instead of {b!r}")
    return found


def _tensors(kind: str, ranks: Sequence[Pieces], reference: Arrays, tolerance: float) -> list[str]:
    """The error of a part is held against max(norm of the reference's part, RMS over the model x sqrt(elements))."""
    total = sum(array.size for array in reference.values())
    rms = float(np.sqrt(sum(np.square(array).sum() for array in reference.values()) / total))
    found, covered = [], {name: np.zeros(array.shape, bool) for name, array in reference.items()}
    for rank, pieces in enumerate(ranks):
        for name, piece in pieces.items():
            where = f"{kind} {name} on rank {rank}"
            if name not in reference or piece.logical_shape != reference[name].shape:
                found.append(f"{where}: the reference has no such tensor of shape {piece.logical_shape}")
                continue
            window = tuple(slice(start, stop) for start, stop in piece.rectangle)
            expected = reference[name][window]
            if piece.values.shape != expected.shape:
                found.append(f"{where}: {piece.values.shape} for rectangle {piece.rectangle}")
                continue
            covered[name][window] = True
            error = float(np.linalg.norm(piece.values - expected))
            bound = tolerance * max(float(np.linalg.norm(expected)), rms * expected.size**0.5)
            if not error <= bound:
                found.append(f"{where}: off by {error:.3g}, at most {bound:.3g} allowed")
    missing = [name for name, flags in covered.items() if not flags.all()]
    return found + [f"{kind} {name}: no rank holds all of it" for name in missing]


def differing_bits(one: Sequence[RankResult], two: Sequence[RankResult]) -> list[str]:
    """Where two runs of one layout are not equal bit for bit; empty where they are."""
    found = []
    for rank, (a, b) in enumerate(zip(one, two, strict=True)):
        if (a.losses, a.parts, a.norms, a.skipped, a.eval_losses) != (b.losses, b.parts, b.norms, b.skipped, b.eval_losses):
            found.append(f"losses or norms on rank {rank}: {a.losses}, {a.norms} and {b.losses}, {b.norms}")
        for left, right in zip((*a.gradients, a.weights), (*b.gradients, b.weights), strict=True):
            found += [f"{name} on rank {rank}" for name in left if left[name].values.tobytes() != right[name].values.tobytes()]
    return found


def unequal_copies(results: Sequence[RankResult], name: str, copies: int) -> list[str]:
    """Where the ranks that hold a weight differ in a bit of it, or are not `copies`; empty where all is well.

    Stages of one rank hold their copies under one name, so a rank counts once and says itself whether its copies differ.
    """
    held = [(rank, result.weights[name]) for rank, result in enumerate(results) if name in result.weights]
    first: dict[tuple, bytes] = {}
    found = [] if len(held) == copies else [f"{name} is on {len(held)} ranks, not on {copies}"]
    for rank, piece in held:
        if first.setdefault(piece.rectangle, piece.values.tobytes()) != piece.values.tobytes():
            found.append(f"{name} on rank {rank} is another one")
    return found + [f"copies on rank {rank} differ" for rank, result in enumerate(results) if result.facts["copies_differ"]]
