"""The compressed kernel inside a bzImage: where it lies, and what it must unpack to.

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

import struct
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from systemfiles.foundation import unpack
from systemfiles.foundation.archive import BadStream, Fault
from systemfiles.foundation.kernelfile import BZIMAGE, KernelFile
from systemfiles.foundation.unpack import Compression, Packed, unpacked

_COMPRESSIONS = (Compression.GZIP, Compression.XZ, Compression.ZSTD, Compression.LZ4)
_DEFAULT_SETUP_SECTORS = 4
_FIRST_VERSION_WITH_PAYLOAD = 0x0208


@dataclass(frozen=True, slots=True)
class Limits(unpack.Limits):
    """How far a compressed kernel may unpack: `max_size` bytes, and `max_ratio` times its compressed size.

    Distribution kernels unpack to 30-110 MiB, three to seven times their compressed size.
    """

    max_size: int = 512 << 20
    max_ratio: int = 64


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Payload:
    """One compressed stream in a file. `size` is what it must unpack to; None where nothing says it beforehand."""

    words: str
    compression: Compression
    offset: int
    length: int
    size: int | None


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
    compression = Compression.of(magic)
    if compression is None:
        found = f"it begins with {magic.hex(' ') or 'nothing'}"
        file.refuse(f"{BZIMAGE} whose payload is of an unknown kind ({found})")
    if compression not in _COMPRESSIONS:
        file.refuse(f"{BZIMAGE} whose payload is {compression.value}")
    (size,) = struct.unpack("<I", file.read(setup + offset + length - 4, 4))
    stream = length if compression is Compression.GZIP else length - 4
    return Payload(f"{BZIMAGE} ({compression.value})", compression, setup + offset, stream, size)


def unpack_payload(file: KernelFile, payload: Payload, destination: BinaryIO, limits: Limits) -> None:
    """Write what `payload` holds to `destination`, in blocks of at most 1 MiB.

    Raises InvalidKernel when it is damaged, is not of the declared size, is followed by other data, or exceeds
    `limits` (before more than that is written); ToolMissing; OSError.
    """
    if payload.size and payload.size > limits.max_size:
        _refuse(file, payload, limits, BadStream(Fault.SIZE))
    if payload.size and payload.size > limits.max_ratio * payload.length:
        _refuse(file, payload, limits, BadStream(Fault.RATIO))
    file.stream.seek(payload.offset)
    packed = Packed(file.stream, length=payload.length)
    written = 0
    try:
        with closing(unpacked(packed, payload.compression, limits)) as blocks:
            for block in blocks:
                written += len(block)
                if payload.size is not None and written > payload.size:
                    break
                destination.write(block)
    except BadStream as error:
        _refuse(file, payload, limits, error)
    if payload.size is not None and written != payload.size:
        got = f"at least {written}" if written > payload.size else written
        file.refuse(f"{payload.words} that should unpack to {payload.size} bytes and unpacks to {got}")


def _refuse(file: KernelFile, payload: Payload, limits: Limits, error: BadStream) -> NoReturn:
    if error.fault is Fault.SIZE:
        file.refuse(f"{payload.words} that unpacks to more than the limit of {limits.max_size} bytes")
    if error.fault is Fault.RATIO:
        file.refuse(f"{payload.words} that unpacks to more than the limit of {limits.max_ratio} times its size")
    file.refuse(f"{payload.words} whose compressed data is damaged ({error})")
