"""Reading a script to lint: bytes to text, and a plain message for what is none."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from megactl.cluster.lint import LARGEST
from megactl.errors import MegactlError

STDIN = "-"


def read_source(name: str) -> str:
    """The text of a file, or of stdin for "-". Line ends and a byte order mark are kept: they are findings.

    Raises MegactlError for what cannot be read, is binary, or is longer than sbatch takes.
    """
    try:
        raw = sys.stdin.buffer.read(LARGEST + 1) if name == STDIN else _read(Path(name))
    except OSError as error:
        raise MegactlError(f"{name}: {error.strerror}", "give the path of a batch script") from error
    if len(raw) > LARGEST:
        raise MegactlError(f"{name}: is longer than {LARGEST >> 20} MiB, which sbatch refuses", "is it a script?")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise MegactlError(f"{name}: is UTF-16, which sbatch cannot read", f"convert it: iconv -f UTF-16 -t UTF-8 {name} > new.sh")
    if not raw or raw.startswith(b"\x7fELF") or raw.count(b"\0") * 20 > len(raw):
        raise MegactlError(f"{name}: {'is empty' if not raw else 'is binary'}, and no script", "give the path of a batch script")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        # An old encoding in a comment is no reason to refuse: every byte keeps its place.
        return raw.decode("latin-1")


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LARGEST + 1)
