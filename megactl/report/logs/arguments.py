"""Settings as logs print them, under one spelling: argument dumps, DeepSpeed's configuration, TrainingArguments, traces of a shell.

Names are written with underscores. Values stay the text that was printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Names of other eras and systems for the same thing; everything else keeps its name.
_SPELLINGS = {
    "model_parallel_size": "tensor_model_parallel_size",
    "pipe_parallel_size": "pipeline_model_parallel_size",
    "pipeline_parallel_size": "pipeline_model_parallel_size",
    "tensor_parallel_size": "tensor_model_parallel_size",
}
# Degrees and batches are left to the command: scripts carry such variables along from a launch that used them.
_SHELL_NAMES = {"NNODES": "nnodes", "GPUS_PER_NODE": "gpus_per_node"}
_PREFIX = re.compile(r"(?:\s*[0-9]+:\s|\[[A-Za-z_]+ ?[0-9]+\]:? ?|[A-Za-z0-9][\w.-]{0,63}[0-9]: )+")
_ROW = re.compile(r"\s*([A-Za-z_]\w*)(?: \.+ |  )(.*)")
_SHELL = re.compile(r"\++ (?:export )?'?([A-Z_]+)=(\S*)")
_OPTION = re.compile(r"--([A-Za-z][\w-]*)(?:[ =]+(?!--)([^\s\\]+))?")
_SIZES = re.compile(r"\b(world|[a-z-]+-parallel)[- ]size: ([0-9]{1,18})")
_LONGEST_REPR = 1 << 16
_DEEPEST = 8


def unprefixed(line: str) -> str:
    """`line` without what launchers put before it: "12: " of srun -l, "[default0]:" of torchrun, "[rank3]:", "worker-1: " of pdsh."""
    match = _PREFIX.match(line)
    return line[match.end() :] if match else line


def spelled(name: str) -> str:
    """The one spelling of a setting's name."""
    name = name.replace("-", "_")
    return _SPELLINGS.get(name, name)


def dump_row(line: str) -> tuple[str, str] | None:
    """(name, value) of a row "  seq_length ........ 1024" of an argument dump; None for any other line. A long name has no dots."""
    match = _ROW.fullmatch(unprefixed(line))
    return (spelled(match[1]), match[2].strip()) if match else None


def shell_settings(line: str) -> Iterator[tuple[str, str]]:
    """(name, value) of a line that `bash -x` printed: variables whose meaning is common, and the options of a training command."""
    match = _SHELL.match(unprefixed(line))
    if match and match[1] in _SHELL_NAMES and match[2].isdigit():
        yield _SHELL_NAMES[match[1]], match[2]
    for option in _OPTION.finditer(line):
        value = (option[2] or "True").strip("'\"")
        yield spelled(option[1]), value
        if option[1] == "config_overrides":
            yield from overrides(value)


def overrides(text: str) -> Iterator[tuple[str, str]]:
    """(name, value) of "n_embd=7168,n_head=32", as Hugging Face's run_clm takes it."""
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if equals:
            yield spelled(name.strip()), value.strip()


def sizes(line: str) -> Iterator[tuple[str, str]]:
    """(name, value) of "using world size: 64, data-parallel-size: 1, tensor-model-parallel size: 4"."""
    for match in _SIZES.finditer(line):
        yield ("world_size" if match[1] == "world" else spelled(f"{match[1]}_size")), match[2]


def flattened(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of nested settings: "zero_optimization.stage"."""
    for name, value in values.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            yield from flattened(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


class JsonBlock:
    """Collects the lines of a JSON object until its braces are closed."""

    def __init__(self, start: str) -> None:
        self._parts = [start]
        self._open = start.count("{") - start.count("}")

    def add(self, line: str) -> dict[str, Any] | None:
        """The object, once `line` closes it; {} where it was closed and is damaged."""
        # Another rank's line in between breaks the object, and json says so.
        line = unprefixed(line)
        self._parts.append(line)
        self._open += line.count("{") - line.count("}")
        if self._open > 0:
            return None
        try:
            found = json.loads("\n".join(self._parts))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


class ReprBlock:
    """Collects `TrainingArguments(name=value, ...)` over one or many lines."""

    def __init__(self) -> None:
        self._text: str | None = None

    def add(self, line: str) -> list[tuple[str, str]] | None:
        """(name, value) of every argument once the closing bracket is there, else None. A repr of more than 64 KiB is given up: []."""
        line = unprefixed(line)
        self._text = line.partition("TrainingArguments(")[2] if self._text is None else self._text + line
        if len(self._text) > _LONGEST_REPR:
            return []
        parts = _top_level(self._text)
        if parts is None:
            return None
        pairs = (part.partition("=") for part in parts)
        return [(spelled(name.strip()), value.strip()) for name, equals, value in pairs if equals]


def _top_level(text: str) -> list[str] | None:
    """`text` up to its unmatched closing bracket, cut at the commas outside of brackets; None where it is not closed."""
    depth, start, parts = 0, 0, []
    for place, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}" and depth:
            depth -= 1
        elif character == ")":
            return [*parts, text[start:place]]
        elif character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return None
