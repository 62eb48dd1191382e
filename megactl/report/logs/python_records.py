"""The Python twin of csrc/native/log_records.h: iteration lines and timers of one line. Both must agree on every input."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

LONGEST_KEY = LONGEST_NUMBER = 64
MOST_LOSSES, MOST_TIMERS = 32, 256

# "s" is found under the same column as "ms" and is not divided.
_FIELDS: dict[bytes, str] = {
    b"elapsed time per iteration (ms)": "seconds",
    b"elapsed time per iteration (s)": "seconds",
    b"learning rate": "learning_rate",
    b"grad norm": "grad_norm",
    b"loss scale": "loss_scale",
    b"global batch size": "global_batch",
    b"consumed samples": "consumed_samples",
    b"throughput per GPU (TFLOP/s/GPU)": "tflops_logged",
    b"TFLOPs": "tflops_logged",
    b"number of skipped iterations": "skipped",
    b"number of nan iterations": "nan",
    b"samples per second": "samples_per_second",
    b"params norm": "params_norm",
    b"num zeros": "num_zeros",
}
_OWN_MARK = b"tokens/s"
_NUMBER = re.compile(rb"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
_HEAD = re.compile(rb"iteration[ \t]+([0-9]+)[ \t]*/[ \t]*([0-9]+|infinity)[ \t]*\|")
_TIMER_NAME = re.compile(rb"[A-Za-z][A-Za-z0-9 \-_/,.]{0,63}")
_ROW_MARK = b"...: "
_BLANK = re.compile(rb"[ \t]")
_DOT, _SPACE = b". "


def parse_number(text: bytes) -> float | None:
    """The whole of `text` as a decimal number, nan or inf; None where it is anything else, or longer than 64 bytes."""
    return float(text) if len(text) <= LONGEST_NUMBER and _NUMBER.fullmatch(text) else None


def _split_field(piece: bytes) -> tuple[bytes, bytes] | None:
    key, colon, value = piece.rpartition(b":")
    return (key.strip(b" \t"), value.strip(b" \t")) if colon else None


class Iteration:
    """One iteration's numbers: `values` by column name, `losses` by printed name; absent where not printed."""

    def __init__(self, iteration: int, total: int) -> None:
        self.iteration, self.total = iteration, total
        self.values: dict[str, float] = {}
        self.losses: dict[bytes, float] = {}

    def drop_placeholders(self) -> None:
        """DeepSpeed's pipeline engine keeps scale, norm and zeros to itself; Megatron then prints -1 and zeros in their place."""
        if self.values.get("loss_scale") != -1.0:
            return
        for name in ("loss_scale", *(name for name in ("grad_norm", "num_zeros") if self.values.get(name) == 0.0)):
            self.values.pop(name)


class IterationReader:
    """Iterations of a line; knows the names of the losses met so far."""

    def __init__(self) -> None:
        self.loss_names: list[bytes] = []
        self.saw_own_line = False

    def read(self, line: bytes) -> Iterator[Iteration]:
        """Every iteration of the line that has a time, also where ranks wrote over each other."""
        if line.strip(b" \t").startswith(b"#"):
            return
        heads = [match for match in _HEAD.finditer(line) if _fits(match[1]) and (match[2] == b"infinity" or _fits(match[2]))]
        for match, behind in zip(heads, [*heads[1:], None], strict=False):
            row = Iteration(int(match[1]), -1 if match[2] == b"infinity" else int(match[2]))
            # What is behind the last bar was cut, and its number with it.
            for piece in line[match.end() : behind.start() if behind else len(line)].split(b"|")[:-1]:
                self._read_field(piece, row)
            if "seconds" in row.values:
                yield row

    def _read_field(self, piece: bytes, row: Iteration) -> None:
        field = _split_field(piece)
        if field is None or len(field[0]) > LONGEST_KEY:
            return
        key = field[0]
        name, is_loss = _FIELDS.get(key), key.endswith(b"loss")
        if is_loss and not self._knows_loss(key := b"lm loss" if key == b"lm-loss" else key):
            return
        number = parse_number(field[1])
        if number is None:
            return
        self.saw_own_line |= key == _OWN_MARK
        if is_loss:
            _set_once(row.losses, key, number)
        elif name is not None:
            _set_once(row.values, name, number / 1000.0 if key.endswith(b"(ms)") else number)

    def _knows_loss(self, name: bytes) -> bool:
        if name not in self.loss_names and len(self.loss_names) < MOST_LOSSES:
            self.loss_names.append(name)
        return name in self.loss_names


def _fits(digits: bytes) -> bool:
    return len(digits) <= 18


def _set_once(values: dict[Any, float], key: Any, number: float) -> None:
    # NaN counts as not set, as in the columns.
    if not math.isnan(number) and key not in values:
        values[key] = number


def timers_of_line(line: bytes, terminated: bool) -> Iterator[tuple[bytes, float]]:
    """(name, milliseconds) of "time (ms) | name: 1.0 | ...", up to what is no timer; the last number of a cut line is left out."""
    start = line.find(b"time (ms)")
    while start >= 0:
        rest = line[start + 9 :].lstrip(b" \t")
        if rest.startswith(b"|"):
            yield from _pieces(rest[1:].split(b"|"), terminated)
        start = line.find(b"time (ms)", start + 1)


def _pieces(pieces: list[bytes], terminated: bool) -> Iterator[tuple[bytes, float]]:
    # An empty last piece is a bar at the end of the line.
    whole = pieces if terminated and pieces[-1] else pieces[:-1]
    for piece in whole:
        field = _split_field(piece)
        number = parse_number(field[1]) if field else None
        if field is None or number is None or not _TIMER_NAME.fullmatch(field[0]):
            return
        yield field[0], number


def timer_rows(line: bytes, terminated: bool) -> Iterator[tuple[bytes, float]]:
    """(name, milliseconds) of "name .....: (1.0, 2.0)", the largest over ranks, and of "name .....: 2.0"."""
    at = line.find(_ROW_MARK)
    while at >= 0:
        start = at
        while start > 0 and line[start - 1] == _DOT:
            start -= 1
        if start >= 2 and line[start - 1] == _SPACE:
            name = _BLANK.split(line[max(0, start - 1 - LONGEST_KEY) : start - 1])[-1]
            # One byte more than a number may have, so that a longer one is seen to be longer.
            number = _row_value(line[at + len(_ROW_MARK) : at + len(_ROW_MARK) + 2 * LONGEST_NUMBER + 4], terminated)
            if number is not None and _TIMER_NAME.fullmatch(name):
                yield name, number
        at = line.find(_ROW_MARK, at + len(_ROW_MARK))


def _row_value(rest: bytes, terminated: bool) -> float | None:
    if not rest.startswith(b"("):
        word = _BLANK.split(rest, maxsplit=1)
        return parse_number(word[0]) if len(word) > 1 or terminated else None
    inside, closed, _ = rest.partition(b")")
    lowest, comma, highest = inside[1:].partition(b", ")
    return parse_number(highest) if closed and comma and parse_number(lowest) is not None else None
