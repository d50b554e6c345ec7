"""File-system calls by number: what each does, and which paths of a process it is about.

Numbers are those of linux/arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import fcntl
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FICLONE = 0x40049409
_LOCKING = (fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW)
_AT_FDCWD = -100
_PAGE = 4096


class Shape(NamedTuple):
    """What a call does (`verb`), and which of its arguments are (directory descriptor, path) or a descriptor."""

    verb: str
    paths: tuple[tuple[int | None, int], ...] = ()
    fd: int | None = None


_SHAPES = {
    "open": Shape("open", ((None, 0),)),
    "openat": Shape("open", ((0, 1),)),
    "creat": Shape("create", ((None, 0),)),
    "read": Shape("read", fd=0),
    "pread64": Shape("read", fd=0),
    "getdents64": Shape("list", fd=0),
    "write": Shape("write", fd=0),
    "writev": Shape("write", fd=0),
    "pwrite64": Shape("write", fd=0),
    "sendfile": Shape("copy", fd=0),
    "copy_file_range": Shape("copy", fd=2),
    "ioctl": Shape("clone", fd=0),
    "fallocate": Shape("write", fd=0),
    "flock": Shape("lock", fd=0),
    "fcntl": Shape("lock", fd=0),
    "fsync": Shape("fsync", fd=0),
    "fdatasync": Shape("fsync", fd=0),
    "truncate": Shape("truncate", ((None, 0),)),
    "ftruncate": Shape("truncate", fd=0),
    "mkdir": Shape("mkdir", ((None, 0),)),
    "mkdirat": Shape("mkdir", ((0, 1),)),
    "rmdir": Shape("rmdir", ((None, 0),)),
    "unlink": Shape("unlink", ((None, 0),)),
    "unlinkat": Shape("unlink", ((0, 1),)),
    "rename": Shape("rename", ((None, 0), (None, 1))),
    "renameat": Shape("rename", ((0, 1), (2, 3))),
    "renameat2": Shape("rename", ((0, 1), (2, 3))),
    "link": Shape("link", ((None, 0), (None, 1))),
    "linkat": Shape("link", ((0, 1), (2, 3))),
    "symlink": Shape("symlink", ((None, 1),)),
    "symlinkat": Shape("symlink", ((1, 2),)),
    "chmod": Shape("chmod", ((None, 0),)),
    "fchmod": Shape("chmod", fd=0),
    "fchmodat": Shape("chmod", ((0, 1),)),
    "chown": Shape("chown", ((None, 0),)),
    "fchown": Shape("chown", fd=0),
    "fchownat": Shape("chown", ((0, 1),)),
    "utimensat": Shape("utime", ((0, 1),)),
    "sendto": Shape("send", fd=0),
}
_NUMBERS = {
    "x86_64": {
        0: "read", 1: "write", 2: "open", 16: "ioctl", 17: "pread64", 18: "pwrite64", 20: "writev", 40: "sendfile",
        44: "sendto", 72: "fcntl", 73: "flock", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate",
        82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link", 87: "unlink", 88: "symlink", 90: "chmod",
        91: "fchmod", 92: "chown", 93: "fchown", 217: "getdents64", 257: "openat", 258: "mkdirat", 260: "fchownat",
        263: "unlinkat", 264: "renameat", 265: "linkat", 266: "symlinkat", 268: "fchmodat", 280: "utimensat",
        285: "fallocate", 316: "renameat2", 326: "copy_file_range",
    },
    "aarch64": {
        25: "fcntl", 29: "ioctl", 32: "flock", 34: "mkdirat", 35: "unlinkat", 36: "symlinkat", 37: "linkat",
        38: "renameat", 45: "truncate", 46: "ftruncate", 47: "fallocate", 52: "fchmod", 53: "fchmodat", 54: "fchownat",
        55: "fchown", 56: "openat", 61: "getdents64", 63: "read", 64: "write", 66: "writev", 67: "pread64",
        68: "pwrite64", 71: "sendfile", 82: "fsync", 83: "fdatasync", 88: "utimensat", 206: "sendto", 276: "renameat2",
        285: "copy_file_range",
    },
}  # fmt: skip
CALLS: dict[int, str] = _NUMBERS[platform.machine()]
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]


def numbers(verbs: frozenset[str]) -> list[int]:
    """The calls that do one of these."""
    found = verbs | {"open"} if "create" in verbs else verbs
    return [number for number, name in CALLS.items() if _SHAPES[name].verb in found]


VERBS = frozenset(shape.verb for shape in _SHAPES.values()) | {"create"}
CREATING = frozenset({"create", "mkdir", "link", "symlink", "rename"})
WRITING = frozenset({"write", "copy", "clone"})
CHANGING = CREATING | WRITING | {"fsync", "truncate", "rmdir", "unlink", "chmod", "chown", "utime", "lock"}


@dataclass(frozen=True)
class Call:
    """One call that is about to be made: `actor` is "main", "thread" or "program"; paths are relative to the root."""

    name: str
    verb: str
    paths: tuple[str, ...]
    actor: str
    tid: int
    args: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.verb} {' → '.join(self.paths)} ({self.actor})"


class Reader:
    """Tells which calls of a process and its children are about something below `root`."""

    def __init__(self, root: Path, pid: int) -> None:
        self._root = os.path.realpath(root)
        self._pid = pid

    def read(self, tid: int, number: int, args: tuple[int, ...]) -> Call | None:
        """The call; None when it is not about the root, or its process is gone."""
        name = CALLS[number]
        verb, paths, fd = _SHAPES[name]
        try:
            if verb == "send":
                return Call(name, verb, ("a socket",), self._actor(tid), tid, args)
            if not _changes(name, args[1] & 0xFFFFFFFF):
                return None
            found = [self._target(tid, args[fd])] if fd is not None else []
            found += [self._path(tid, None if at is None else args[at], args[place]) for at, place in paths]
        except (OSError, IndexError):
            return None
        if not any(path == self._root or path.startswith(f"{self._root}/") for path in found):
            return None
        if verb == "open" and args[2 if name == "openat" else 1] & (os.O_CREAT | os.O_TRUNC):
            verb = "create"
        below = tuple(os.path.relpath(path, self._root) for path in found)
        return Call(name, verb, below, self._actor(tid), tid, args)

    def _actor(self, tid: int) -> str:
        if tid == self._pid:
            return "main"
        return "thread" if Path(f"/proc/{self._pid}/task/{tid}").exists() else "program"

    def _target(self, tid: int, fd: int) -> str:
        return str(Path(f"/proc/{tid}/fd/{_signed(fd)}").readlink()).removesuffix(" (deleted)")

    def _path(self, tid: int, at: int | None, place: int) -> str:
        path = os.fsdecode(_text(tid, place))
        if path.startswith("/"):
            return os.path.normpath(path)
        here = at is None or _signed(at) == _AT_FDCWD
        base = str(Path(f"/proc/{tid}/cwd").readlink()) if here else self._target(tid, at or 0)
        return os.path.normpath(f"{base}/{path}")


def _changes(name: str, command: int) -> bool:
    """Whether a call that does what its second argument says does anything that counts here."""
    return command in _LOCKING if name == "fcntl" else name != "ioctl" or command == FICLONE


def memory(tid: int, place: int, size: int) -> bytes:
    """Bytes of another process. Raises OSError."""
    fd = os.open(f"/proc/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, place)
    finally:
        os.close(fd)


def _text(tid: int, place: int) -> bytes:
    data = memory(tid, place, _PAGE - place % _PAGE)
    if b"\0" not in data:
        data += memory(tid, place + len(data), _PAGE)
    return data.partition(b"\0")[0]


def _signed(value: int) -> int:
    signed: int = struct.unpack("<i", struct.pack("<I", value & 0xFFFFFFFF))[0]
    return signed
