"""Kernel formats. Every kernel here is synthetic: the smallest bytes that a VMM would take, built from the specs."""

from __future__ import annotations

import gzip
import io
import itertools
import lzma
import os
import random
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.bzimage import Limits
from systemfiles.foundation.errors import InvalidKernel
from systemfiles.foundation.kernelfile import describe
from systemfiles.foundation.kernelimage import KernelImage, bootable_form, check_kernel

X86 = Arch.X86_64
ARM = Arch.AARCH64
CODE = random.Random(1).randbytes(9000)  # of no structure, so that no compressor meets the ratio limit by accident
BASE = 0x100_0000
EXECUTABLE, OBJECT, CORE = 2, 1, 4
LOAD, NOTE = 1, 4


def note(owner: bytes = b"Xen\0", kind: int = 18, value: bytes = struct.pack("<Q", BASE + 0x10)) -> bytes:
    padded = value + b"\0" * (-len(value) % 4)
    return struct.pack("<III", len(owner), len(value), kind) + owner + padded


PVH = note(b"Linux\0\0\0", 0x100, b"\1\0\0\0") + note()


def vmlinux(
    *, notes: bytes = PVH, machine: int = 62, kind: int = EXECUTABLE, segment: int = LOAD, code: bytes = CODE
) -> bytes:
    """ELF header, two program headers, code (loaded at BASE), notes, two empty section headers."""
    start = 64 + 2 * 56
    end = start + len(code)
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    sections = end + len(notes)
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, kind, machine, 1, BASE, 64, sections, 0, 64, 56, 2, 64, 2, 0)
    load = struct.pack("<IIQQQQQQ", segment, 5, start, BASE, BASE, len(code), len(code) + 4096, 4096)
    extra = struct.pack("<IIQQQQQQ", NOTE, 4, end, 0, 0, len(notes), len(notes), 4)
    return header + load + extra + code + notes + bytes(2 * 64)


def patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    buffer = bytearray(data)
    for offset, new in changes:
        buffer[offset : offset + len(new)] = new
    return bytes(buffer)


def lz4_legacy(data: bytes) -> bytes:
    """Blocks of one sequence each, which is all literals (LZ4 block format; lz4 -l)."""
    out = [struct.pack("<I", 0x184C2102)]
    for start in range(0, len(data), 8 << 20):
        literals = data[start : start + (8 << 20)]
        full, rest = divmod(len(literals) - 15, 255)
        block = b"\xf0" + b"\xff" * full + bytes([rest]) + literals
        out.append(struct.pack("<I", len(block)) + block)
    return b"".join(out)


def zstd(data: bytes, *, window: int = 0x50) -> bytes:
    """One frame of raw blocks, no content size, no checksum (RFC 8878, section 3.1). `window` 0x50 is 1 MiB."""
    chunks = [data[i : i + 65536] for i in range(0, len(data), 65536)]
    blocks = [
        struct.pack("<I", (index == len(chunks) - 1) | len(chunk) << 3)[:3] + chunk
        for index, chunk in enumerate(chunks)
    ]
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window]) + b"".join(blocks)


def xz(data: bytes) -> bytes:
    """As scripts/xz_wrap.sh packs a kernel."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters)


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gzip": gz, "xz": xz, "lz4": lz4_legacy, "zstd": zstd}


def bzimage(stream: bytes, *, size: int | None, version: int = 0x20F, sectors: int = 4, cut: int = 0) -> bytes:
    """Set-up code, a stub, the payload (with its unpacked `size` appended unless None), code behind it."""
    payload = stream if size is None else stream + struct.pack("<I", size)
    stub = b"\x90" * 0x2CC
    system = stub + payload + b"startup"
    system += b"\0" * (-len(system) % 16)
    setup = patched(
        bytes((sectors + 1) * 512),
        (0x1F1, bytes([0 if sectors == 4 else sectors])),
        (0x1F4, struct.pack("<I", len(system) // 16)),
        (0x1FE, b"\x55\xaaXXHdrS" + struct.pack("<H", version)),
        (0x248, struct.pack("<II", len(stub), len(payload))),
    )
    return (setup + system)[: -cut or None]


def packed(name: str, data: bytes, *, version: int = 0x20F, sectors: int = 4, cut: int = 0) -> bytes:
    size = None if name == "gzip" else len(data)
    return bzimage(COMPRESSORS[name](data), size=size, version=version, sectors=sectors, cut=cut)


def image(*, efi: bool = True, code: bytes = CODE, flags: int = 0b1010, bss: int = 4096, certificate: int = 0) -> bytes:
    """An arm64 Image: as an EFI program with two sections and perhaps a signature, or plain with a branch."""
    size = 0x200 + len(code)
    branch = 0x14000000 | (size - 8 - 4) // 4
    head = struct.pack(
        "<IIQQQQQQ4sI",
        0xFA405A4D if efi else branch,
        0,
        0,
        size + certificate + bss,
        flags,
        0,
        0,
        0,
        b"ARM\x64",
        0x40 if efi else 0,
    )
    directories = struct.pack("<II", size if certificate else 0, certificate).rjust(5 * 8, b"\0")
    optional = struct.pack("<H106xI", 0x20B, 5) + directories
    portable = b"PE\0\0" + struct.pack("<HHIIIHH", 0xAA64, 2, 0, 0, 0, len(optional), 0x206) + optional
    for name, start, length in ((b".text", 0x200, 4096), (b".data", 0x1200, len(code) - 4096)):
        portable += struct.pack("<8sIIII16x", name, length, start, length, start)
    return (head + portable * efi).ljust(0x200, b"\0") + code + b"\x30" * certificate


SOURCES: dict[str, tuple[Arch, bytes]] = {
    "vmlinux": (X86, vmlinux()),
    **{f"bzImage ({name})": (X86, packed(name, vmlinux())) for name in COMPRESSORS},
    "Image": (ARM, image()),
    "Image.gz": (ARM, gz(image())),
}


def taken(tmp_path: Path, data: bytes, arch: Arch, limits: Limits | None = None) -> tuple[bytes, KernelImage]:
    source = tmp_path / "source"
    source.write_bytes(data)
    path, kernel = bootable_form(source, tmp_path / "scratch", arch, limits=limits or Limits())
    return path.read_bytes(), kernel


def refused(tmp_path: Path, data: bytes, arch: Arch, limits: Limits | None = None) -> InvalidKernel:
    with pytest.raises(InvalidKernel) as caught:
        taken(tmp_path, data, arch, limits)
    assert not (tmp_path / "scratch").exists()
    assert caught.value.subject == tmp_path / "source"
    return caught.value


# --- what is taken ---


def test_a_vmlinux_is_its_own_bootable_form(tmp_path: Path) -> None:
    source = tmp_path / "vmlinux"
    source.write_bytes(vmlinux())
    path, kernel = bootable_form(source, tmp_path / "scratch", X86)
    assert path == source
    assert kernel == KernelImage(X86, "vmlinux", len(vmlinux()), (("pvh_entry", "0x1000010"),))
    assert check_kernel(source, X86) == kernel
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_vmlinux_is_taken_out_of_a_bzimage(tmp_path: Path, name: str) -> None:
    data, kernel = taken(tmp_path, packed(name, vmlinux()), X86)
    assert data == vmlinux()
    assert kernel == KernelImage(X86, f"bzImage ({name})", len(vmlinux()), (("pvh_entry", "0x1000010"),))


@pytest.mark.parametrize("sectors", [4, 1, 39])
def test_the_payload_is_found_behind_any_number_of_setup_sectors(tmp_path: Path, sectors: int) -> None:
    assert taken(tmp_path, packed("lz4", vmlinux(), sectors=sectors), X86)[0] == vmlinux()


def test_a_pvh_entry_of_four_bytes_is_read(tmp_path: Path) -> None:
    _, kernel = taken(tmp_path, vmlinux(notes=note(value=struct.pack("<I", BASE))), X86)
    assert dict(kernel.facts) == {"pvh_entry": "0x1000000"}


@pytest.mark.parametrize("certificate", [0, 1472])
def test_an_image_is_its_own_bootable_form_signed_or_not(tmp_path: Path, certificate: int) -> None:
    source = tmp_path / "Image"
    source.write_bytes(image(certificate=certificate))
    path, kernel = bootable_form(source, tmp_path / "scratch", ARM)
    assert path == source
    assert (kernel.arch, kernel.format, kernel.size) == (ARM, "Image", source.stat().st_size)
    assert dict(kernel.facts) == {"image_size": source.stat().st_size + 4096, "text_offset": 0, "page_size": "4K"}


def test_an_image_that_is_no_efi_program_is_taken(tmp_path: Path) -> None:
    assert taken(tmp_path, image(efi=False), ARM)[1].format == "Image"


def test_a_gzipped_image_is_unpacked(tmp_path: Path) -> None:
    data, kernel = taken(tmp_path, gz(image()), ARM)
    assert data == image()
    assert (kernel.format, kernel.size) == ("Image.gz", len(image()))


def test_a_packed_kernel_is_not_bootable_as_it_is(tmp_path: Path) -> None:
    for arch, data in ((X86, packed("gzip", vmlinux())), (ARM, gz(image()))):
        path = tmp_path / arch.value
        path.write_bytes(data)
        with pytest.raises(InvalidKernel, match=r"so +it was refused"):
            check_kernel(path, arch)


@pytest.mark.parametrize("name", ["gzip", "lz4"])
def test_unpacking_needs_little_memory(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(packed(name, vmlinux(code=random.Random(2).randbytes(24 << 20))))
    bootable_form(source, tmp_path / "imports", X86)  # what is imported along the way stays in memory
    tracemalloc.start()
    try:
        bootable_form(source, tmp_path / "scratch", X86)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# --- what is refused ---


def tar_archive() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("vmlinux"))
    return buffer.getvalue()


def huge_xz() -> bytes:
    """An .xz whose only filter asks for a dictionary of 4 GiB - 1 (xz file format, sections 3.1 and 5.3.1)."""
    small = lzma.compress(vmlinux(), check=lzma.CHECK_CRC32, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}])
    header = patched(small[12:20], (4, bytes([40])))
    return small[:12] + header + struct.pack("<I", zlib.crc32(header)) + small[24:]


TEXT = struct.pack("<I", 3)
EFI = b"MZ\0\0"
GOOD = packed("lz4", vmlinux())
SIZE = len(vmlinux())
REFUSALS: list[tuple[str, Arch, bytes, str]] = [
    ("nothing", X86, b"", "an empty file"),
    ("a page", X86, b"\xef\xbb\xbf\n<!DOCTYPE html><title>Sign in", "an HTML page (a proxy's or a login page?)"),
    ("a page in capitals", ARM, b"<HTML><body>502", "an HTML page (a proxy's or a login page?)"),
    ("a script", X86, b"#!/bin/sh\necho no\n", "a script (#!/bin/sh)"),
    ("a text", ARM, b"404: Not Found\n", "text that begins with '404: Not Found'"),
    ("a Git LFS pointer", X86, b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ("a package", X86, b"!<arch>\ndebian-binary   1410122664", "a Debian package (.deb)"),
    ("an RPM", X86, b"\xed\xab\xee\xdb\3\0", "an RPM package"),
    ("a zip", X86, b"PK\3\4" + bytes(60), "a zip archive"),
    ("a tar", X86, tar_archive(), "a tar archive"),
    ("an initrd", X86, b"070701" + b"0" * 104, "a cpio archive (an initrd?)"),
    ("a disk", X86, b"QFI\xfb\0\0\0\3", "a qcow2 disk image"),
    ("noise", X86, b"\x01\x02\x03\xff", "data that begins with 01 02 03 ff"),
    ("zeros", ARM, bytes(4096), "data that begins with 00 00"),
    ("a device tree", ARM, b"\xd0\x0d\xfe\xed" + bytes(60), "a device tree or a U-Boot FIT image"),
    ("a gzip on x86_64", X86, gz(vmlinux()), "data compressed as gzip"),
    ("an xz on aarch64", ARM, xz(image()), "data compressed as xz"),
    # the other architecture
    ("an x86 ELF on aarch64", ARM, vmlinux(), "an ELF for x86_64"),
    ("an x86 bzImage on aarch64", ARM, GOOD, "an x86 bzImage"),
    ("an arm64 Image on x86_64", X86, image(), "an arm64 Image"),
    ("an arm64 ELF on x86_64", X86, vmlinux(machine=183), "an ELF for aarch64"),
    ("an arm64 ELF on aarch64", ARM, vmlinux(machine=183), "an ELF for aarch64"),
    ("an ELF for something else", X86, vmlinux(machine=0xBEEF), "an ELF for machine 48879"),
    ("a riscv Image", ARM, patched(image(efi=False), (0x38, b"RSC\5")), "a riscv Image"),
    ("a 32-bit zImage", ARM, patched(bytes(64), (0x24, b"\x18\x28\x6f\x01")), "a zImage for 32-bit arm"),
    # ELF
    ("an i386 ELF", X86, patched(vmlinux(machine=3), (4, b"\1")), "a 32-bit ELF for i386"),
    ("a big-endian ELF", X86, patched(vmlinux(), (5, b"\2")), "a big-endian ELF"),
    ("a module", X86, vmlinux(kind=OBJECT), "an ELF for x86_64 that is an object file (a module?)"),
    ("a core dump", X86, vmlinux(kind=CORE), "an ELF for x86_64 that is no executable"),
    ("half an ELF header", X86, vmlinux()[:40], "an ELF, but truncated within its header"),
    ("half a vmlinux", X86, vmlinux()[:4000], "an ELF for x86_64, but truncated: it is 4000 bytes long"),
    ("a vmlinux without its end", X86, vmlinux()[:-1], f"but truncated: it is {SIZE - 1} bytes long"),
    ("a segment behind the end", X86, patched(vmlinux(), (64 + 8, b"\xff" * 8)), "an ELF for x86_64, but truncated"),
    ("a crowd of segments", X86, patched(vmlinux(), (56, b"\xfe\xff")), "an ELF for x86_64 with 65534 program headers"),
    ("odd program headers", X86, patched(vmlinux(), (54, b"\x20\0")), "whose program headers have 32 bytes each"),
    (
        "a segment that shrinks",
        X86,
        patched(vmlinux(), (64 + 40, bytes(8))),
        "with a segment of 9000 bytes for 0 bytes",
    ),
    ("no segment", X86, vmlinux(segment=6), "an ELF for x86_64 without a loadable segment"),
    ("no note", X86, vmlinux(notes=b""), "an ELF for x86_64 without a PVH entry note"),
    ("another Xen note", X86, vmlinux(notes=note(kind=6)), "an ELF for x86_64 without a PVH entry note"),
    ("another owner", X86, vmlinux(notes=note(b"GNU\0")), "an ELF for x86_64 without a PVH entry note"),
    ("a note in no segment", X86, patched(vmlinux(), (64 + 56, TEXT)), "an ELF for x86_64 without a PVH entry note"),
    ("an entry of six bytes", X86, vmlinux(notes=note(value=b"abcdef")), "whose PVH entry note has 6 bytes"),
    ("an entry elsewhere", X86, vmlinux(notes=note(value=bytes(8))), "whose PVH entry 0x0 lies outside what it loads"),
    ("a note without an end", X86, vmlinux(notes=note(b"X" * 4)), "with damaged notes"),
    ("endless notes", X86, vmlinux(notes=bytes(70_000)), "with more than 65536 bytes of notes"),
    # bzImage
    ("an old bzImage", X86, packed("gzip", vmlinux(), version=0x207), "an x86 bzImage of boot protocol 2.07"),
    ("half a bzImage header", X86, GOOD[:0x210], "an x86 bzImage, but truncated within its header"),
    ("half a bzImage", X86, GOOD[:6000], "an x86 bzImage, but truncated: it is 6000 bytes long"),
    ("a bzImage without its end", X86, packed("lz4", vmlinux(), cut=16), "an x86 bzImage, but truncated"),
    ("a payload of nothing", X86, bzimage(b"", size=None), "payload is of an unknown kind (it begins with nothing)"),
    ("a payload of four bytes", X86, bzimage(b"\x02\x21\x4c\x18", size=None), "unpacks to more than the limit"),
    ("an unknown payload", X86, bzimage(b"\1\2\3\4", size=9), "payload is of an unknown kind (it begins with 01 02"),
    ("a bzip2 payload", X86, bzimage(b"BZh91AY&SY", size=9), "an x86 bzImage whose payload is bzip2"),
    ("an lzma payload", X86, bzimage(b"\x5d\0\0\x80\0", size=9), "an x86 bzImage whose payload is lzma"),
    ("an lzo payload", X86, bzimage(b"\x89LZO\0\r\n\x1a\n", size=9), "an x86 bzImage whose payload is lzo"),
    ("an lz4 frame", X86, bzimage(b"\x04\x22\x4d\x18\x64", size=9), "an x86 bzImage whose payload is lz4 frame"),
    ("a kernel without PVH inside", X86, packed("zstd", vmlinux(notes=b"")), "holds an ELF for x86_64 without a PVH"),
    ("a foreign kernel inside", X86, packed("lz4", vmlinux(machine=183)), "(lz4) that holds an ELF for aarch64"),
    ("a half kernel inside", X86, packed("xz", vmlinux()[:5000]), "(xz) that holds an ELF for x86_64, but truncated"),
    ("a page inside", X86, packed("gzip", b"<html>"), "(gzip) that holds an HTML page"),
    ("a larger size declared", X86, bzimage(zstd(vmlinux()), size=SIZE + 1), f"should unpack to {SIZE + 1} bytes and"),
    (
        "a smaller size declared",
        X86,
        bzimage(lz4_legacy(vmlinux()), size=64),
        "should unpack to 64 bytes and unpacks to",
    ),
    ("an xz for 4 GiB of memory", X86, bzimage(huge_xz(), size=SIZE), "(xz) whose compressed data is damaged (Memory"),
    (
        "a zstd for 4 GiB of memory",
        X86,
        bzimage(zstd(vmlinux(), window=0xB0), size=SIZE),
        "(zstd) whose compressed data",
    ),
    # Image
    ("an Image's magic only", ARM, image()[:60], "an arm64 Image, but truncated"),
    ("half an Image", ARM, image()[:5000], "an arm64 Image, but truncated: it is 5000 bytes long"),
    ("an Image without its end", ARM, image()[:-1], f"an arm64 Image, but truncated: it is {len(image()) - 1} bytes"),
    ("half a signature", ARM, image(certificate=64)[:-8], "an arm64 Image, but truncated"),
    ("half a plain Image", ARM, image(efi=False)[:5000], "an arm64 Image, but truncated: it is 5000 bytes long"),
    ("an Image with a tail", ARM, image() + bytes(5000), "more than the 13608 its header allows"),
    ("a big-endian Image", ARM, image(flags=0b1011), "a big-endian arm64 Image"),
    ("an ancient Image", ARM, patched(image(), (0x10, bytes(8))), "an arm64 Image without image_size"),
    ("an Image without PE header", ARM, patched(image(), (0x40, b"NE")), "an arm64 Image whose PE header is missing"),
    (
        "an Image with PE nowhere",
        ARM,
        patched(image(), (0x3C, b"\xff" * 4)),
        "an arm64 Image whose PE header is missing",
    ),
    ("an Image for another EFI", ARM, patched(image(), (0x44, b"\x64\x86")), "whose PE header is for machine 0x8664"),
    ("an EFI zboot image", ARM, EFI + b"zimg" + bytes(16) + b"zstd22\0\0", "an EFI zboot image (zstd22)"),
    ("a nameless zboot image", ARM, EFI + b"zimg" + bytes(80), "an EFI zboot image (of an unknown compression)"),
    ("an EFI program", X86, EFI + bytes(200), "an EFI or Windows program"),
    ("half a gzip", ARM, gz(image())[:4000], "a gzip stream whose compressed data is damaged (it ends too early)"),
    ("a gzip with a tail", ARM, gz(image()) + b"x", "(its stream ends and other data follows)"),
    ("a gzip of an ELF", ARM, gz(vmlinux()), "a gzip stream that holds an ELF for x86_64"),
    ("a gzip of a gzip", ARM, gz(gz(image())), "a gzip stream that holds data compressed as gzip"),
    ("a gzip of nothing", ARM, gz(b""), "a gzip stream that holds an empty file"),
]


@pytest.mark.parametrize(("arch", "data", "found"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_refused_is(tmp_path: Path, arch: Arch, data: bytes, found: str) -> None:
    error = refused(tmp_path, data, arch)
    assert found in error.found
    assert arch.value in error.expected


def test_bytes_that_no_header_describes_may_follow_a_vmlinux(tmp_path: Path) -> None:
    """The kernel's build appends relocations for the bzImage's own start-up code; a VMM does not load them."""
    assert taken(tmp_path, vmlinux() + bytes(512), X86)[1].size == len(vmlinux()) + 512


@pytest.mark.parametrize("name", SOURCES)
def test_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    arch, data = SOURCES[name]
    for size in itertools.chain(range(0, 700, 25), range(700, len(data) - 16, 500), [len(data) - 16]):
        refused(tmp_path, data[:size], arch)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressed_stream_that_is_damaged_or_cut_inside_is_refused(tmp_path: Path, name: str) -> None:
    stream = COMPRESSORS[name](vmlinux())
    for broken in (stream[:-1000], stream[:30], stream[:8] + b"\xff" * 40 + stream[48:]):
        refused(tmp_path, bzimage(broken, size=SIZE), X86)


@pytest.mark.parametrize("name", ["xz", "zstd", "lz4"])
def test_data_behind_the_compressed_stream_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path, bzimage(COMPRESSORS[name](vmlinux()) + b"garbage!" * 4, size=SIZE), X86)


def test_a_size_above_the_limit_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    error = refused(tmp_path, packed("lz4", vmlinux()), X86, Limits(max_size=5000))
    assert error.found == "an x86 bzImage (lz4) that unpacks to more than the limit of 5000 bytes"


def test_a_gzipped_image_is_unpacked_no_further_than_the_limit(tmp_path: Path) -> None:
    error = refused(tmp_path, gz(image()), ARM, Limits(max_size=5000))
    assert error.found == "a gzip stream that unpacks to more than the limit of 5000 bytes"


@pytest.mark.parametrize(("arch", "wrap"), [(ARM, gz), (X86, lambda data: packed("gzip", data))])
def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path, arch: Arch, wrap: Callable[[bytes], bytes]) -> None:
    error = refused(tmp_path, wrap(bytes(8 << 20)), arch)
    assert "unpacks to more than the limit of 64 times its size" in error.found


@pytest.mark.parametrize(("make", "found"), [(Path.mkdir, "a directory"), (os.mkfifo, "a device, a socket or a pipe")])
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(InvalidKernel) as caught:
        bootable_form(tmp_path / "source", tmp_path / "scratch", X86)
    assert caught.value.found == found == describe(tmp_path / "source")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_kernel(tmp_path / "none", X86)


def test_a_scratch_file_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("mine")
    with pytest.raises(FileExistsError):
        taken(tmp_path, gz(image()), ARM)
    assert (tmp_path / "scratch").read_text() == "mine"


def test_a_file_is_described_in_words(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data, words in ((vmlinux(), "an ELF for x86_64"), (GOOD, "an x86 bzImage"), (image(), "an arm64 Image")):
        path.write_bytes(data)
        assert describe(path) == words


@pytest.mark.parametrize("library", ["/nonexistent/libarchive.so", "libc.so.6"])
def test_without_libarchive_the_error_says_how_to_install_it(tmp_path: Path, library: str) -> None:
    (tmp_path / "source").write_bytes(packed("lz4", vmlinux()))
    script = (
        "import sys; from pathlib import Path; from systemfiles.foundation import arch, errors, kernelimage\n"
        "try: kernelimage.bootable_form(Path('source'), Path('scratch'), arch.Arch.X86_64)\n"
        "except errors.ToolMissing as error: print(error)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "LIBARCHIVE": library, "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("libarchive is not installed\n  hint  apt-get install libarchive13")
    assert not (tmp_path / "scratch").exists()


# --- hostile bytes ---


def never_fails_otherwise(data: bytes, arch: Arch) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source, scratch = Path(directory, "source"), Path(directory, "scratch")
        source.write_bytes(data)
        try:
            path, kernel = bootable_form(source, scratch, arch)
        except InvalidKernel:
            assert not scratch.exists()
        else:
            assert check_kernel(path, arch).facts == kernel.facts
        describe(source)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=600), st.sampled_from(Arch))
def test_arbitrary_bytes_only_ever_give_an_invalid_kernel(data: bytes, arch: Arch) -> None:
    never_fails_otherwise(data, arch)


# Where the headers are, so that most mutations hit something that is read.
PLACES = st.one_of(
    st.integers(0, 0x260), st.integers(0xA00 + 0x2CC, 0xA00 + 0x2CC + 200), st.integers(-len(PVH) - 130, -1)
)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(SOURCES)),
    st.lists(st.tuples(PLACES, st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    st.integers(0, 300),
)
def test_mutated_kernels_only_ever_give_an_invalid_kernel(
    name: str, changes: list[tuple[int, bytes]], cut: int
) -> None:
    arch, data = SOURCES[name]
    places = [(offset % len(data), new) for offset, new in changes]
    never_fails_otherwise(patched(data, *places)[: len(data) - cut], arch)
