"""Archives and streams that libarchive reads: the one door to it, and what can be wrong with bytes behind that door.

libarchive reads the tar inside Debian packages, and unpacks zstd and lz4. It calls back for its input, tells damage by
a message, and undoes a filter again when what comes out looks packed once more; here all that becomes entries and one
typed failure.

Source: archive_read(3), archive_read_filter(3), archive_read_format(3).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from systemfiles.foundation.digest import CHUNK
from systemfiles.foundation.errors import ToolMissing

if TYPE_CHECKING:
    from ctypes import Array, c_char

LIBARCHIVE = "libarchive"
INSTALL_LIBARCHIVE = "apt-get install libarchive13 (as root), or: doit setup"

Read = Callable[[int], bytes]
"""Gives at most so many bytes, none at its end."""


class Fault(enum.Enum):
    """What is wrong with a stream."""

    TRUNCATED = "it ends too early"
    TRAILING = "its stream ends and other data follows"
    DAMAGED = "it is damaged"
    SIZE = "it unpacks to too much"
    RATIO = "it unpacks to too many times its size"


class BadStream(Exception):
    """A stream cannot be unpacked whole, or may not be. `fault` says why, the text in more words.

    It does not know its subject, so it must not reach a user: whoever unpacks turns it into an error that does.
    """

    def __init__(self, fault: Fault, words: str | None = None) -> None:
        super().__init__(words or fault.value)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of an archive. `size` is what its header claims, in bytes; 0 where it does not say."""

    name: str
    size: int
    is_file: bool
    _entry: Any
    _feed: _Feed

    def blocks(self, piece: int = CHUNK) -> Iterator[bytes]:
        """Its bytes, to be read before the next entry is asked for. Raises BadStream, and whatever reading raises."""
        with self._feed.faults():
            yield from self._entry.get_blocks(piece)


def entries(read: Read, *, format_name: str, filter_name: str = "none") -> Generator[Entry]:
    """The entries of the archive that `read` gives, by libarchive's names of its format and its compression.

    Raises BadStream, ToolMissing where the host has no libarchive.so, and whatever `read` raises.
    """
    libarchive = _import_libarchive()
    feed = _Feed(read, libarchive.ArchiveError)
    with feed.faults(), libarchive.stream_reader(feed, format_name, filter_name, block_size=CHUNK) as archive:
        if len(archive.filter_names) > 1:  # it unpacks what it unpacked for as long as it can
            raise BadStream(Fault.DAMAGED, f"it is packed with {filter_name} more than once")
        for entry in archive:
            name = entry.pathname or ""
            if isinstance(name, bytes):
                name = name.decode("utf-8", "surrogateescape")
            yield Entry(name, entry.size or 0, entry.isfile, entry, feed)


def _import_libarchive() -> Any:
    try:
        import libarchive  # 30-50 ms, and most runs need none of it
    except (AttributeError, OSError, ImportError) as error:  # the binding fails in its own ways without the library
        raise ToolMissing(LIBARCHIVE, hint=INSTALL_LIBARCHIVE) from error
    return libarchive


class _Feed:
    """What libarchive reads from. No exception gets through its C code, so one is kept and raised behind it."""

    def __init__(self, read: Read, damaged: type[Exception]) -> None:
        self._read = read
        self._damaged = damaged
        self._failure: BaseException | None = None

    def seekable(self) -> bool:
        return False

    def readinto(self, buffer: Array[c_char]) -> int:
        from ctypes import memmove

        if self._failure:
            return 0
        try:
            data = self._read(len(buffer))
        except BaseException as failure:  # an interrupt, too, would be lost
            self._failure = failure
            return 0
        memmove(buffer, data, len(data))  # assigning to a slice of the array goes element by element
        return len(data)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turns what libarchive raises inside into what it means."""
        try:
            yield
        except self._damaged as error:
            if self._failure is None:
                raise _as_bad_stream(getattr(error, "msg", None)) from error
        if self._failure:
            raise self._failure


def _as_bad_stream(message: str | None) -> BadStream:
    """What libarchive means by `message`, which is all there is to go by; at times there is none."""
    if message and "truncated" in message.lower():
        return BadStream(Fault.TRUNCATED)
    if message and "Unknown frame descriptor" in message:  # zstd's; the first frame's was seen before it started
        return BadStream(Fault.TRAILING)
    return BadStream(Fault.DAMAGED, message)
