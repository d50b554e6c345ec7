"""The compressed kernel inside a bzImage, and how a compressed kernel is unpacked without being trusted.

Format: Linux, Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header". What is used of it (little-endian)::

    0x1f1  u8   setup_sects      512-byte sectors of set-up code after the boot sector; 0 means 4
    0x1f4  u32  syssize          length of everything after the set-up code, in 16-byte units
    0x1fe  u16  0xAA55
    0x202  4s   "HdrS"
    0x206  u16  version          0x0208 is the first that has the two fields below
    0x248  u32  payload_offset   from the end of the set-up code
    0x24c  u32  payload_length

The payload is one compressed stream and then its unpacked size (u32), which the kernel's build appends; gzip's own
trailer ends with that very number, so there nothing is appended (scripts/Makefile.lib, "size_append").
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from systemfiles.foundation.errors import InvalidKernel, ToolMissing

if TYPE_CHECKING:
    from ctypes import Array, c_char

CHUNK = 1 << 20
BZIMAGE = "an x86 bzImage"
HEAD = 4096  # every header read here, and every magic number, lies in the first page

_MIB = 1 << 20
_DICTIONARY = 128 * _MIB  # what the kernel's own build asks of xz and of `zstd -22 --ultra` at the most
_LZ4_BLOCKS = 4096  # of 8 MiB each when unpacked
_DEFAULT_SETUP_SECTORS = 4
_FIRST_VERSION_WITH_PAYLOAD = 0x0208

_COMPRESSIONS = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x02\x21\x4c\x18", "lz4"),  # the legacy format, the only one that kernels are packed with
    (b"\x04\x22\x4d\x18", "lz4 frame"),
    (b"BZh", "bzip2"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\x89LZO\x00\r\n\x1a\n", "lzo"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a compressed kernel may unpack: `max_size` bytes, and `max_ratio` times its compressed size.

    Distribution kernels unpack to 30-110 MiB, three to seven times their compressed size.
    """

    max_size: int = 512 * _MIB
    max_ratio: int = 64


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class KernelFile:
    """An open file that may be a kernel. `expected` says in words what the caller takes, for refusals."""

    path: Path
    stream: BinaryIO
    size: int
    head: bytes
    expected: str

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes at `offset`; fewer where the file ends."""
        if offset >= self.size:
            return b""
        self.stream.seek(offset)
        return self.stream.read(min(length, self.size - offset))

    def require_size(self, what: str, needed: int) -> None:
        if self.size < needed:
            self.refuse(f"{what}, but truncated: it is {self.size} bytes long and describes {needed}")

    def refuse(self, found: str) -> NoReturn:
        raise InvalidKernel(self.path, expected=self.expected, found=found) from None


@contextmanager
def opened(path: Path, *, expected: str) -> Iterator[KernelFile]:
    """Open `path`, which must be a regular file. Raises InvalidKernel for any other kind, OSError."""
    mode = path.stat().st_mode  # looked at first: opening a pipe would wait for its writer
    if not stat.S_ISREG(mode):
        found = "a directory" if stat.S_ISDIR(mode) else "a device, a socket or a pipe"
        raise InvalidKernel(path, expected=expected, found=found)
    with path.open("rb") as stream:
        head = stream.read(HEAD)
        yield KernelFile(path, stream, stream.seek(0, io.SEEK_END), head, expected)


@dataclass(frozen=True, slots=True)
class Payload:
    """One compressed stream in a file. `size` is what it must unpack to; None where nothing says it beforehand."""

    words: str
    compression: str
    offset: int
    length: int
    size: int | None


def is_bzimage(head: bytes) -> bool:
    """Whether a file that begins with `head` has the boot sector and the signature of an x86 Linux kernel."""
    return head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"


def compression_of(head: bytes) -> str | None:
    """The name of the compression whose magic number `head` begins with."""
    return next((name for magic, name in _COMPRESSIONS if head.startswith(magic)), None)


def find_payload(file: KernelFile) -> Payload:
    """Where the compressed kernel of a bzImage lies. Raises InvalidKernel when it is cut off or of an unknown kind."""
    if len(file.head) < 0x250:
        file.refuse(f"{BZIMAGE}, but truncated within its header")
    (version,) = struct.unpack_from("<H", file.head, 0x206)
    if version < _FIRST_VERSION_WITH_PAYLOAD:
        file.refuse(
            f"{BZIMAGE} of boot protocol {version >> 8}.{version & 0xFF:02}, which does not say where its payload is"
        )
    setup = ((file.head[0x1F1] or _DEFAULT_SETUP_SECTORS) + 1) * 512
    (system_units,) = struct.unpack_from("<I", file.head, 0x1F4)
    offset, length = struct.unpack_from("<II", file.head, 0x248)
    file.require_size(BZIMAGE, max(setup + offset + length, setup + 16 * system_units - 15))
    magic = file.read(setup + offset, min(length, 16))
    compression = compression_of(magic)
    if compression is None or compression not in _DECODERS:
        what = compression or f"of an unknown kind (it begins with {magic.hex(' ') or 'nothing'})"
        file.refuse(f"{BZIMAGE} whose payload is {what}")
    (size,) = struct.unpack("<I", file.read(setup + offset + length - 4, 4))
    stream = length if compression == "gzip" else length - 4
    return Payload(f"{BZIMAGE} ({compression})", compression, setup + offset, stream, size)


def unpack(file: KernelFile, payload: Payload, destination: BinaryIO, limits: Limits) -> None:
    """Write what `payload` holds to `destination`, in blocks of at most 1 MiB.

    Raises InvalidKernel when it is damaged, is not of the declared size, is followed by other data, or exceeds
    `limits` (before more than that is written); ToolMissing; OSError.
    """
    allowed = min(limits.max_size, limits.max_ratio * payload.length)
    _require_allowed(file, payload, limits, payload.size or 0)
    written = 0
    decode = _DECODERS[payload.compression]
    with closing(decode(_Window(file, payload))) as blocks:
        for block in blocks:
            written += len(block)
            if written > allowed:
                _require_allowed(file, payload, limits, written)
            if payload.size is not None and written > payload.size:
                break
            destination.write(block)
    if payload.size is not None and written != payload.size:
        got = f"at least {written}" if written > payload.size else written
        file.refuse(f"{payload.words} that should unpack to {payload.size} bytes and unpacks to {got}")


def _require_allowed(file: KernelFile, payload: Payload, limits: Limits, size: int) -> None:
    if size > limits.max_size:
        file.refuse(f"{payload.words} that unpacks to more than the limit of {limits.max_size} bytes")
    if size > limits.max_ratio * payload.length:
        file.refuse(f"{payload.words} that unpacks to more than the limit of {limits.max_ratio} times its size")


class _Window:
    """The compressed bytes of a payload and no others: a decoder must not see what lies behind them."""

    def __init__(self, file: KernelFile, payload: Payload) -> None:
        self._file = file
        self._payload = payload
        self._position = 0
        self._failure: OSError | None = None

    @property
    def left(self) -> int:
        return self._payload.length - self._position

    def at(self, position: int, length: int) -> bytes:
        return self._file.read(self._payload.offset + position, min(length, self._payload.length - position))

    def read(self, length: int) -> bytes:
        data = self.at(self._position, length)
        self._position += len(data)
        return data

    def readinto(self, buffer: Array[c_char]) -> int:
        """What libarchive calls. An exception would not get through its C code, so it is kept for later."""
        from ctypes import memmove

        try:
            data = self.read(len(buffer))
        except OSError as error:
            self._failure = error
            return 0
        memmove(buffer, data, len(data))  # assigning to a slice of the array goes element by element
        return len(data)

    def raise_failure(self) -> None:
        if self._failure:
            raise self._failure

    def seekable(self) -> bool:
        return False

    def refuse(self, problem: str) -> NoReturn:
        self._file.refuse(f"{self._payload.words} whose compressed data is damaged ({problem})")


_CUT_OFF = "it ends too early"
_FOLLOWED = "its stream ends and other data follows"


def _gzip(window: _Window) -> Generator[bytes]:
    decoder = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    while not decoder.eof:
        data = decoder.unconsumed_tail or window.read(CHUNK)
        if not data:
            window.refuse(_CUT_OFF)
        try:
            block = decoder.decompress(data, CHUNK)
        except zlib.error as error:
            window.refuse(str(error))
        yield block
    if decoder.unused_data or window.left:
        window.refuse(_FOLLOWED)


def _xz(window: _Window) -> Generator[bytes]:
    import lzma  # here for start-up: few kernels are packed with it

    # A decoder needs a little more than its dictionary; liblzma refuses a stream that declares a larger one.
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DICTIONARY + 8 * _MIB)
    while not decoder.eof:
        data = window.read(CHUNK) if decoder.needs_input else b""
        if decoder.needs_input and not data:
            window.refuse(_CUT_OFF)
        try:
            block = decoder.decompress(data, CHUNK)
        except lzma.LZMAError as error:
            window.refuse(str(error))
        yield block
    if decoder.unused_data or window.left:
        window.refuse(_FOLLOWED)


def _lz4(window: _Window) -> Generator[bytes]:
    # Blocks follow one another, each behind its size (u32). Where a size is nonsense, libarchive takes it for the end.
    position = 4
    for _ in range(_LZ4_BLOCKS):
        if window.left <= position:
            break
        position += 4 + int.from_bytes(window.at(position, 4), "little")
    if position != window.left:
        window.refuse("its blocks do not end where it ends")
    return _libarchive(window, "lz4")


def _zstd(window: _Window) -> Generator[bytes]:
    return _libarchive(window, "zstd")


def _libarchive(window: _Window, name: str) -> Generator[bytes]:
    # Its memory is bounded without our help: 8 MiB for a block of legacy lz4, a window of 128 MiB for zstd.
    try:
        import libarchive  # 30-50 ms, and most kernels need no unpacking
    except (AttributeError, OSError):  # what loading an absent libarchive.so ends with
        tool = "libarchive"
        raise ToolMissing(tool, hint="apt-get install libarchive13, or: doit setup") from None
    try:
        with libarchive.stream_reader(window, format_name="raw", filter_name=name, block_size=CHUNK) as archive:
            for entry in archive:
                yield from entry.get_blocks(CHUNK)
    except libarchive.ArchiveError as error:
        window.raise_failure()
        window.refuse(str(error.msg))
    window.raise_failure()


_DECODERS: dict[str, Callable[[_Window], Generator[bytes]]] = {
    "gzip": _gzip,
    "xz": _xz,
    "lz4": _lz4,
    "zstd": _zstd,
}
