"""The two files a VMM boots directly.

x86_64, an ELF `vmlinux`: ELF64, little-endian, EM_X86_64, with loadable segments and a note (owner "Xen", type 18,
XEN_ELFNOTE_PHYS32_ENTRY) that holds the physical address of the PVH entry point (Xen, docs/misc/pvh.pandoc). VMMs look
for it in PT_NOTE segments only: QEMU refuses a kernel that has the note in a section and in no such segment. Behind the
last header or segment a build may append relocations, which no header describes and no VMM loads.

aarch64, a raw `Image` (Linux, Documentation/arch/arm64/booting.rst, "Call the kernel image"), little-endian::

    0x00  u32  code0        its two first bytes are also "MZ" when the kernel is an EFI program, that is a PE file
    0x04  u32  code1        one of these two is a branch to the entry point, near the end of the image
    0x08  u64  text_offset
    0x10  u64  image_size   what it takes in memory, so with the BSS, which the file does not hold
    0x18  u64  flags        bit 0: big-endian; bits 1-2: page size (1: 4K, 2: 16K, 3: 64K)
    0x38  4s   "ARM\\x64"
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.bzimage import DEFAULT_LIMITS, Limits, Payload, find_payload, unpack_payload
from systemfiles.foundation.errors import InvalidKernel
from systemfiles.foundation.kernelfile import IMAGE, VMLINUX, KernelFile, is_bzimage, opened, words_for
from systemfiles.foundation.unpack import Compression

_BOOTABLE = {
    Arch.X86_64: "an ELF vmlinux for x86_64 with a PVH entry note",
    Arch.AARCH64: "a raw arm64 Image (aarch64)",
}
_ACCEPTED = {
    Arch.X86_64: f"{_BOOTABLE[Arch.X86_64]}, or a bzImage that holds one (gzip, xz, zstd or legacy lz4)",
    Arch.AARCH64: f"{_BOOTABLE[Arch.AARCH64]}, or a gzip'd one",
}


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel that was found bootable. `format` names what it came as: vmlinux, bzImage (lz4), Image, Image.gz.

    `size` is that of the bootable file, in bytes; `facts` are what its headers say (x86_64: `pvh_entry`, a physical
    address in hex; aarch64: `image_size`, `text_offset`, `page_size`), as JSON values.
    """

    arch: Arch
    format: str
    size: int
    facts: tuple[tuple[str, str | int], ...]


def check_kernel(path: Path, arch: Arch) -> KernelImage:
    """Require that `path`, as it is, can be booted directly on `arch`; reads headers only.

    Raises InvalidKernel, OSError.
    """
    with opened(path, expected=_BOOTABLE[arch]) as file:
        return _check(file, arch)


def bootable_form(
    source: Path, scratch: Path, arch: Arch, *, limits: Limits = DEFAULT_LIMITS
) -> tuple[Path, KernelImage]:
    """The directly bootable form of `source`: itself, or else `scratch`, a new file it was unpacked to.

    After an error there is no `scratch`. It is flushed, not synced. Raises InvalidKernel, ToolMissing,
    FileExistsError when `scratch` exists and is needed, OSError.
    """
    with opened(source, expected=_ACCEPTED[arch]) as file:
        payload = _payload(file, arch)
        if payload is None:
            return source, _check(file, arch)
        with scratch.open("xb") as destination:
            try:
                unpack_payload(file, payload, destination, limits)
                destination.flush()
                return scratch, _check_unpacked(file, payload, scratch, arch)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise


def _payload(file: KernelFile, arch: Arch) -> Payload | None:
    if arch is Arch.X86_64 and is_bzimage(file.head):
        return find_payload(file)
    if arch is Arch.AARCH64 and Compression.of(file.head) is Compression.GZIP:
        return Payload("a gzip stream", Compression.GZIP, 0, file.size, None)
    return None


def _check_unpacked(file: KernelFile, payload: Payload, unpacked: Path, arch: Arch) -> KernelImage:
    try:
        image = check_kernel(unpacked, arch)
    except InvalidKernel as inner:
        file.refuse(f"{payload.words} that holds {inner.found}")
    return replace(image, format="Image.gz" if arch is Arch.AARCH64 else f"bzImage ({payload.compression.value})")


def _check(file: KernelFile, arch: Arch) -> KernelImage:
    if arch is Arch.X86_64:
        return _check_vmlinux(file)
    return _check_image(file)


# --- x86_64: an ELF with a PVH note (System V ABI, "Object Files" and "Program Header") ---

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1
_PT_NOTE = 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_SEGMENTS_LIMIT = 128  # kernels have about five
_NOTES_LIMIT = 64 * 1024  # kernels have less than 1 KiB of them


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int


def _check_vmlinux(file: KernelFile) -> KernelImage:
    what = words_for(file.head)
    if what != VMLINUX:
        file.refuse(what)
    segments = _segments(file)
    loaded = [range(s.address, s.address + s.size) for s in segments if s.kind == _PT_LOAD and s.size]
    if not loaded:
        file.refuse(f"{VMLINUX} without a loadable segment")
    entry = _pvh_entry(file, segments)
    if not any(entry in addresses for addresses in loaded):
        file.refuse(f"{VMLINUX} whose PVH entry {entry:#x} lies outside what it loads")
    return KernelImage(Arch.X86_64, "vmlinux", file.size, (("pvh_entry", f"{entry:#x}"),))


def _segments(file: KernelFile) -> list[_Segment]:
    """What the program headers say. The file must be long enough for them, for the section headers and the segments."""
    _, _, _, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, _ = _EHDR.unpack_from(file.head)
    if phnum > _SEGMENTS_LIMIT:
        file.refuse(f"{VMLINUX} with {phnum} program headers")
    if phnum and phentsize != _PHDR.size:
        file.refuse(f"{VMLINUX} whose program headers have {phentsize} bytes each")
    file.require_size(VMLINUX, max(phoff + phnum * phentsize, shoff + shnum * shentsize))
    segments = []
    for kind, _, offset, _, address, size, memory, _ in _PHDR.iter_unpack(file.read(phoff, phnum * phentsize)):
        file.require_size(VMLINUX, offset + size if size else 0)
        if kind == _PT_LOAD and size > memory:
            file.refuse(f"{VMLINUX} with a segment of {size} bytes for {memory} bytes of memory")
        segments.append(_Segment(kind, offset, address, size))
    return segments


def _pvh_entry(file: KernelFile, segments: list[_Segment]) -> int:
    """The address in the first PVH note that a PT_NOTE segment holds."""
    notes = [segment for segment in segments if segment.kind == _PT_NOTE]
    if sum(segment.size for segment in notes) > _NOTES_LIMIT:
        file.refuse(f"{VMLINUX} with more than {_NOTES_LIMIT} bytes of notes")
    for segment in notes:
        for note in _notes(file, file.read(segment.offset, segment.size)):
            if (note["n_name"], note["n_type"]) == ("Xen", _XEN_ELFNOTE_PHYS32_ENTRY):
                return _address(file, note["n_descdata"])
    file.refuse(f"{VMLINUX} without a PVH entry note")


def _address(file: KernelFile, value: bytes) -> int:
    if len(value) not in (4, 8):
        file.refuse(f"{VMLINUX} whose PVH entry note has {len(value)} bytes")
    return int.from_bytes(value, "little")


def _notes(file: KernelFile, data: bytes) -> Iterator[Any]:
    from elftools.common.exceptions import ELFError  # elftools: 44 ms, and resolving needs none of it
    from elftools.construct import ConstructError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.notes import iter_notes

    # A file of header and notes only: elftools believes every count and size, and so meets its end soon.
    notes = ELFFile(io.BytesIO(file.head[: _EHDR.size] + data))
    try:
        yield from iter_notes(notes, _EHDR.size, len(data))
    except (ELFError, ConstructError) as error:
        file.refuse(f"{VMLINUX} with damaged notes ({error})")


# --- aarch64: a raw Image ---

_IMAGE_HEADER = 64
_BRANCH = 0b000101  # A64, "B <label>": the six upper bits; below them a signed count of words
_PE_MACHINE_ARM64 = 0xAA64
_PE_CERTIFICATES = 112 + 4 * 8  # PE32+ optional header: its fifth data directory, a file offset and a size


def _check_image(file: KernelFile) -> KernelImage:
    what = words_for(file.head)
    if what != IMAGE:
        file.refuse(what)
    file.require_size(IMAGE, _IMAGE_HEADER)
    text_offset, image_size, flags = struct.unpack_from("<QQQ", file.head, 8)
    if flags & 1:
        file.refuse("a big-endian arm64 Image")
    if image_size == 0:
        file.refuse("an arm64 Image without image_size (older than Linux 3.17)")
    file.require_size(IMAGE, max(_branch_target(file.head), _pe_end(file)))
    if file.size > image_size:
        file.refuse(f"{IMAGE} of {file.size} bytes, more than the {image_size} its header allows")
    page_size = ("unspecified", "4K", "16K", "64K")[flags >> 1 & 3]
    facts = (("image_size", image_size), ("text_offset", text_offset), ("page_size", page_size))
    return KernelImage(Arch.AARCH64, "Image", file.size, facts)


def _branch_target(head: bytes) -> int:
    """Where the header's branch leads, plus that instruction: the least size of the file. 0 without a branch."""
    for position, code in zip((0, 4), struct.unpack_from("<II", head), strict=True):
        if code >> 26 == _BRANCH:
            return position + 4 * int(code & 0x3FFFFFF) + 4
    return 0


def _pe_end(file: KernelFile) -> int:
    """Where the last section or signature of a kernel that is an EFI program ends in the file. 0 when it is none.

    PE Format, "COFF File Header", "Optional Header" and "Section Table".
    """
    if not file.head.startswith(b"MZ"):
        return 0
    (start,) = struct.unpack_from("<I", file.head, 0x3C)
    header = file.read(start, 24)
    if len(header) < 24 or header[:4] != b"PE\0\0":
        file.refuse(f"{IMAGE} whose PE header is missing")
    machine, sections, _, _, _, optional_size, _ = struct.unpack_from("<HHIIIHH", header, 4)
    if machine != _PE_MACHINE_ARM64:
        file.refuse(f"{IMAGE} whose PE header is for machine {machine:#x}")
    table = start + 24 + optional_size
    file.require_size(IMAGE, table + 40 * sections)
    ends: list[int] = [
        size + offset for size, offset in struct.iter_unpack("<16xII16x", file.read(table, 40 * sections))
    ]
    optional = file.read(start + 24, optional_size)
    if len(optional) >= _PE_CERTIFICATES + 8:
        offset, size = struct.unpack_from("<II", optional, _PE_CERTIFICATES)
        ends.append(offset + size)
    return max(ends, default=0)
