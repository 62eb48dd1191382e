"""Philox words and the normal deviates made from them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.engine import ops
from megactl.engine.ops.reference import random as reference
from megactl.errors import ConfigError

ALL = 0xFFFFFFFF
# Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL,) * 4, (ALL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bits(n: int, **where: int) -> torch.Tensor:
    """n words, in memory that held something else before."""
    out = torch.full((n,), -7, dtype=torch.int64)
    ops.philox_bits_(out, **{"first_element": 0, "seed": 0, "stream": 0, "step": 0, **where})
    return out


def normal(shape: tuple[int, ...], rectangle: list[tuple[int, int]], dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
    out = torch.full([stop - start for start, stop in rectangle], float("nan"), dtype=dtype)
    ops.normal_(out, logical_shape=shape, rectangle=rectangle, seed=2**40 + 3, stream=77, std=std)
    return out


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_reference_gives_the_known_answers(counter, key, expected):
    words = reference.philox((torch.tensor([counter[0]]), *counter[1:]), key)
    assert tuple(int(word) for word in words) == expected


def test_words_are_the_known_answer_in_order(backend):
    assert tuple(bits(4).tolist()) == KNOWN[0][2]


def test_counter_and_key_words_are_where_they_should_be(backend):
    # The third known answer has block words a 62-bit block cannot reach, so its stream, step and key are tried on another block.
    block, (stream, step), key = 0x05A308D3_243F6A88, KNOWN[2][0][2:], (0xA4093822, 0x299F31D0)
    seed = key[0] | key[1] << 32
    expected = reference.philox((torch.tensor([block & ALL]), block >> 32, stream, step), key)
    assert bits(4, first_element=4 * block, seed=seed, stream=stream, step=step).tolist() == [int(word) for word in expected]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**63 - 600), st.integers(1, 600), st.integers(0, 2**63 - 1), st.integers(0, ALL), st.integers(0, ALL))
def test_compiled_words_equal_the_reference(first, n, seed, stream, step):
    if ops.library.mode() == "auto" and ops.library.load():
        pytest.skip(str(ops.library.load()))
    assert ops.library.load() is None
    out, expected = torch.full((n,), -1), torch.full((n,), -2)
    torch.ops.megactl.philox_bits_(out, first, seed, stream, step)
    reference.philox_bits_(expected, first, seed, stream, step)
    assert torch.equal(out, expected)


def test_words_do_not_depend_on_where_a_range_starts_or_on_threads(backend):
    whole = bits(100_003, stream=5, step=9)
    for start, n in [(1, 10), (2, 70_001), (99_999, 4), (257, 3)]:
        assert torch.equal(bits(n, first_element=start, stream=5, step=9), whole[start : start + n])


def test_streams_steps_and_seeds_differ(backend):
    drawn = [bits(1000, **where) for where in ({}, {"stream": 1}, {"step": 1}, {"seed": 1}, {"seed": 1 << 32}, {"first_element": 1 << 34})]
    for one, other in itertools.combinations(drawn, 2):
        assert (one == other).sum() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_part_equals_the_slice_of_the_whole(backend, dtype):
    shape = (7, 13, 10)
    whole = normal(shape, [(0, size) for size in shape], dtype)
    for rectangle in ([(0, 7), (0, 13), (3, 8)], [(2, 5), (1, 12), (0, 10)], [(6, 7), (12, 13), (9, 10)], [(1, 7), (0, 13), (0, 10)]):
        cut = tuple(slice(*part) for part in rectangle)
        assert torch.equal(normal(shape, rectangle, dtype), whole[cut])


def test_parts_of_a_large_tensor_agree_across_threads_and_chunks(backend):
    whole = normal((3, 500_000), [(0, 3), (0, 500_000)])
    assert torch.equal(normal((3, 500_000), [(1, 3), (123_457, 400_001)]), whole[1:3, 123_457:400_001])
    assert torch.isfinite(whole).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_compiled_normal_equals_the_reference(compiled, monkeypatch, dtype):
    rectangle = [(3, 40), (5, 356)]
    out = normal((64, 401), rectangle, dtype, 0.02)
    monkeypatch.setenv("MEGACTL_OPS", "torch")
    expected = normal((64, 401), rectangle, dtype, 0.02)
    if dtype == torch.float64:  # torch's own square root is off by a unit in the last place now and then
        torch.testing.assert_close(out, expected, rtol=1e-15, atol=0)
    else:
        assert torch.equal(out, expected)


def test_normal_is_normal(backend):
    n = 400_000
    z = normal((n,), [(0, n)], torch.float64).sort().values
    assert abs(z.mean()) < 5 / math.sqrt(n) and abs(z.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n) and abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov: 1.95 is exceeded once in a thousand samples, and the sample is fixed.
    gap = (0.5 * (1 + torch.erf(z / math.sqrt(2))) - torch.arange(1, n + 1) / n).abs().max()
    assert gap * math.sqrt(n) < 1.95
    assert z.abs().max() < math.sqrt(2 * 32 * math.log(2)) + 1e-9


def test_neighbours_and_pairs_are_uncorrelated(backend):
    n = 400_000
    z = normal((n,), [(0, n)], torch.float64)
    for lag in (1, 2, 3, 4):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n)
        assert abs((z[lag:] ** 2 * z[:-lag] ** 2).mean() - 1) < 5 * math.sqrt(8 / n)


def test_normal_scales_by_std_and_takes_scalars_and_empty_parts(backend):
    assert torch.allclose(normal((50,), [(0, 50)], std=0.25), 0.25 * normal((50,), [(0, 50)]))
    assert normal((50, 4), [(3, 3), (0, 4)]).shape == (0, 4)
    out = torch.full((), float("nan"))
    ops.normal_(out, logical_shape=(), rectangle=(), seed=1, stream=1, std=1.0)
    assert torch.isfinite(out)


@pytest.mark.parametrize(
    ("shape", "rectangle", "out"),
    [
        ((4, 4), [(0, 4), (2, 5)], torch.empty(4, 3)),
        ((4, 4), [(0, 4), (0, 4)], torch.empty(4, 3)),
        ((4,), [(0, 4)], torch.empty(8)[::2]),
        ((4, 4), [(0, 4)], torch.empty(4)),
        ((4,), [(0, 4)], torch.empty(4, dtype=torch.int32)),
        ((1,) * 9, [(0, 1)] * 9, torch.empty((1,) * 9)),
    ],
)
def test_normal_refuses_what_does_not_fit(backend, shape, rectangle, out):
    with pytest.raises(ValueError, match="must"):
        ops.normal_(out, logical_shape=shape, rectangle=rectangle, seed=1, stream=1, std=1.0)


def test_values_of_a_user_are_refused_as_configuration(backend):
    out = torch.empty(4)
    for wrong in ({"std": -1.0}, {"std": float("nan")}, {"seed": -1}, {"seed": 2**63}):
        with pytest.raises(ConfigError, match="set"):
            ops.normal_(out, logical_shape=(4,), rectangle=[(0, 4)], **{"seed": 1, "stream": 1, "std": 1.0, **wrong})


def test_stream_of_is_the_same_everywhere():
    names = [f"layers.{layer}.{part}" for layer in range(100) for part in ("attention.qkv.weight", "mlp.up.weight", "mlp.down.bias")]
    streams = [ops.stream_of(name) for name in names]
    assert len(set(streams)) == len(names) and all(0 <= stream < 2**31 for stream in streams)
    # A changed value would change every initial weight, so it is written down here.
    assert ops.stream_of("layers.0.mlp.up.weight") == 300914932


def test_random_operators_pass_opcheck(compiled):
    torch.library.opcheck(torch.ops.megactl.philox_bits_, (torch.zeros(10, dtype=torch.int64), 3, 4, 5, 6))
    torch.library.opcheck(torch.ops.megactl.normal_, (torch.zeros(3, 5), [4, 9], [1, 2], 7, 8, 0.5))


def test_compiled_checks_hold_without_the_python_face(compiled):
    with pytest.raises(RuntimeError, match="leaves the logical shape"):
        torch.ops.megactl.normal_(torch.zeros(3, 5), [4, 9], [2, 2], 7, 8, 0.5)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.megactl.philox_bits_(torch.zeros(10, dtype=torch.int64)[::2], 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="float64, float32"):
        torch.ops.megactl.normal_(torch.zeros(3, dtype=torch.int32), [3], [0], 7, 8, 0.5)
