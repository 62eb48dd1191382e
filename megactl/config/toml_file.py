"""Reading TOML with line numbers (tomllib keeps none) and writing the little of it that `config.toml` needs."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megactl.errors import ConfigError, Problem

_HEADER = re.compile(r"\s*\[\[?([^\[\]]+)\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_GIVE = "give the path of a TOML file"
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


@dataclass(frozen=True)
class TomlFile:
    """A parsed file: its path as the user wrote it, its tables, and the line of each dotted key."""

    path: str
    document: dict[str, Any]
    lines: dict[str, int]

    def where(self, name: str) -> str:
        """ "FILE:LINE" of a dotted name, of the nearest table around it where it has no line of its own."""
        while name and name not in self.lines:
            name = name.rpartition(".")[0]
        return f"{self.path}:{self.lines[name]}" if name else self.path


def read_toml(path: str | Path) -> TomlFile:
    """Parse `path`. Raises ConfigError for a file that is missing, is not UTF-8, or is not TOML, with the line where it breaks."""
    shown = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([Problem(f"--config {shown}", f"cannot be read: {error.strerror or error}", _GIVE)]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(f"--config {shown}", f"is not UTF-8 text (byte {error.start})", _GIVE)]) from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(shown, str(error), text)]) from error
    return TomlFile(shown, document, _lines(text))


def _syntax_problem(path: str, message: str, text: str) -> Problem:
    match = re.search(r"\(at line (\d+), column \d+\)", message)
    if match is None:
        return Problem(path, f"is not TOML: {message}", None)
    line = int(match[1])
    content = text.splitlines()[line - 1].strip() if line <= len(text.splitlines()) else ""
    # The commonest slip of people who come from YAML or the shell: text without quotes.
    unquoted = re.fullmatch(r"[\w.-]+\s*=\s*([^\"'\[{#]*[A-Za-z/][^\"'#]*)", content)
    instead = f'put text in quotes: "{unquoted[1].strip()}"' if unquoted else None
    return Problem(f"{path}:{line}", f"is not TOML: {message[: match.start()].strip()}", instead)


def _lines(text: str) -> dict[str, int]:
    """The first line of each table and key. A line inside a multi-line string may pass for a key, which only costs a wrong line number."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        key = _KEY.match(line)
        if header:
            table = _dotted(header[1])
            found.setdefault(table, number)
        elif key:
            found.setdefault(".".join(filter(None, (table, _dotted(key[1])))), number)
    return found


def _dotted(text: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in text.split("."))


def toml_value(value: Any) -> str:
    """A str, bool, int or float as TOML text. Floats keep every digit, and a point or exponent, so that they are read back as floats."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        text = repr(value)
        return text if any(character in text for character in ".e") else f"{text}.0"
    assert isinstance(value, str), f"no TOML form for {type(value).__name__}"
    return '"' + "".join(_escaped(character) for character in value) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return f"\\u{ord(character):04X}" if ord(character) < 32 or ord(character) == 127 else character


def toml_key(key: str) -> str:
    """A key, quoted where it is not a bare one."""
    return key if _BARE.fullmatch(key) else toml_value(key)
