"""Reads a pickle without obeying it: every opcode of protocols 0 to 5 is carried out on inert values, nothing is imported or called.

Python's own unpickler runs what a file says; this one keeps the names of what it would have run. What a known name stands for
(a tensor, an OrderedDict) is decided in names.py; the rest stays an `Object` that says who would have made it. The opcodes are
those of Python's pickletools (PEP 3154, PEP 574). Cost is bounded: an opcode takes constant time apart from the bytes it carries, and
`Limits` bounds how many there are.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megactl.errors import CheckpointError
from megactl.storage.foreign.names import Names
from megactl.storage.foreign.nodes import ArrayRef, Global, Mapping, Object
from megactl.storage.strict_json import DAMAGED

_MEMO_LIMIT = 1 << 32
_NAME_LIMIT = 1000
_LINE_LIMIT = 1 << 20


@dataclass(frozen=True)
class Limits:
    """How much of one pickle is read: bytes, and opcodes, each of which makes at most one small object."""

    nbytes: int = 256 * 1024 * 1024
    opcodes: int = 10_000_000

    def too_many(self, where: str, what: str) -> CheckpointError:
        """The error for a pickle beyond the limit."""
        return CheckpointError(f"{where}: the pickle has more than {what}", "raise --pickle-limit if you trust where it comes from")


class Short(CheckpointError):
    """The bytes end in the middle of the pickle."""


class _Mark:
    __slots__ = ()


_MARK = _Mark()


class Machine:
    """One pickle being read. `where` names it in messages; `names` collects what it refers to."""

    def __init__(self, data: bytes, where: str, names: Names, limits: Limits, start: int = 0) -> None:
        self.data, self.where, self.names, self.limits = data, where, names, limits
        self.at = start
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.stopped = False

    def run(self) -> tuple[Any, int]:
        """(the value, the position behind the pickle). Raises CheckpointError for damage, for what no pickler writes, and at the limits."""
        code, data = 0, self.data
        for _ in range(self.limits.opcodes):
            if self.at >= len(data):
                raise Short(f"{self.where}: the pickle ends without its last opcode", DAMAGED)
            code, start = data[self.at], self.at
            self.at += 1
            action = _ACTIONS[code]
            if action is None:
                raise self.damaged(f"0x{code:02x} is no pickle opcode", start)
            try:
                action(self)
                if self.stopped:
                    return self.pop(), self.at
            except (IndexError, ValueError, OverflowError) as error:
                raise self.damaged(f"opcode 0x{code:02x} cannot be carried out ({str(error)[:80] or 'nothing there'})", start) from None
        raise self.limits.too_many(self.where, f"{self.limits.opcodes} opcodes")

    def damaged(self, problem: str, position: int) -> CheckpointError:
        """The error for a malformed pickle."""
        return CheckpointError(f"{self.where}: byte {position} of the pickle: {problem}", DAMAGED)

    # What opcodes take from the file.

    def take(self, length: int) -> bytes:
        """The next `length` bytes. The length comes from the file, so it is compared before anything is copied."""
        end = self.at + length
        if end > len(self.data):
            raise Short(f"{self.where}: the pickle ends inside a value of {length} bytes", DAMAGED)
        self.at, start = end, self.at
        return self.data[start:end]

    def number(self, width: int, *, signed: bool = False) -> int:
        """A little-endian whole number of `width` bytes."""
        return int.from_bytes(self.take(width), "little", signed=signed)

    def sized(self, width: int) -> bytes:
        """Bytes behind their own length."""
        return self.take(self.number(width))

    def line(self) -> bytes:
        """The bytes up to the next line end, without it."""
        end = self.data.find(b"\n", self.at, self.at + _LINE_LIMIT)
        if end < 0:
            if len(self.data) - self.at < _LINE_LIMIT:
                raise Short(f"{self.where}: the pickle ends inside a line", DAMAGED)
            raise ValueError(f"a line of more than {_LINE_LIMIT} bytes")
        self.at, start = end + 1, self.at
        return self.data[start:end]

    # The stack.

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the value on top, which must not be a mark."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def top(self) -> Any:
        """The value on top."""
        if self.stack[-1] is _MARK:
            raise ValueError("a mark in place of a value")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        """Take everything above the last mark, and the mark."""
        stack, low = self.stack, len(self.stack) - 1
        while stack[low] is not _MARK:
            low -= 1
            if low < 0:
                raise ValueError("no mark")
        values = stack[low + 1 :]
        del stack[low:]
        return values

    def global_(self, module: Any, name: Any) -> Global:
        """A name, noted."""
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _NAME_LIMIT:
            raise ValueError("a class or function whose name is not a short string")
        found = Global(module, name)
        self.names.refer(found)
        return found

    def make(self, callee: Any, arguments: Any, pairs: list[tuple[Any, Any]] | None = None) -> Any:
        """What calling `callee` stands for."""
        if not isinstance(arguments, tuple):
            raise ValueError("arguments that are not a tuple")
        made = self.names.call(callee, arguments)
        if pairs and isinstance(made, Object):
            made.pairs.extend(pairs)
        return made

    def extend(self, target: Any, values: list[Any]) -> None:
        """Append to a list, a set or an object that behaves like one."""
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Object):
            target.items.extend(values)
        else:
            raise ValueError(f"cannot append to {type(target).__name__}")

    def set_items(self, target: Any, flat: list[Any]) -> None:
        """Store pairs in a dictionary or an object that behaves like one."""
        if len(flat) % 2:
            raise ValueError("a key without a value")
        if not isinstance(target, Mapping | Object):
            raise ValueError(f"cannot store items in {type(target).__name__}")
        target.pairs.extend(zip(flat[::2], flat[1::2], strict=True))

    def build(self) -> None:
        """Give the object on top its state."""
        state, target = self.pop(), self.top()
        if isinstance(target, Mapping | Object):
            target.state = state
        elif isinstance(target, ArrayRef):
            self.names.fill_array(target, state)
        elif isinstance(target, Global):
            self.names.change(target)
        elif not self.names.stateful(target):
            raise ValueError(f"cannot set the state of {type(target).__name__}")


def _memo_key(text: bytes) -> int:
    key = int(text)
    if not 0 <= key < _MEMO_LIMIT:
        raise ValueError("a memo number out of range")
    return key


def _put(machine: Machine, key: int) -> None:
    machine.memo[key] = machine.top()


def _get(machine: Machine, key: int) -> None:
    if key not in machine.memo:
        raise ValueError(f"nothing was stored under memo number {key}")
    machine.push(machine.memo[key])


def _integer_line(machine: Machine) -> Any:
    text = machine.line()
    return text == b"01" if text in (b"00", b"01") else int(text)


def _string_line(machine: Machine) -> str:
    text = machine.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    return codecs.escape_decode(text[1:-1])[0].decode("latin-1")  # type: ignore[return-value]


def _instance(machine: Machine) -> Any:
    callee = machine.global_(machine.line().decode("utf-8"), machine.line().decode("utf-8"))
    return machine.make(callee, tuple(machine.since_mark()))


def _object(machine: Machine) -> Any:
    values = machine.since_mark()
    return machine.make(values[0], tuple(values[1:]))


def _reduce(machine: Machine) -> Any:
    arguments = machine.pop()
    return machine.make(machine.pop(), arguments)


def _new_with_names(machine: Machine) -> Any:
    named, arguments, callee = machine.pop(), machine.pop(), machine.pop()
    return machine.make(callee, arguments, named.pairs if isinstance(named, Mapping) else None)


def _stack_global(machine: Machine) -> Any:
    name, module = machine.pop(), machine.pop()
    return machine.global_(module, name)


def _dictionary(machine: Machine) -> Any:
    made = Mapping()
    machine.set_items(made, machine.since_mark())
    return made


def _append(machine: Machine) -> None:
    value = machine.pop()
    machine.extend(machine.top(), [value])


def _appends(machine: Machine) -> None:
    values = machine.since_mark()
    machine.extend(machine.top(), values)


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items(machine.top(), [key, value])


def _set_items(machine: Machine) -> None:
    values = machine.since_mark()
    machine.set_items(machine.top(), values)


def _tuple_of(count: int) -> Callable[[Machine], Any]:
    def make(machine: Machine) -> Any:
        if count > len(machine.stack) or any(value is _MARK for value in machine.stack[-count:]):
            raise ValueError("too few values for a tuple")
        values = tuple(machine.stack[-count:])
        del machine.stack[-count:]
        return values

    return make


def _protocol(machine: Machine) -> None:
    version = machine.number(1)
    if version > 5:
        raise ValueError(f"protocol {version}, the newest is 5")


def _next_buffer(machine: Machine) -> None:
    raise ValueError("a buffer outside the file, which no checkpoint has")


def _stop(machine: Machine) -> None:
    machine.stopped = True


def _pushes(make: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def action(machine: Machine) -> None:
        machine.stack.append(make(machine))

    return action


def _text(width: int) -> Callable[[Machine], str]:
    return lambda machine: machine.sized(width).decode("utf-8", "surrogatepass")


_VALUES: dict[bytes, Callable[[Machine], Any]] = {
    b"(": lambda m: _MARK,
    b"F": lambda m: float(m.line()),
    b"G": lambda m: struct.unpack(">d", m.take(8))[0],
    b"I": _integer_line,
    b"J": lambda m: m.number(4, signed=True),
    b"K": lambda m: m.number(1),
    b"M": lambda m: m.number(2),
    b"L": lambda m: int(m.line().removesuffix(b"L")),
    b"\x8a": lambda m: int.from_bytes(m.sized(1), "little", signed=True),
    b"\x8b": lambda m: int.from_bytes(m.sized(4), "little", signed=True),
    b"N": lambda m: None,
    b"\x88": lambda m: True,
    b"\x89": lambda m: False,
    b"S": _string_line,
    b"T": lambda m: m.sized(4).decode("latin-1"),
    b"U": lambda m: m.sized(1).decode("latin-1"),
    b"V": lambda m: m.line().decode("raw-unicode-escape"),
    b"X": _text(4),
    b"\x8c": _text(1),
    b"\x8d": _text(8),
    b"B": lambda m: m.sized(4),
    b"C": lambda m: m.sized(1),
    b"\x8e": lambda m: m.sized(8),
    b"\x96": lambda m: m.sized(8),
    b"]": lambda m: [],
    b"l": lambda m: m.since_mark(),
    b"\x8f": lambda m: [],
    b"\x91": lambda m: m.since_mark(),
    b"}": lambda m: Mapping(),
    b"d": _dictionary,
    b")": lambda m: (),
    b"t": lambda m: tuple(m.since_mark()),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"2": lambda m: m.top(),
    b"c": lambda m: m.global_(m.line().decode("utf-8"), m.line().decode("utf-8")),
    b"\x93": _stack_global,
    b"\x82": lambda m: m.names.extension(m.number(1)),
    b"\x83": lambda m: m.names.extension(m.number(2)),
    b"\x84": lambda m: m.names.extension(m.number(4)),
    b"R": _reduce,
    b"\x81": _reduce,
    b"\x92": _new_with_names,
    b"i": _instance,
    b"o": _object,
    b"P": lambda m: m.names.persistent(m.line().decode("utf-8")),
    b"Q": lambda m: m.names.persistent(m.pop()),
}

_STEPS: dict[bytes, Callable[[Machine], None]] = {
    b".": _stop,
    b"\x80": _protocol,
    # A frame announces bytes; they are read by the opcodes inside it, each with its own check.
    b"\x95": lambda m: m.take(8),
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.since_mark(),
    b"a": _append,
    b"e": _appends,
    b"\x90": _appends,
    b"s": _set_item,
    b"u": _set_items,
    b"b": lambda m: m.build(),
    b"g": lambda m: _get(m, _memo_key(m.line())),
    b"h": lambda m: _get(m, m.number(1)),
    b"j": lambda m: _get(m, m.number(4)),
    b"p": lambda m: _put(m, _memo_key(m.line())),
    b"q": lambda m: _put(m, m.number(1)),
    b"r": lambda m: _put(m, m.number(4)),
    b"\x94": lambda m: _put(m, len(m.memo)),
    b"\x97": _next_buffer,
    b"\x98": lambda m: None,
}


def _table() -> tuple[Callable[[Machine], None] | None, ...]:
    actions: list[Callable[[Machine], None] | None] = [None] * 256
    for code, make in _VALUES.items():
        actions[code[0]] = _pushes(make)
    for code, step in _STEPS.items():
        actions[code[0]] = step
    return tuple(actions)


_ACTIONS = _table()
