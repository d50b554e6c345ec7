"""Compressed streams, unpacked piece by piece without being trusted: the one place that decompresses.

What a stream is packed with is told by its first bytes::

    1f 8b               gzip       RFC 1952, 2.3
    fd 37 7a 58 5a 00   xz         The .xz File Format, 2.1.1.1
    28 b5 2f fd         zstd       RFC 8878, 3.1.1
    02 21 4c 18         lz4        LZ4 Frame Format, "Legacy frame": what kernels are packed with
    42 5a 68            bzip2
    5d 00 00            lzma       the format before xz; these are its usual properties
    04 22 4d 18         lz4 frame  known by name only
    89 4c 5a 4f …       lzo        known by name only

Memory stays small whatever the bytes claim: pieces are of a size, a dictionary has at most 128 MiB, a block of legacy
lz4 has 8 MiB. Output is bounded by the caller's `Limits`. Whatever is wrong with the bytes, or is more than the limits,
is a `BadStream`; callers know whose bytes they are and turn it into an error of their own.
"""

from __future__ import annotations

import enum
import io
import zlib
from collections.abc import Collection, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol

from systemfiles.foundation.archive import BadStream, Fault, Read, entries
from systemfiles.foundation.digest import CHUNK

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MIB = 1 << 20
_INPUT = 1 << 16  # taken at a time; what zlib cannot use of it yet is copied
_XZ_MEMORY = (128 + 8) * _MIB  # the kernel's build asks for dictionaries of 128 MiB at most; a decoder needs some more
_LZ4_BLOCK = 8 * _MIB
_LZ4_PACKED = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16  # a block that cannot be compressed
_LZ4_BLOCKS = 4096  # a block may hold nothing, so that no limit on the output counts it


class Compression(enum.Enum):
    """A compression, under its name for messages."""

    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"
    LZ4 = "lz4"
    BZIP2 = "bzip2"
    LZMA = "lzma"
    LZ4_FRAME = "lz4 frame"
    LZO = "lzo"

    @classmethod
    def of(cls, head: bytes) -> Compression | None:
        """The one whose magic number `head` begins with."""
        return next((compression for magic, compression in _MAGIC if head.startswith(magic)), None)


_MAGIC = (
    (b"\x1f\x8b", Compression.GZIP),
    (b"\xfd7zXZ\x00", Compression.XZ),
    (b"\x28\xb5\x2f\xfd", Compression.ZSTD),
    (b"\x02\x21\x4c\x18", Compression.LZ4),
    (b"\x04\x22\x4d\x18", Compression.LZ4_FRAME),
    (b"BZh", Compression.BZIP2),
    (b"\x5d\x00\x00", Compression.LZMA),
    (b"\x89LZO\x00\r\n\x1a\n", Compression.LZO),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a stream may unpack: to `max_size` bytes, and to `max_ratio` times its packed size.

    The ratio counts beyond `ratio_free` bytes; against the bytes read so far where the packed size is not known.
    """

    max_size: int
    max_ratio: int | None = None
    ratio_free: int = 0


class Packed(io.BufferedReader):
    """The bytes of one packed stream and no others: what `stream` has left, or its next `length` bytes."""

    def __init__(self, stream: BinaryIO, *, length: int | None = None) -> None:
        self._part = _Part(stream, length)
        super().__init__(self._part, CHUNK)
        self._length = length

    @property
    def size(self) -> int:
        """Its length, or how much was read of it so far where that is not known."""
        return self._part.count if self._length is None else self._length

    def told(self, known: Collection[Compression]) -> Compression | None:
        """Which of `known` it begins as; None for anything else. It stays where it is."""
        compression = Compression.of(self.peek(16)[:16])
        return compression if compression in known else None


class _Part(io.RawIOBase):
    """What is left of a stream, or a part of that, counted."""

    def __init__(self, stream: BinaryIO, length: int | None) -> None:
        self._stream = stream
        self._length = length
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        most = len(view) if self._length is None else min(len(view), self._length - self.count)
        data = self._stream.read(most)
        view[: len(data)] = data
        self.count += len(data)
        return len(data)


def unpacked(
    packed: Packed, compression: Compression | None, limits: Limits, *, piece: int = CHUNK, members: bool = False
) -> Generator[bytes]:
    """What `packed` holds, in pieces of at most `piece` bytes; itself when `compression` is None.

    With `members` several streams may follow one another, and zeros the last; zstd frames always may. No byte beyond
    `limits` is given out. Raises BadStream, also for other data behind the end; ToolMissing for zstd and lz4 on a host
    without libarchive; and whatever reading raises.
    """
    size = 0
    with closing(_decoded(packed, compression, piece, members=members)) as blocks:
        for block in blocks:
            size += len(block)
            if size > limits.max_size:
                raise BadStream(Fault.SIZE)
            if limits.max_ratio is not None and size > max(limits.ratio_free, limits.max_ratio * packed.size):
                raise BadStream(Fault.RATIO)
            if block:
                yield block


def _decoded(packed: Packed, compression: Compression | None, piece: int, *, members: bool) -> Generator[bytes]:
    match compression:
        case None:
            return (block for block in iter(lambda: packed.read(piece), b""))
        case Compression.ZSTD:
            return _by_libarchive(packed.read, "zstd", piece)
        case Compression.LZ4:
            return _by_libarchive(_Lz4Blocks(packed).read, "lz4", piece)
        case Compression.LZ4_FRAME | Compression.LZO:
            raise BadStream(Fault.DAMAGED, f"nothing here unpacks {compression.value}")
        case _:
            return _by_library(packed, compression, piece, members=members)


# --- by the standard library ---


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Inflater:
    """zlib for gzip, with the interface that lzma and bz2 have."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail or data, max_length)

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def _decoder(compression: Compression) -> tuple[_Decoder, type[Exception]]:
    """A new decoder, and what it raises for damaged data."""
    if compression is Compression.GZIP:
        return _Inflater(), zlib.error
    if compression is Compression.BZIP2:
        import bz2  # these two here for start-up: most hosts never meet them

        return bz2.BZ2Decompressor(), OSError
    import lzma

    form = lzma.FORMAT_XZ if compression is Compression.XZ else lzma.FORMAT_ALONE
    return lzma.LZMADecompressor(form, memlimit=_XZ_MEMORY), lzma.LZMAError


def _by_library(packed: Packed, compression: Compression, piece: int, *, members: bool) -> Generator[bytes]:
    data = b""
    while True:
        decoder, damaged = _decoder(compression)
        while not decoder.eof:
            if decoder.needs_input and not data and not (data := packed.read(_INPUT)):
                raise BadStream(Fault.TRUNCATED)
            try:
                block = decoder.decompress(data, piece)
            except damaged as error:
                raise BadStream(Fault.DAMAGED, str(error)) from error
            data = b""
            yield block
        data = decoder.unused_data
        padding = b"\0" if members else b""
        while not (data := data.lstrip(padding)):
            if not (data := packed.read(_INPUT)):
                return
        if not members:
            raise BadStream(Fault.TRAILING)


# --- by libarchive ---


def _by_libarchive(read: Read, filter_name: str, piece: int) -> Generator[bytes]:
    for entry in entries(read, format_name="raw", filter_name=filter_name):
        yield from entry.blocks(piece)
    if read(1):
        raise BadStream(Fault.TRAILING)


class _Lz4Blocks:
    """Legacy lz4 on its way to libarchive, its blocks followed: a senseless size is the end of the data for libarchive.

    Blocks stand one behind the other, each behind its packed size (u32, little-endian).
    """

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._left = 4  # of the magic number, then of the block
        self._blocks = 0

    def read(self, most: int) -> bytes:
        """The next size or part of a block, at most `most` bytes; nothing at the end of the last block."""
        if not self._left:
            return self._next_size()
        data = self._packed.read(min(most, self._left))
        if not data:
            raise BadStream(Fault.TRUNCATED)
        self._left -= len(data)
        return data

    def _next_size(self) -> bytes:
        head = self._packed.read(4)
        if not head:
            return head
        size = int.from_bytes(head, "little")
        if len(head) < 4:
            raise BadStream(Fault.TRUNCATED)
        self._blocks += 1
        if not 0 < size <= _LZ4_PACKED or self._blocks > _LZ4_BLOCKS:
            raise BadStream(Fault.DAMAGED, f"a block of {size} bytes")
        self._left = size
        return head
