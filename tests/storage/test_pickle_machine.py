"""The pickle machine against Python's own pickle: the same values, for every protocol; nothing but CheckpointError for the rest."""

from __future__ import annotations

import argparse
import collections
import contextlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megactl.errors import CheckpointError
from megactl.storage.foreign.contents import leaves
from megactl.storage.foreign.names import Names
from megactl.storage.foreign.nodes import ArrayRef, Mapping, Object
from megactl.storage.foreign.pickle_machine import _ACTIONS, Limits, Machine

LIMITS = Limits(opcodes=200_000)


def read(data: bytes, limits: Limits = LIMITS) -> tuple[Any, Names]:
    names = Names("test")
    value, end = Machine(data, "test", names, limits).run()
    assert end <= len(data)
    return value, names


def plain(node: Any) -> Any:
    """An inert value as Python's own, so that it can be compared."""
    if isinstance(node, Mapping):
        return {plain(key): plain(value) for key, value in node.pairs}
    if isinstance(node, list):
        return [plain(item) for item in node]
    if isinstance(node, tuple):
        return tuple(plain(item) for item in node)
    return node


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=300)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner, inner)
        | st.tuples(inner, inner, inner, inner)
        | st.dictionaries(st.text(), inner, max_size=5)
    ),
    max_leaves=25,
)


@given(VALUES, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_the_same_values_as_python(value, protocol):
    found, names = read(pickle.dumps(value, protocol=protocol))
    # bytes of protocols 0 to 2 are text that would have been encoded.
    if protocol >= 3:
        assert plain(found) == value and repr(plain(found)) == repr(value)
    assert not names.dangers and not names.opaque


@pytest.mark.parametrize("protocol", range(6))
def test_what_checkpoints_hold(protocol):
    space = argparse.Namespace(lr=0.5, nested={"a": [1, 2]}, path=Path("/a/b"))
    value = {
        "args": space,
        "ordered": collections.OrderedDict(a=1, b=2),
        "default": collections.defaultdict(list, {"x": [1]}),
        "sets": ({1}, frozenset({2}), bytearray(b"abc"), 2 + 3j, range(3), slice(1, 2)),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.float64(1.5),
        "empty": np.zeros((0, 3)),
        "state": np.random.RandomState(1).get_state(),
        "shared": [space, space],
    }  # fmt: skip
    found, names = read(pickle.dumps(value, protocol=protocol))
    assert not names.dangers and not names.opaque, (names.dangers, names.opaque)
    assert isinstance(found, Mapping)
    args = found.get("args")
    assert isinstance(args, Object) and args.attributes()["lr"] == 0.5 and plain(args.attributes()["nested"]) == {"a": [1, 2]}
    assert plain(found.get("ordered")) == {"a": 1, "b": 2} and plain(found.get("default")) == {"x": [1]}
    array = found.get("array")
    assert isinstance(array, ArrayRef) and (array.shape, array.nbytes) == ((2, 3), 24)
    assert found.get("empty").nbytes == 0 and found.get("scalar").nbytes == 8
    assert found.get("state")[1].nbytes == 624 * 4
    assert found.get("shared")[0] is found.get("shared")[1]


def test_a_cycle_ends():
    value: list[Any] = [np.zeros(2)]
    value.append(value)
    value.append({"again": value})
    found, _ = read(pickle.dumps(value))
    assert [path for path, _ in leaves(found, "test")] == [("0",)]


def test_limits():
    data = pickle.dumps(list(range(1000)))
    assert plain(read(data)[0]) == list(range(1000))
    with pytest.raises(CheckpointError, match="more than 100 opcodes"):
        read(data, Limits(opcodes=100))


OPCODES = [bytes([code]) for code, action in enumerate(_ACTIONS) if action is not None]
PIECES = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from(OPCODES).flatmap(lambda code: st.binary(max_size=9).map(lambda tail: code + tail)),
    st.sampled_from([
        b"(", b"t", b"]", b"}", b")", b"R", b"b", b"\x81", b"\x92", b"\x93", b"Q", b"o", b"a", b"e", b"s", b"u", b"\x94", b"h\x00",
        b"h\x01",
        b"X\x01\x00\x00\x00a", b"X\x07\x00\x00\x00storage", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n",
        b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\ndtype\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"K\x01", b"\x85",
        b"\x86",
        b"\x87", b"ctorch\nSize\n", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096,
    ]),
)  # fmt: skip


@given(st.lists(PIECES, max_size=60))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_opcodes_end_in_a_value_or_a_checkpoint_error(pieces):
    with contextlib.suppress(CheckpointError):
        value, _ = read(b"".join(pieces) + b".")
        for _ in leaves(value, "test"):
            pass


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_end_in_a_value_or_a_checkpoint_error(data):
    with contextlib.suppress(CheckpointError):
        read(data)
