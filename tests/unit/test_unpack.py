"""Decompression: every format, piece by piece, within limits, and whatever is wrong with it told apart."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systemfiles.foundation.archive import BadStream, Fault, entries
from systemfiles.foundation.unpack import Compression, Limits, Packed, unpacked

MIB = 1 << 20
PLAIN = random.Random(3).randbytes(100_000) + bytes(100_000)
ALL = frozenset(Compression)


def zstd(data: bytes, *, repeat: int = 0) -> bytes:
    """A frame of raw blocks, then `repeat` blocks of 128 KiB of zeros each (RFC 8878, section 3.1.1.2)."""
    blocks = [(0, len(data[i : i + 65536]), data[i : i + 65536]) for i in range(0, len(data), 65536)]
    blocks += [(1, 1 << 17, b"\0")] * repeat
    frame = b"\x28\xb5\x2f\xfd\x00\x58"
    for number, (kind, size, content) in enumerate(blocks, 1):
        frame += (size << 3 | kind << 1 | (number == len(blocks))).to_bytes(3, "little") + content
    return frame


def lz4(data: bytes) -> bytes:
    """Legacy blocks of one sequence each, all literals (LZ4 Block Format)."""
    out = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 * MIB):
        literals = data[start : start + 8 * MIB]
        full, rest = divmod(len(literals) - 15, 255)
        block = b"\xf0" + b"\xff" * full + bytes([rest]) + literals
        out += struct.pack("<I", len(block)) + block
    return out


def xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=0)


def alone(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE, preset=0)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": xz,
    "zstd": zstd,
    "lz4": lz4,
    "bzip2": bz2.compress,
    "lzma": alone,
}
BY_LIBRARY = ["gzip", "xz", "bzip2", "lzma"]


def whole(
    data: bytes, *, limits: Limits | None = None, length: int | None = None, piece: int = MIB, members: bool = False
) -> bytes:
    packed = Packed(io.BytesIO(data), length=length)
    out = []
    for block in unpacked(packed, packed.told(ALL), limits or Limits(64 * MIB), piece=piece, members=members):
        assert 0 < len(block) <= piece
        out.append(block)
    return b"".join(out)


def fault(data: bytes, *, limits: Limits | None = None, length: int | None = None, members: bool = False) -> Fault:
    with pytest.raises(BadStream) as caught:
        whole(data, limits=limits, length=length, members=members)
    return caught.value.fault


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("piece", [1000, MIB])
def test_a_stream_is_told_by_its_first_bytes_and_unpacked_in_pieces(name: str, piece: int) -> None:
    packed = PACKERS[name](PLAIN)
    assert Compression.of(packed) is Compression(name)
    assert whole(packed, piece=piece) == PLAIN


@pytest.mark.parametrize("name", BY_LIBRARY)
def test_a_stream_of_nothing_unpacks_to_nothing(name: str) -> None:
    assert whole(PACKERS[name](b"")) == b""


@pytest.mark.parametrize("data", [b"", b"\x1f", b"\x28\xb5\x2f", b"plain", PLAIN])
def test_what_is_not_packed_is_passed_on_as_it_is(data: bytes) -> None:
    assert Compression.of(data) is None
    assert whole(data, piece=1000) == data


def test_a_format_that_the_caller_does_not_take_is_not_told() -> None:
    packed = Packed(io.BytesIO(lzma.compress(PLAIN)))
    assert packed.told([Compression.GZIP]) is None
    assert packed.told([Compression.XZ]) is Compression.XZ


@pytest.mark.parametrize("head", [b"\x04\x22\x4d\x18", b"\x89LZO\0\r\n\x1a\n"])
def test_a_format_known_by_name_only_is_refused(head: bytes) -> None:
    assert fault(head + bytes(100)) is Fault.DAMAGED


@pytest.mark.parametrize("name", PACKERS)
def test_bytes_behind_the_given_length_are_never_seen(name: str) -> None:
    stream = io.BytesIO(b"before" + (packed := PACKERS[name](PLAIN)) + b"behind")
    stream.seek(6)
    source = Packed(stream, length=len(packed))
    assert b"".join(unpacked(source, Compression(name), Limits(MIB))) == PLAIN
    assert source.size == len(packed)


@pytest.mark.parametrize("name", PACKERS)
def test_a_stream_that_is_cut_anywhere_is_truncated(name: str) -> None:
    packed = PACKERS[name](PLAIN[:300])
    for length in range(8, len(packed)):
        assert fault(packed, length=length) is Fault.TRUNCATED
        assert fault(packed[:length]) is Fault.TRUNCATED


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd", "bzip2", "lzma"])
@pytest.mark.parametrize("tail", [b"x", b"\0", b"other data", bytes(100_000)])
def test_other_data_behind_the_end_is_told_from_damage(name: str, tail: bytes) -> None:
    assert fault(PACKERS[name](PLAIN) + tail) is Fault.TRAILING


@pytest.mark.parametrize("tail", [b"x", b"\0\0\0\0", b"\xff\xff\xff\xff", b"other data", lz4(PLAIN)])
def test_what_is_no_block_of_lz4_is_refused_though_libarchive_would_stop_at_it(tail: bytes) -> None:
    assert fault(lz4(PLAIN) + tail) in (Fault.DAMAGED, Fault.TRUNCATED)


def test_blocks_of_lz4_without_number_are_refused_in_time() -> None:
    start = time.monotonic()
    assert fault(b"\x02\x21\x4c\x18" + b"\1\0\0\0\0" * 1_000_000) is Fault.DAMAGED
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", BY_LIBRARY)
def test_streams_follow_one_another_only_where_the_caller_says_so(name: str) -> None:
    pack = PACKERS[name]
    twice = pack(PLAIN) + pack(b"") + pack(b"second")
    assert whole(twice, members=True) == PLAIN + b"second"
    assert whole(twice + bytes(100_000), members=True) == PLAIN + b"second"
    assert fault(twice) is Fault.TRAILING
    assert fault(twice[:-3], members=True) is Fault.TRUNCATED
    assert fault(twice + b"junk" * 10, members=True) is Fault.DAMAGED


def test_frames_of_zstd_follow_one_another() -> None:
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"index"
    assert whole(zstd(PLAIN) + zstd(b"second") + skippable) == PLAIN + b"second"


def test_very_many_members_are_read_in_time() -> None:
    start = time.monotonic()
    assert whole(gzip.compress(b"", mtime=0) * 20_000 + gzip.compress(b"end"), members=True) == b"end"
    assert time.monotonic() - start < 5


def test_what_is_packed_twice_is_not_unpacked_twice() -> None:
    assert whole(gzip.compress(gzip.compress(PLAIN, mtime=0))) == gzip.compress(PLAIN, mtime=0)
    assert fault(zstd(zstd(PLAIN))) is Fault.DAMAGED


@pytest.mark.parametrize("name", ["gzip", "xz", "bzip2"])
def test_a_flipped_bit_is_damage(name: str) -> None:
    packed = bytearray(PACKERS[name](PLAIN))
    packed[len(packed) // 2] ^= 1
    assert fault(bytes(packed)) is Fault.DAMAGED


@pytest.mark.parametrize("name", PACKERS)
def test_no_byte_beyond_the_size_limit_is_given_out(name: str) -> None:
    packed = Packed(io.BytesIO(PACKERS[name](PLAIN)))
    assert whole(PACKERS[name](PLAIN), limits=Limits(len(PLAIN))) == PLAIN
    taken: list[int] = []
    with pytest.raises(BadStream) as caught:
        taken.extend(map(len, unpacked(packed, Compression(name), Limits(len(PLAIN) - 1), piece=1000)))
    assert caught.value.fault is Fault.SIZE
    assert len(PLAIN) - 1000 <= sum(taken) < len(PLAIN)


def bomb(name: str) -> bytes:
    return zstd(b"x", repeat=64) if name == "zstd" else PACKERS[name](bytes(8 * MIB))


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd", "bzip2", "lzma"])
@pytest.mark.parametrize("known", [True, False])
def test_a_bomb_is_refused_by_its_ratio_beyond_what_is_free(name: str, known: bool) -> None:
    packed = bomb(name)
    length = len(packed) if known else None
    assert fault(packed, length=length, limits=Limits(64 * MIB, 50)) is Fault.RATIO
    assert fault(packed, length=length, limits=Limits(64 * MIB, 50, 8 * MIB - 1)) is Fault.RATIO
    assert len(whole(packed, length=length, limits=Limits(64 * MIB, 50, 8 * MIB + 1))) >= 8 * MIB


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd", "lz4"])
def test_unpacking_needs_little_memory(name: str) -> None:
    packed = io.BytesIO(PACKERS[name](random.Random(4).randbytes(MIB // 16) * 256))
    whole(PACKERS[name](b"what is imported along the way stays in memory"))
    tracemalloc.start()
    try:
        for block in unpacked(Packed(packed), Compression(name), Limits(64 * MIB)):
            assert len(block) <= MIB
        assert tracemalloc.get_traced_memory()[1] < 7 * MIB
    finally:
        tracemalloc.stop()


def test_a_dictionary_of_gibibytes_is_refused() -> None:
    small = lzma.compress(PLAIN, check=lzma.CHECK_CRC32, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])
    header = small[12:16] + bytes([40]) + small[17:20]
    assert fault(small[:12] + header + struct.pack("<I", zlib.crc32(header)) + small[24:]) is Fault.DAMAGED
    assert fault(b"\x5d\x00\x00\x00\xff" + alone(PLAIN)[5:]) is Fault.DAMAGED
    assert fault(b"\x28\xb5\x2f\xfd\x00\xb0" + zstd(PLAIN)[6:]) is Fault.DAMAGED


class Broken(io.BytesIO):
    """A stream that fails after its first read."""

    failure: BaseException

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise self.failure
        return super().read(100_000)


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_what_reading_raises_comes_through_as_it_is(name: str, failure: BaseException) -> None:
    stream = Broken(PACKERS[name](PLAIN))
    stream.failure = failure
    with pytest.raises(type(failure)) as caught:
        list(unpacked(Packed(stream), Compression(name), Limits(MIB)))
    assert caught.value is failure


@pytest.mark.parametrize("name", PACKERS)
def test_one_may_stop_in_the_middle(name: str) -> None:
    stream = unpacked(Packed(io.BytesIO(PACKERS[name](PLAIN))), Compression(name), Limits(MIB), piece=1000)
    assert len(next(stream)) > 0
    stream.close()
    assert list(stream) == []


def test_an_archive_that_is_cut_says_so_when_its_content_is_read() -> None:
    header = b"a".ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"00000001000\0" + b"00000000000\0"
    header += b" " * 8 + b"0" + bytes(100) + b"ustar\x0000"
    header = header.ljust(512, b"\0")
    header = header[:148] + f"{sum(header):06o}\0 ".encode() + header[156:]
    stream = io.BytesIO(header + b"x" * 200)
    found = entries(stream.read, format_name="tar")
    entry = next(found)
    assert (entry.name, entry.size, entry.is_file) == ("a", 512, True)
    with pytest.raises(BadStream) as caught:
        list(entry.blocks())
    assert caught.value.fault is Fault.TRUNCATED


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(PACKERS)),
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=8)), max_size=4),
    st.binary(max_size=40),
    st.booleans(),
)
def test_arbitrary_damage_gives_bytes_within_limits_or_the_one_failure(
    name: str, damage: list[tuple[float, bytes]], tail: bytes, members: bool
) -> None:
    broken = bytearray(PACKERS[name](PLAIN[:2000]))
    for place, new in damage:
        start = int(place * len(broken))
        broken[start : start + len(new)] = new
    try:
        out = whole(bytes(broken) + tail, limits=Limits(50_000, 100, 1000), members=members)
    except BadStream:
        return
    assert len(out) <= 50_000
