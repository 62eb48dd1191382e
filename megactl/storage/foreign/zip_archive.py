"""The zip archives that torch.save writes: where each record lies, without extracting anything.

Only the directory at the end is read (APPNOTE.TXT 6.3.10, with its 64-bit forms), and each record's own header once it is needed. What two
readers could understand differently is refused: two records of one name, records that overlap, records behind the end of the file.
torch stores its records as they are; a compressed one is unpacked only where the caller gives a limit.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from megactl.errors import CheckpointError
from megactl.storage.foreign.opened import OpenFile

_END, _END_64, _END_64_AT, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
_END_LENGTH, _COMMENT, _ENTRY_LENGTH, _LOCAL_LENGTH = 22, 65535, 46, 30
# A record takes at least its 46 bytes of directory; torch writes one a tensor.
_DIRECTORY_LIMIT = 256 * 1024 * 1024
_STORED, _DEFLATED = 0, 8
_AGAIN = "the file was cut short or damaged; save or copy it again, or use another checkpoint"
_NONE_16, _NONE_32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Record:
    """One record: its size unpacked and as stored, where its header begins, and its CRC-32."""

    name: str
    size: int
    stored: int
    header: int
    method: int
    crc: int


class ZipArchive:
    """The directory of an archive inside `file`. Raises CheckpointError for everything that is not a plain, consistent archive."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        count, length, start = self._end()
        if length > _DIRECTORY_LIMIT or start + length > file.size:
            raise self.damaged(f"a directory of {length} bytes at byte {start} does not fit")
        self.records: dict[str, Record] = {}
        self._directory(file.read(start, length), count)
        self._check_overlap(start)

    def damaged(self, problem: str) -> CheckpointError:
        """The error for an archive that is not whole."""
        return CheckpointError(f"{self.file.path}: damaged zip archive: {problem}", _AGAIN)

    def _end(self) -> tuple[int, int, int]:
        """(records, bytes of the directory, where it begins) from the record at the end of the file."""
        tail_start = max(0, self.file.size - _END_LENGTH - _COMMENT)
        tail = self.file.read(tail_start, self.file.size - tail_start)
        at = tail.rfind(_END)
        if at < 0 or len(tail) - at < _END_LENGTH:
            raise self.damaged("its directory, which is written last, is missing")
        disk, _, _, count, length, start, _ = struct.unpack("<HHHHIIH", tail[at + 4 : at + _END_LENGTH])
        if disk not in (0, _NONE_16):
            raise self.damaged("it continues in another file")
        if count == _NONE_16 or length == _NONE_32 or start == _NONE_32:
            return self._end_64(tail_start + at - 20)
        return count, length, start

    def _end_64(self, at: int) -> tuple[int, int, int]:
        if at < 0 or (locator := self.file.read(at, 20))[:4] != _END_64_AT:
            raise self.damaged("the 64-bit end of its directory is missing")
        place = struct.unpack("<Q", locator[8:16])[0]
        if place + 56 > self.file.size or (end := self.file.read(place, 56))[:4] != _END_64:
            raise self.damaged("the 64-bit end of its directory is missing")
        count, length, start = struct.unpack("<QQQ", end[32:56])
        return count, length, start

    def _directory(self, data: bytes, count: int) -> None:
        at = 0
        while at < len(data):
            if len(data) - at < _ENTRY_LENGTH or data[at : at + 4] != _ENTRY:
                raise self.damaged(f"byte {at} of its directory is no entry")
            flags, method, _, _, crc, stored, size, name_length, extra_length, note_length = struct.unpack(
                "<HHHHIIIHHH", data[at + 8 : at + 34]
            )
            header = struct.unpack("<I", data[at + 42 : at + 46])[0]
            name_at = at + _ENTRY_LENGTH
            at = name_at + name_length + extra_length + note_length
            if at > len(data):
                raise self.damaged("an entry of its directory is cut short")
            extra = data[name_at + name_length : name_at + name_length + extra_length]
            size, stored, header = self._wide(extra, size, stored, header)
            self._add(Record(_decoded(data[name_at : name_at + name_length]), size, stored, header, method, crc), flags)
        if len(self.records) != count:
            raise self.damaged(f"{len(self.records)} records, its end says {count}")

    def _wide(self, extra: bytes, *values: int) -> list[int]:
        """Sizes that do not fit 32 bits stand in the extra field 1, in a fixed order, those that are needed only."""
        wide, at = b"", 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack("<HH", extra[at : at + 4])
            if kind == 1:
                wide = extra[at + 4 : at + 4 + length]
            at += 4 + length
        found = []
        for value in values:
            if value == _NONE_32:
                if len(wide) < 8:
                    raise self.damaged("a 64-bit size is missing")
                value, wide = struct.unpack("<Q", wide[:8])[0], wide[8:]
            found.append(value)
        return found

    def _add(self, record: Record, flags: int) -> None:
        name = record.name
        if name in self.records:
            raise self.damaged(f"two records are called {name[:80]!r}, so readers may disagree on which is meant")
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
            raise self.damaged(f"the record name {name[:80]!r} leads out of the archive")
        if flags & 1:
            raise self.damaged(f"{name[:80]!r} is encrypted")
        if record.method == _STORED and record.size != record.stored:
            raise self.damaged(f"{name[:80]!r} has two sizes, {record.size} and {record.stored}")
        self.records[name] = record

    def _check_overlap(self, directory: int) -> None:
        """Records must follow one another: an archive whose records share bytes unpacks to more than it is."""
        end, before = 0, ""
        for record in sorted(self.records.values(), key=lambda record: record.header):
            if record.header < end:
                raise self.damaged(f"{record.name[:80]!r} overlaps {before[:80]!r}")
            end, before = record.header + _LOCAL_LENGTH + len(record.name) + record.stored, record.name
        if end > directory:
            raise self.damaged(f"{before[:80]!r} reaches into its directory")

    def data_start(self, record: Record) -> int:
        """The first byte of a record's data: behind its own header, whose length only the header itself says."""
        if record.header + _LOCAL_LENGTH > self.file.size:
            raise self.damaged(f"{record.name[:80]!r} begins behind the end")
        header = self.file.read(record.header, _LOCAL_LENGTH)
        if header[:4] != _LOCAL:
            raise self.damaged(f"there is no record at byte {record.header}, where {record.name[:80]!r} should be")
        start = record.header + _LOCAL_LENGTH + sum(struct.unpack("<HH", header[26:30]))
        if start + record.stored > self.file.size:
            raise self.damaged(f"{record.name[:80]!r} ends behind the end of the file")
        return start

    def read(self, record: Record, limit: int) -> bytes:
        """The bytes of a small record, unpacked; never more than `limit`. Raises CheckpointError also where its CRC-32 differs."""
        if record.size > limit:
            raise CheckpointError(
                f"{self.file.path}: {record.name[:80]} says it has {record.size} bytes, at most {limit} are read", "do not trust this file"
            )
        data = self.file.read(self.data_start(record), record.stored)
        if record.method == _DEFLATED:
            data = self._inflate(data, record)
        elif record.method != _STORED:
            raise self.damaged(f"{record.name[:80]!r} is packed by method {record.method}, which torch does not read")
        # torch can be told to write no checksums; it then writes 0.
        if record.crc and zlib.crc32(data) != record.crc:
            raise self.damaged(f"{record.name[:80]!r} does not match its checksum")
        return data

    def _inflate(self, data: bytes, record: Record) -> bytes:
        try:
            # One byte more than it says: a longer stream then shows itself, and never fills the memory.
            found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, record.size + 1)
        except zlib.error:
            raise self.damaged(f"{record.name[:80]!r} cannot be unpacked") from None
        if len(found) != record.size:
            raise self.damaged(f"{record.name[:80]!r} does not unpack to the {record.size} bytes it says")
        return found


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "replace")
