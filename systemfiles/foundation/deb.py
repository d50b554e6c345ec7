"""Debian packages, read in one pass: an ar archive whose one data.tar member has the files (deb(5)).

libarchive decompresses and reads the tar; nothing is unpacked to the disk here.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from systemfiles.foundation.digest import CHUNK
from systemfiles.foundation.errors import InvalidArchive, ToolMissing

LIBARCHIVE = "libarchive"
INSTALL_LIBARCHIVE = "apt-get install libarchive13 (as root), or: doit setup"
LARGEST_UNPACKED = 4 << 30
MOST_ENTRIES = 200_000
_MAGIC = b"!<arch>\n"
_HEADER = 60
_DATA = re.compile(rb"data\.tar(\.[a-z0-9]+)?/?")


@dataclass(frozen=True, slots=True)
class DebFile:
    """One regular file of a package: its path without a leading "./", and its `size` in bytes."""

    path: str
    size: int
    _entry: Any

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, to be read before the next file is asked for."""
        yield from self._entry.get_blocks(CHUNK)

    def read(self) -> bytes:
        return b"".join(self.blocks())


class _Window(io.RawIOBase):
    """A part of a file as a stream of its own."""

    def __init__(self, stream: BinaryIO, start: int, size: int) -> None:
        self._stream = stream
        self._left = size
        stream.seek(start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left]
        count: int = self._stream.readinto(view)  # type: ignore[attr-defined]
        self._left -= count
        return count


def read_deb(path: Path) -> Iterator[DebFile]:
    """Every regular file of the package at `path`, in the package's order.

    Raises InvalidArchive for anything that is not a whole, well-formed package, and ToolMissing without libarchive.
    """
    libarchive = import_libarchive()
    with path.open("rb") as stream:
        start, size = _find_data(stream, path)
        window = _Window(stream, start, size)
        with (
            _as_invalid(path, libarchive),
            libarchive.stream_reader(window, format_name="tar", block_size=CHUNK) as tar,
        ):
            total = 0
            for count, entry in enumerate(tar):
                total += entry.size or 0
                if count >= MOST_ENTRIES or total > LARGEST_UNPACKED:
                    raise InvalidArchive(path, f"it holds more than {MOST_ENTRIES} entries or {LARGEST_UNPACKED} bytes")
                if entry.isfile:
                    yield DebFile(entry.pathname.removeprefix("./"), entry.size, entry)


def import_libarchive() -> Any:
    """The libarchive module. Raises ToolMissing where the host has no libarchive.so."""
    try:
        import libarchive
    except (AttributeError, OSError, ImportError) as error:  # the binding fails in its own ways without the library
        raise ToolMissing(LIBARCHIVE, hint=INSTALL_LIBARCHIVE) from error
    return libarchive


@contextlib.contextmanager
def _as_invalid(path: Path, libarchive: Any) -> Iterator[None]:
    try:
        yield
    except libarchive.ArchiveError as error:
        raise InvalidArchive(path, f"its data cannot be read ({error.msg})") from error


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
