"""Little that becomes a lot when it is unpacked, or that wants a lot of memory for it."""

from __future__ import annotations

import lzma
import struct
import zlib

ZEROS = 20 << 20


def gzip_bomb(size: int = ZEROS) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    return pack.compress(bytes(size)) + pack.flush()


def zstd_bomb(size: int = ZEROS) -> bytes:
    """A frame of blocks that say "so many times this byte" (RFC 8878, 3.1.1.2.2)."""
    count = size >> 17
    blocks = [(((1 << 17) << 3 | 1 << 1 | (n == count - 1)).to_bytes(3, "little") + b"\0") for n in range(count)]
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(blocks)


def lz4_bomb(size: int = ZEROS) -> bytes:
    """Legacy blocks of one byte and a copy of it, 8 MiB long (LZ4 block format)."""
    full, rest = divmod((8 << 20) - 1 - 5 - 19, 255)
    block = b"\x1f\0\x01\0" + b"\xff" * full + bytes([rest]) + b"\x50" + bytes(5)
    return b"\x02\x21\x4c\x18" + (struct.pack("<I", len(block)) + block) * (size // (8 << 20) + 1)


def xz_of_4_gib(data: bytes) -> bytes:
    """A stream that wants a dictionary of 4 GiB (The .xz File Format, 3.1 and 5.3.1)."""
    stream = bytearray(lzma.compress(data, preset=0))
    header = stream[12 : 12 + (stream[12] + 1) * 4]
    assert header[2:4] == b"\x21\x01"  # LZMA2 and the length of its properties
    header[4] = 40
    header[-4:] = struct.pack("<I", zlib.crc32(header[:-4]))
    stream[12 : 12 + len(header)] = header
    return bytes(stream)
