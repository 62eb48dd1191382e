"""The .bin/.idx pair, byte for byte Megatron's: names, data types, header. Reading is in `indexed`, writing in `indexed_writer`.

.bin is the token ids of every sequence, one after another, without a header. .idx, little endian:

    0   magic b"MMIDIDX\\0\\0"          9   uint64 version = 1        17  uint8 data type code
    18  uint64 S, sequences            26  uint64 D, documents + 1
    34  int32[S] lengths in tokens     then int64[S] byte offsets into .bin, int64[D] first sequence of each document,
        and, in multimodal files alone, int8[S] modes

A document is a run of sequences. GPT data has one sequence a document, BERT data one sentence a sequence.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megactl.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
OLD_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

# Code 7 was float64 until 2021 and is float32 since: the size of .bin tells which (see `indexed`).
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in ((1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (6, "<f8"), (7, "<f4"), (8, "<u2"))
}
CODES: dict[np.dtype, int] = {dtype: code for code, dtype in DTYPES.items()}
# Megatron's threshold, kept below 2^16 with room for tokens added later.
UINT16_VOCABULARY = 65_500


def token_dtype(vocab_size: int) -> np.dtype:
    """The data type Megatron stores a vocabulary of this size with: uint16 below 65 500 tokens, else int32."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCABULARY else np.dtype("<i4")


def clean_prefix(prefix: str | Path) -> Path:
    """The prefix of a pair, also where its .bin or .idx was named instead."""
    path = Path(prefix)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def bin_path(prefix: Path) -> Path:
    """`P.bin`. (A prefix may contain dots, so the suffix is appended and never replaced.)"""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """`P.idx`."""
    return prefix.with_name(prefix.name + ".idx")


def metadata_path(prefix: Path) -> Path:
    """`P.json`: what megactl records beside a pair; pairs made by Megatron have none."""
    return prefix.with_name(prefix.name + ".json")


def unpack_header(data: bytes, path: Path) -> tuple[np.dtype, int, int]:
    """(data type, sequences, documents + 1) of an .idx from its first 34 bytes. Raises DataError with the rule that is broken."""
    again = "preprocess the data again, or copy the file again"
    if data.startswith(OLD_MAGIC):
        raise DataError(
            f"{path}: is in the old TNTIDX format (lazy/cached), which cannot be memory-mapped", "preprocess the source text again"
        )
    if not data.startswith(MAGIC):
        if not data:
            raise DataError(f"{path}: is empty; an index starts with a header of {HEADER.size} bytes", again)
        raise DataError(f"{path}: starts with {data[:9]!r}; an index starts with {MAGIC!r}", "name the prefix of a .bin/.idx pair")
    if len(data) < HEADER.size:
        raise DataError(f"{path}: is truncated to {len(data)} bytes; the header alone has {HEADER.size}", again)
    _, version, code, sequences, boundaries = HEADER.unpack_from(data)
    if version != VERSION:
        raise DataError(f"{path}: version {version}; only version {VERSION} exists", again)
    if code not in DTYPES:
        raise DataError(f"{path}: data type code {code}; must be 1 to 8", again)
    return DTYPES[code], sequences, boundaries
