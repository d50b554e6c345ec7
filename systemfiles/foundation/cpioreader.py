"""The newc cpio format read back, strictly: an archive is whole and well formed, or refused.

cpio.py describes the format, and has the records that come out here.
"""

from __future__ import annotations

import re
import stat
import struct
from dataclasses import dataclass, replace
from typing import BinaryIO, NoReturn

from systemfiles.foundation.cpio import DEVICES, MODE_MAX, PATH_MAX, TRAILER, TYPES, Record
from systemfiles.foundation.digest import CHUNK
from systemfiles.foundation.errors import InvalidArchive

_HEADER_SIZE = 110
_HEADER = re.compile(rb"070701([0-9A-Fa-f]{104})")


@dataclass(frozen=True, slots=True)
class Limits:
    """What `read` accepts: number of entries, and bytes in the whole archive."""

    entries: int = 100_000
    size: int = 1 << 30


def read(stream: BinaryIO, *, limits: Limits | None = None) -> tuple[Record, ...]:
    """The records of one uncompressed archive, in its order and with its names, all content in memory.

    The first name of a hard-linked file has its content, wherever the archive keeps it. Names are as found: they may
    be absolute or hold `..`, which `normalise` refuses. Raises InvalidArchive for whatever breaks the format or
    `limits`, an archive without a trailer, and anything but zeros after it.
    """
    source = _Input(stream, limits or Limits())
    records: list[Record] = []
    firsts: dict[tuple[int, int, int], int] = {}
    while (entry := _read_entry(source)) is not None:
        inode, nlink, record = entry
        if len(records) >= source.limits.entries:
            source.refuse(f"it has more than {source.limits.entries} entries")
        if nlink < 2 or record.type in (stat.S_IFDIR, stat.S_IFLNK):
            records.append(record)
            continue
        first = firsts.setdefault(inode, len(records))
        if first < len(records):
            records[first] = _merge(source, records[first], record)
            record = replace(records[first], name=record.name, data=b"", hardlink=records[first].name)
        records.append(record)
    source.expect_zeros()
    return tuple(records)


def _merge(source: _Input, first: Record, other: Record) -> Record:
    if first.type != other.type or first.rdev != other.rdev:
        source.refuse(f"{other.name!r} shares an inode with {first.name!r} but is of another type")
    if first.data and other.data and first.data != other.data:
        source.refuse(f"{other.name!r} and {first.name!r} are one file with two contents")
    return replace(first, data=first.data or other.data)


def _read_entry(source: _Input) -> tuple[tuple[int, int, int], int, Record] | None:
    head = source.take(_HEADER_SIZE)
    match = _HEADER.fullmatch(head)
    if not match:
        source.refuse(f"there is no newc header but {head[:6]!r}")
    fields = struct.unpack(">13I", bytes.fromhex(match[1].decode()))
    inode, mode, uid, gid, nlink, mtime, size, major, minor, rmajor, rminor, length, _ = fields
    if not 2 <= length <= PATH_MAX:
        source.refuse(f"a name of {length} bytes")
    name, end, rest = source.take(length).partition(b"\0")
    if not name or not end or rest:
        source.refuse("a name is not ended by its only NUL")
    source.align()
    if name == TRAILER.encode() and not size:
        return None
    record = Record(name.decode("utf-8", "surrogateescape"), mode, b"", (rmajor, rminor), None, uid, gid, mtime)
    if record.type not in TYPES or mode > MODE_MAX:
        source.refuse(f"{record.name!r} has mode {mode:#o}")
    if size and record.type not in (stat.S_IFREG, stat.S_IFLNK):
        source.refuse(f"{record.name!r} has content but is neither file nor link")
    if record.type not in DEVICES:
        record = replace(record, rdev=(0, 0))
    data = source.take(size)
    source.align()
    return (major, minor, inode), nlink, replace(record, data=data)


class _Input:
    """Takes exact amounts from a stream and never more than the limit."""

    def __init__(self, stream: BinaryIO, limits: Limits) -> None:
        self._stream = stream
        self._subject = "cpio archive"
        self.limits = limits
        self.offset = 0

    def refuse(self, problem: str) -> NoReturn:
        raise InvalidArchive(self._subject, f"{problem} (at offset {self.offset})")

    def take(self, count: int) -> bytes:
        if self.offset + count > self.limits.size:
            self.refuse(f"it is larger than {self.limits.size} bytes")
        pieces = []
        while count:
            piece = self._stream.read(min(count, CHUNK))
            if not piece:
                self.refuse("it is truncated")
            pieces.append(piece)
            count -= len(piece)
            self.offset += len(piece)
        return b"".join(pieces)

    def align(self) -> None:
        if any(self.take(-self.offset % 4)):
            self.refuse("padding is not zero")

    def expect_zeros(self) -> None:
        while piece := self._stream.read(CHUNK):
            self.offset += len(piece)
            if self.offset > self.limits.size or piece.strip(b"\0"):
                self.refuse("there is something after the trailer")
