"""Random words, normal deviates and dropout in plain torch, equal to the compiled ones bit for bit, float64 square roots apart.

(torch takes those from a vector library that is off by one unit in the last place now and then.)
32-bit words are held in int64, which every torch operator knows, and masked after each step.
Source of Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11; the formulas of log, sin and cos are those
of megactl/csrc/kernels/philox.h, in the same order of operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
# Elements worked on at a time where no graph is recorded: temporaries take about 100 bytes an element.
CHUNK = 1 << 20
Word = Tensor | int


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * word; split in halves, because the product does not fit in a signed 64-bit integer."""
    low, high = factor * (word & 0xFFFF), factor * (word >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & MASK


def philox(counter: tuple[Tensor, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. Words are int64 tensors (or ints) in [0, 2^32) that broadcast; returns the four output words."""
    c0, *others = counter
    c1, c2, c3 = (torch.zeros_like(c0) + word for word in others)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def blocks(first_block: Tensor, count: int, seed: Word, stream: int, step: Word) -> Tensor:
    """Words of `count` consecutive blocks from each of `first_block` [rows]: int64 [rows, 4 * count]."""
    block = first_block[:, None] + torch.arange(count, device=first_block.device)
    counter = (block & MASK, (block >> 32) & MASK, stream & MASK, step & MASK)
    return torch.stack(philox(counter, (seed & MASK, (seed >> 32) & MASK)), dim=-1).flatten(1)


def _columns(first: Tensor, n: int) -> Tensor:
    """Where elements first .. first + n lie in the words from block first >> 2 on: int64 [rows, n]."""
    return (first & 3)[:, None] + torch.arange(n, device=first.device)


def words(first: Tensor, n: int, seed: Word, stream: int, step: Word) -> Tensor:
    """The words of elements first .. first + n of a stream: first is int64 [rows], the result int64 [rows, n]."""
    return blocks(first >> 2, n // 4 + 2, seed, stream, step).gather(1, _columns(first, n))


def _halves(first: Tensor, n: int, seed: Word, stream: int, step: Word) -> Tensor:
    """16 bits for each of elements first .. first + n, two a word, the low half first: int64 [rows, n]."""
    pairs = words(first >> 1, n // 2 + 1, seed, stream, step)
    halves = torch.stack((pairs & 0xFFFF, pairs >> 16), dim=-1).flatten(1)
    return halves.gather(1, (first & 1)[:, None] + torch.arange(n, device=first.device))


def _log_unit(n: Tensor) -> Tensor:
    """log(n * 2^-32), float64, for int64 n in [1, 2^32]."""
    bits = n.double().view(torch.int64) + (0x3FF0000000000000 - 0x3FE6A09E00000000)
    k = ((bits >> 52) - (1023 + 32)).double()
    f = ((bits & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E00000000).view(torch.float64) - 1.0
    half_square, s = 0.5 * f * f, f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
    odd = 1.818357216161805012e-01 + w * 1.479819860511658591e-01
    odd = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 + w * odd))
    return s * (half_square + (odd + even)) + k * 1.90821492927058770002e-10 - half_square + f + k * 6.93147180369123816490e-01


def _cos_sin_turn(n: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi n / 2^32, float64, for int64 n in [0, 2^32)."""
    quarter = ((n + 0x20000000) >> 30) & 3
    x = (n - ((n + 0x20000000) >> 30 << 30)).double() * 1.4629180792671596e-09
    z = x * x
    w = z * z
    tail = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * 2.75573137070700676789e-06)
    tail = tail + z * w * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)
    s = x + z * x * (-1.66666666666666324348e-01 + z * tail)
    tail = z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * 2.48015872894767294178e-05))
    tail = tail + w * w * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11))
    half = 0.5 * z
    rest = 1.0 - half
    c = rest + (((1.0 - rest) - half) + z * tail)
    swap = (quarter & 1).bool()
    cosine, sine = torch.where(swap, s, c), torch.where(swap, c, s)
    return torch.where(((quarter + 1) & 2).bool(), -cosine, cosine), torch.where((quarter & 2).bool(), -sine, sine)


def _normals(first: Tensor, n: int, seed: int, stream: int, step: int) -> Tensor:
    """N(0, 1) deviates of elements first .. first + n: float64 [rows, n]. Words come in pairs, so whole blocks are drawn."""
    pairs = blocks(first >> 2, n // 4 + 2, seed, stream, step).unflatten(1, (-1, 2))
    radius = torch.sqrt(-2.0 * _log_unit(pairs[..., 0] + 1))
    cosine, sine = _cos_sin_turn(pairs[..., 1])
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(1).gather(1, _columns(first, n))


def philox_bits_(out: Tensor, first_element: int, seed: int, stream: int, step: int) -> None:
    """See `megactl.engine.ops.philox.philox_bits_`."""
    flat = out.view(-1)
    for begin in range(0, flat.numel(), CHUNK):
        piece = flat[begin : begin + CHUNK]
        first = torch.tensor([first_element + begin], device=out.device)
        piece.copy_(words(first, piece.numel(), seed, stream, step)[0])


def normal_(out: Tensor, logical_shape: Sequence[int], offsets: Sequence[int], seed: int, stream: int, std: float, step: int) -> None:
    """See `megactl.engine.ops.philox.normal_`."""
    if out.numel() == 0:
        return
    if out.dim() == 0:
        out, logical_shape, offsets = out.view(1), (1,), (0,)
    strides = [1]
    for size in reversed(logical_shape[1:]):
        strides.insert(0, strides[0] * size)
    starts = torch.tensor(offsets[-1], device=out.device)
    for size, offset, stride in zip(out.shape[:-1], offsets[:-1], strides[:-1], strict=True):
        starts = (starts[..., None] + (offset + torch.arange(size, device=out.device)) * stride).contiguous()
    rows, run = starts.view(-1), out.shape[-1]
    flat, many = out.view(-1, run), max(1, CHUNK // run)
    for row in range(0, rows.numel(), many):
        for column in range(0, run, CHUNK):
            piece = flat[row : row + many, column : column + CHUNK]
            piece.copy_(_normals(rows[row : row + many] + column, piece.shape[1], seed, stream, step) * std)


def dropout_add(x: Tensor, residual: Tensor | None, p: float, rng: Tensor, site: int, outer_offset: int, outer_size: int) -> Tensor:
    """See `megactl.engine.ops.philox.dropout_add`. Differentiable; keeps its mask for the backward pass."""
    batch, outer = x.shape[:2]
    inner = x[0, 0].numel() if x.numel() else 0
    sample = rng[2] + torch.arange(batch, device=x.device)
    first = (sample * (outer_size or outer) + outer_offset) * inner
    return _drop(x, residual, p, rng, site, first)


def dropout_add_rows(x: Tensor, residual: Tensor | None, p: float, rng: Tensor, site: int, rows: Tensor) -> Tensor:
    """See `megactl.engine.ops.philox.dropout_add_rows`. Differentiable; keeps its mask for the backward pass."""
    return _drop(x, residual, p, rng, site, rows.flatten() * x.shape[-1])


def _drop(x: Tensor, residual: Tensor | None, p: float, rng: Tensor, site: int, first: Tensor) -> Tensor:
    """residual + dropout(x): x is cut into as many runs of consecutive elements as there are in `first`, which each begins at."""
    run = x.numel() // max(1, first.numel())
    upper, lower = (_halves(first, run, rng[0], stream, rng[1]) for stream in (site, site ^ 0x80000000))
    keep = ((upper << 16) + lower).view(x.shape) >= int(p * 2**32)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.where(keep, x.to(compute) * (1.0 / (1.0 - p)), 0.0)
    return (y if residual is None else residual.to(compute) + y).to(x.dtype)
