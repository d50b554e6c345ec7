"""Debian packages, read in one pass: an ar archive whose one data.tar member has the files (deb(5)).

libarchive reads the tar; nothing is unpacked to the disk here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from systemfiles.foundation.archive import BadStream, Entry, entries
from systemfiles.foundation.errors import InvalidArchive
from systemfiles.foundation.unpack import Compression, Limits, Packed, unpacked

LARGEST_UNPACKED = 4 << 30
MOST_ENTRIES = 200_000
_COMPRESSIONS = (Compression.GZIP, Compression.XZ, Compression.ZSTD, Compression.BZIP2, Compression.LZMA)
# of the tar itself, so with headers and padding; packages of kernels and programs unpack to ten times their size
_LIMITS = Limits(2 * LARGEST_UNPACKED, max_ratio=200, ratio_free=256 << 20)
_MAGIC = b"!<arch>\n"
_HEADER = 60
_DATA = re.compile(rb"data\.tar(\.[a-z0-9]+)?/?")


@dataclass(frozen=True, slots=True)
class DebFile:
    """One regular file of a package: its path without a leading "./", and its `size` in bytes."""

    path: str
    size: int
    _package: Path
    _entry: Entry

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, to be read before the next file is asked for. Raises InvalidArchive when they are damaged."""
        with _as_invalid(self._package):
            yield from self._entry.blocks()

    def read(self) -> bytes:
        return b"".join(self.blocks())


def is_deb(path: Path) -> bool:
    """Whether the file at `path` begins like a package."""
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def read_deb(path: Path) -> Iterator[DebFile]:
    """Every regular file of the package at `path`, in the package's order.

    Raises InvalidArchive for anything that is not a whole, well-formed package, and ToolMissing without libarchive.
    """
    with path.open("rb") as stream, _as_invalid(path):
        start, size = _find_data(stream, path)
        stream.seek(start)
        packed = Packed(stream, length=size)
        with (
            closing(unpacked(packed, packed.told(_COMPRESSIONS), _LIMITS, members=True)) as tar,
            closing(entries(lambda _: next(tar, b""), format_name="tar")) as found,
        ):
            total = 0
            for count, entry in enumerate(found):
                total += entry.size
                if count >= MOST_ENTRIES or total > LARGEST_UNPACKED:
                    raise InvalidArchive(path, f"it holds more than {MOST_ENTRIES} entries or {LARGEST_UNPACKED} bytes")
                if entry.is_file:
                    yield DebFile(entry.name.removeprefix("./"), entry.size, path, entry)
            for _ in tar:  # the padding, so that the last checksum is seen to be right
                pass


@contextmanager
def _as_invalid(path: Path) -> Iterator[None]:
    try:
        yield
    except BadStream as error:
        raise InvalidArchive(path, f"its data cannot be read ({error})") from error


def _find_data(stream: BinaryIO, path: Path) -> tuple[int, int]:
    """Offset and size of the only data.tar member."""
    end = path.stat().st_size
    if stream.read(len(_MAGIC)) != _MAGIC:
        raise InvalidArchive(path, "it is not a Debian package")
    found = []
    position = len(_MAGIC)
    while position < end:
        stream.seek(position)
        header = stream.read(_HEADER)
        size = header[48:58].strip()
        if len(header) != _HEADER or header[58:] != b"`\n" or not size.isdigit():
            raise InvalidArchive(path, f"the ar header at byte {position} is broken")
        if position + _HEADER + int(size) > end:
            raise InvalidArchive(path, f"it is cut off: its member at byte {position} should be {int(size)} bytes")
        if _DATA.fullmatch(header[:16].strip()):
            found.append((position + _HEADER, int(size)))
        position += _HEADER + int(size) + int(size) % 2
    if len(found) != 1:
        raise InvalidArchive(path, f"it has {len(found)} data.tar members instead of one")
    return found[0]
