"""A file that may be a kernel: how it is opened and read without surprises, and what it is in words when it is none.

Downloads fail in ways that leave a file: a login page, a package instead of what is in it, another architecture's
kernel. A refusal that names what is there saves the search for it. Everything is told by the first page.
"""

from __future__ import annotations

import io
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from systemfiles.foundation.errors import InvalidKernel
from systemfiles.foundation.unpack import Compression

VMLINUX = "an ELF for x86_64"
IMAGE = "an arm64 Image"
BZIMAGE = "an x86 bzImage"

_HEAD = 4096  # every header that is read of a kernel, and every magic number, lies in the first page
_ELF_HEADER = 64
_MACHINES = {3: "i386", 8: "mips", 21: "ppc64", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
_KNOWN = (
    (0x38, b"ARM\x64", IMAGE),
    (0x38, b"RSC\x05", "a riscv Image"),
    (0x24, b"\x18\x28\x6f\x01", "a zImage for 32-bit arm"),
    (0, b"MZ", "an EFI or Windows program"),
    (0, b"!<arch>\ndebian-binary", "a Debian package (.deb)"),
    (0, b"!<arch>\n", "an ar archive"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"070701", "a cpio archive (an initrd?)"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or a U-Boot FIT image"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"version https://git-lfs.", "a Git LFS pointer, not the file it stands for"),
)


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
        head = stream.read(_HEAD)
        yield KernelFile(path, stream, stream.seek(0, io.SEEK_END), head, expected)


def describe(path: Path) -> str:
    """What `path` is, in words for a message: "an HTML page", "an ELF for aarch64". Raises OSError."""
    try:
        with opened(path, expected="a kernel") as file:
            return words_for(file.head)
    except InvalidKernel as not_a_file:
        return not_a_file.found


def is_bzimage(head: bytes) -> bool:
    """Whether a file that begins with `head` has the boot sector and the signature of an x86 Linux kernel."""
    return head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"


def words_for(head: bytes) -> str:
    """What a file that begins with `head`, its first page, is: in words for a message."""
    if not head:
        return "an empty file"
    if is_bzimage(head):
        return BZIMAGE
    if head[4:8] == b"zimg" and head.startswith(b"MZ"):
        return f"an EFI zboot image ({_printable(head[24:32]) or 'of an unknown compression'})"
    if head.startswith(b"\x7fELF"):
        return _describe_elf(head)
    for offset, magic, words in _KNOWN:
        if head.startswith(magic, offset):
            return words
    compression = Compression.of(head)
    return f"data compressed as {compression.value}" if compression else _describe_text(head)


def _describe_elf(head: bytes) -> str:
    if len(head) < _ELF_HEADER:
        return "an ELF, but truncated within its header"
    if head[5] != 1:
        return "a big-endian ELF"
    kind, machine = struct.unpack_from("<HH", head, 16)
    name = _MACHINES.get(machine, f"machine {machine}")
    if head[4] != 2:
        return f"a 32-bit ELF for {name}"
    if kind not in (2, 3):
        return f"an ELF for {name} that is {'an object file (a module?)' if kind == 1 else 'no executable'}"
    return f"an ELF for {name}"


def _describe_text(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:16].lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page (a proxy's or a login page?)"
    if not all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head[:256]):
        return f"data that begins with {head[:16].hex(' ')}"
    line = _printable(start.split(b"\n")[0][:60])
    return f"a script ({line})" if start.startswith(b"#!") else f"text that begins with {line!r}"


def _printable(raw: bytes) -> str:
    return "".join(chr(byte) for byte in raw if 32 <= byte < 127)
