"""The newc cpio format, which the Linux kernel unpacks an initramfs from.

An archive is a run of entries. Each part of an entry is padded with zeros to a multiple of 4 bytes::

    070701 + 13 fields of 8 hex digits: ino mode uid gid nlink mtime filesize devmajor devminor
                                        rdevmajor rdevminor namesize (with the NUL) check (0)
    name + NUL
    data: a file's content or a symbolic link's target

An entry named `TRAILER!!!` ends it, and zeros fill the last block of 512 bytes. Names of one file share an inode
number and count each other in nlink; the last of them carries the content, as GNU cpio writes it.

Sources: Linux Documentation/driver-api/early-userspace/buffer-format.rst and init/initramfs.c (what is dropped, and
when); cpio(5). Names are UTF-8 in any locale; foreign bytes are kept as surrogate escapes.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol

from systemfiles.foundation.digest import CHUNK
from systemfiles.foundation.errors import InvalidArchive

TRAILER = "TRAILER!!!"
PATH_MAX = 4096  # with the NUL; the kernel skips entries with longer names or link targets
MODE_MAX = 0o177777
DEVICES = (stat.S_IFCHR, stat.S_IFBLK)
TYPES = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, *DEVICES, stat.S_IFIFO, stat.S_IFSOCK)

_FORMAT = b"070701" + b"%08X" * 13
_BLOCK = 512
_WORD = 0xFFFFFFFF  # every header field is 32 bits wide, the size of a file too
_NAME_MAX = 255
_MAJOR_MAX, _MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1  # include/linux/kdev_t.h


@dataclass(frozen=True, slots=True)
class Record:
    """One name in an archive.

    `mode` holds type and permission bits. `data` is a file's content, or the path to read it from when it is
    written; for a symbolic link, its target. `rdev` is a device's (major, minor). `hardlink` names the record whose
    content and metadata this name shares.
    """

    name: str
    mode: int
    data: bytes | Path = b""
    rdev: tuple[int, int] = (0, 0)
    hardlink: str | None = None
    uid: int = 0
    gid: int = 0
    mtime: int = 0

    @property
    def type(self) -> int:
        return stat.S_IFMT(self.mode)


class Sink(Protocol):
    """Where an archive goes. It takes some of `data`, says how much, and may not keep the view."""

    def write(self, data: memoryview, /) -> int: ...


def file(name: str, data: bytes | Path, *, mode: int = 0o644) -> Record:
    return Record(name, stat.S_IFREG | mode, data)


def directory(name: str, *, mode: int = 0o755) -> Record:
    return Record(name, stat.S_IFDIR | mode)


def symlink(name: str, target: str) -> Record:
    return Record(name, stat.S_IFLNK | 0o777, _encode(target, "link target"))


def hardlink(name: str, target: str) -> Record:
    return Record(name, stat.S_IFREG, hardlink=target)


def char_device(name: str, major: int, minor: int, *, mode: int = 0o600) -> Record:
    return Record(name, stat.S_IFCHR | mode, rdev=(major, minor))


def block_device(name: str, major: int, minor: int, *, mode: int = 0o600) -> Record:
    return Record(name, stat.S_IFBLK | mode, rdev=(major, minor))


def normalise(records: Iterable[Record]) -> tuple[Record, ...]:
    """The one way to write these records: sorted, every parent there, the first name of a file holding its content.

    The same set of records in any order gives the same result. Raises InvalidArchive for whatever the format or the
    kernel cannot hold, names that are not plain relative paths, duplicates, and names below something that is no
    directory.
    """
    known: dict[str, Record] = {}
    for record in records:
        _check(record)
        if record.name in known:
            _refuse(record.name, "the name occurs twice")
        known[record.name] = record
    _add_parents(known)
    groups: dict[str, list[Record]] = {}
    names = sorted(known, key=_encode)
    for name in names:
        group = known[name].hardlink or name
        groups.setdefault(group, []).append(known[name])
    for target, members in groups.items():
        if len(members) > 1 or members[0].hardlink:
            _link(known, target, members)
    return tuple(known[name] for name in names)


def _link(known: dict[str, Record], target: str, members: list[Record]) -> None:
    """Gives the names of one file its metadata, the first of them its content."""
    owner = known.get(target)
    if owner is None or owner.hardlink or owner.type == stat.S_IFDIR:
        _refuse(members[-1].name, f"it is a hard link to {target!r}, which is no file in this archive")
    first = members[0].name
    for member in members:
        name = member.name
        # the kernel makes every symbolic link anew, so each needs its own target
        if name == first or owner.type == stat.S_IFLNK:
            known[name] = replace(owner, name=name)
        else:
            known[name] = replace(owner, name=name, data=b"", hardlink=first)


def _add_parents(known: dict[str, Record]) -> None:
    for name in list(known):
        parent, slash, _ = name.rpartition("/")
        while slash and parent not in known:
            # the kernel drops a/b when a is missing
            known[parent] = directory(parent)
            parent, slash, _ = parent.rpartition("/")
        if slash and known[parent].type != stat.S_IFDIR:
            _refuse(name, f"{parent!r} is not a directory")


def _check(record: Record) -> None:
    _check_name(record.name)
    kind, size = record.type, len(record.data) if isinstance(record.data, bytes) else None
    if kind not in TYPES or record.mode > MODE_MAX:
        _refuse(record.name, f"mode {record.mode:#o} is none that Linux knows")
    if record.hardlink and kind == stat.S_IFDIR:
        _refuse(record.name, "a directory has one name")
    for field in (record.uid, record.gid, record.mtime):
        if not 0 <= field <= _WORD:
            _refuse(record.name, f"{field} does not fit into 32 bits")
    major, minor = record.rdev
    if not (0 <= major <= _MAJOR_MAX and 0 <= minor <= _MINOR_MAX) or (any(record.rdev) and kind not in DEVICES):
        _refuse(record.name, f"{major}:{minor} is no device number for it")
    if kind == stat.S_IFLNK and not record.hardlink:
        if not isinstance(record.data, bytes) or not 0 < len(record.data) < PATH_MAX or b"\0" in record.data:
            _refuse(record.name, f"a link target has 1 to {PATH_MAX - 1} bytes, none of them NUL")
    elif size != 0 and (kind != stat.S_IFREG or record.hardlink):
        _refuse(record.name, "only the first name of a regular file has content")
    if size is not None and size > _WORD:
        _refuse(record.name, f"{size} bytes are more than the format can hold")


def _check_name(name: str) -> None:
    raw = _encode(name)
    if len(raw) >= PATH_MAX or b"\0" in raw or name == TRAILER:
        _refuse(name, f"names are shorter than {PATH_MAX} bytes, without NUL, and not {TRAILER}")
    for part in raw.split(b"/"):
        if part in (b"", b".", b"..") or len(part) > _NAME_MAX:
            _refuse(name, f"a name is a plain relative path of parts of at most {_NAME_MAX} bytes")


def _encode(name: str, what: str = "name") -> bytes:
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        _refuse(name, f"the {what} cannot be encoded")


def _refuse(name: str, problem: str) -> NoReturn:
    subject = f"cpio entry {name[:200]!r}"
    raise InvalidArchive(subject, problem)


def write(records: Iterable[Record], stream: Sink) -> int:
    """Writes an archive of `records`, normalised; returns its size in bytes.

    The bytes depend on the records alone. Content given as a path is read once, at its turn, and never through a
    symbolic link. Raises InvalidArchive as `normalise` does, and for a path that is no regular file, cannot be read,
    is too large or changes its size meanwhile.
    """
    ready = normalise(records)
    links = Counter(record.hardlink or record.name for record in ready)
    left = links.copy()
    inodes: dict[str, int] = {}
    content: dict[str, bytes | Path] = {}
    out = _Output(stream)
    for record in ready:
        group = record.hardlink or record.name
        content.setdefault(group, record.data)
        left[group] -= 1
        data = b"" if left[group] else content.pop(group)
        inode = inodes.setdefault(group, len(inodes) + 1)
        nlink = 2 if record.type == stat.S_IFDIR else links[group]
        if isinstance(data, bytes):
            out.add(_header(record, inode, nlink, len(data)))
            out.add(data)
        else:
            _add_file(out, record, inode, nlink, data)
        out.pad(4)
    out.add(_header(Record(TRAILER, 0), 0, 1, 0))
    out.pad(_BLOCK)
    out.flush()
    return out.size


def _header(record: Record, inode: int, nlink: int, size: int) -> bytes:
    name = _encode(record.name)
    fields = (inode, record.mode, record.uid, record.gid, nlink, record.mtime, size)
    head = _FORMAT % (*fields, 0, 0, *record.rdev, len(name) + 1, 0) + name + b"\0"
    return head + bytes(-len(head) % 4)


class _Output:
    """One buffer that everything passes through, so that the stream sees few and large writes."""

    def __init__(self, stream: Sink) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(CHUNK))
        self._used = 0
        self.size = 0

    def add(self, data: bytes) -> None:
        self.size += len(data)
        if self._used + len(data) > CHUNK:
            self.flush()
        if len(data) > CHUNK:
            self._pass_on(memoryview(data))
            return
        self._buffer[self._used : self._used + len(data)] = data
        self._used += len(data)

    def add_from(self, source: int, most: int) -> int:
        """Takes up to `most` bytes from a file descriptor; returns how many, 0 at its end."""
        if self._used == CHUNK:
            self.flush()
        count = os.readv(source, [self._buffer[self._used : self._used + most]])
        self._used += count
        self.size += count
        return count

    def pad(self, to: int) -> None:
        if rest := -self.size % to:
            self.add(bytes(rest))

    def flush(self) -> None:
        self._pass_on(self._buffer[: self._used])
        self._used = 0

    def _pass_on(self, view: memoryview) -> None:
        while view:  # an unbuffered stream may take less than it was given
            view = view[self._stream.write(view) :]


def _add_file(out: _Output, record: Record, inode: int, nlink: int, path: Path) -> None:
    try:
        # neither a link nor a FIFO that someone put there may lead elsewhere or block
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidArchive(path, f"it cannot be read ({error.strerror})") from error
    try:
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArchive(path, "it is not a regular file")
        if status.st_size > _WORD:
            raise InvalidArchive(path, f"{status.st_size} bytes are more than cpio can hold")
        out.add(_header(record, inode, nlink, status.st_size))
        left = status.st_size
        while left >= 0 and (count := out.add_from(source, left + 1)):
            left -= count
    finally:
        os.close(source)
    if left:
        raise InvalidArchive(path, "its size changed while it was copied")
