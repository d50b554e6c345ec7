"""What every disk format here is written from: a tree of inodes, the place their bytes wait in, and a sparse file.

A file's bytes are not in memory: they are a `Span` of one other file. Names are text in UTF-8, foreign bytes kept as
surrogate escapes; wherever order matters it is that of the bytes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Generic, NoReturn, TypeVar

from systemfiles.foundation.errors import InvalidArchive
from systemfiles.foundation.files import storing

BLOCK = 4096
NAME_MAX = 255
SYMLINK_MAX = 4095
MAJOR_MAX, MINOR_MAX = (1 << 12) - 1, (1 << 20) - 1  # include/linux/kdev_t.h
EARLIEST, LATEST = -(1 << 31), (1 << 34) - (1 << 31) - 1
"""The seconds ext4 can hold; times before and after become these, as in the kernel's timestamp_truncate()."""

_PIECE = 1 << 16
_ZEROS = bytes(_PIECE)

Content = TypeVar("Content")


FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
"""What directories call the types of inodes, in ext4 and EROFS alike (linux/fs_types.h)."""


@dataclass(frozen=True, slots=True)
class Span:
    """`size` bytes of some file from `start` on."""

    start: int
    size: int


@dataclass(slots=True, eq=False)
class Inode(Generic[Content]):
    """A file of any type; names that share one are hard links of each other.

    `mode` holds type and permission bits, `mtime` nanoseconds since 1970. `target` is a symbolic link's, `content` a
    plain file's, None when it is empty, and `rdev` a device's (major, minor).
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    rdev: tuple[int, int] = (0, 0)
    target: bytes = b""
    content: Content | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, Inode[Content]] = field(default_factory=dict)

    @property
    def type(self) -> int:
        return stat.S_IFMT(self.mode)

    @property
    def is_dir(self) -> bool:
        return self.type == stat.S_IFDIR


def directory(*, mode: int = 0o755) -> Inode[Span]:
    """An empty directory of root's, made in 1970."""
    return Inode(stat.S_IFDIR | mode)


def file(content: Span, *, mode: int = 0o644) -> Inode[Span]:
    """A file of root's, made in 1970."""
    return Inode(stat.S_IFREG | mode, content=content)


def encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def entries(inode: Inode[Content]) -> list[tuple[bytes, Inode[Content]]]:
    """The names in a directory and what they name, sorted."""
    return sorted(((encoded(name), child) for name, child in inode.children.items()), key=lambda entry: entry[0])


@dataclass(frozen=True, slots=True)
class Inventory(Generic[Content]):
    """All inodes below and with a root: how many links each has, in the order they are found; each directory's parent.

    The order depends on the names alone: a directory's inodes follow each other, the root is the first of all.
    """

    links: dict[Inode[Content], int]
    parents: dict[Inode[Content], Inode[Content]]

    @classmethod
    def of(cls, root: Inode[Content]) -> Inventory[Content]:
        links, parents, todo = {root: 2}, {root: root}, [root]
        while todo:
            parent = todo.pop()
            below = []
            for _, child in entries(parent):
                if child.is_dir:
                    links[child], parents[child] = 2, parent
                    links[parent] += 1
                    below.append(child)
                else:
                    links[child] = links.get(child, 0) + 1
            todo += reversed(below)
        return cls(links, parents)


def refuse(subject: object, problem: str) -> NoReturn:
    raise InvalidArchive(subject, problem)


class Image:
    """A file that is written here and there; what nobody writes, and zeros, cost no space."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with storing(path):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, start: int, data: bytes | bytearray) -> None:
        """Raises NoSpace, StoreError."""
        if data == _ZEROS[: len(data)]:
            return
        view = memoryview(data)
        with storing(self._path):
            while view:
                count = os.pwrite(self._fd, view, start)
                view, start = view[count:], start + count

    def copy(self, start: int, source: BinaryIO, span: Span) -> None:
        """Writes what `source` has in `span`. Raises as `write`."""
        for data in pieces(source, span):
            self.write(start, data)
            start += len(data)

    def resize(self, size: int) -> None:
        with storing(self._path):
            os.truncate(self._fd, size)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pieces(source: BinaryIO, span: Span) -> Iterator[bytes]:
    """What `source` has in `span`, piece by piece."""
    source.seek(span.start)
    left = span.size
    while left:
        data = source.read(min(left, _PIECE))
        if not data:
            refuse("a file's content", "it got lost while a disk was written")
        left -= len(data)
        yield data
