"""OCI image layers merged into one tree of inodes: nothing here touches the host's file system.

A layer is a tar archive, plain or compressed with gzip or zstd, that changes the tree of the layers below it::

    usr/bin/x        is added, or replaces whatever was there (a directory over a directory keeps what is in it)
    usr/bin/.wh.y    removes usr/bin/y of the layers below, never an entry of its own layer
    etc/.wh..wh..opq empties etc as the layers below left it

Source: OCI image-spec, layer.md. Where it is silent we do as containerd does: a parent directory that is a symbolic
link is followed inside the image's root (`bin -> usr/bin` below, `bin/x` above gives usr/bin/x), the last part of a
name never is, missing parents are made, and a leading "/" or "./" means nothing. A name with ".." is refused.

Taken over are modes (setuid bits too), numeric owners, device numbers, modification times (to the nanosecond where pax
headers have it; what no ext4 could hold becomes the nearest it could), and extended attributes (the pax headers
SCHILY.xattr.*), but for trusted.overlay.*, with which overlayfs marks directories of a host.
"""

from __future__ import annotations

import re
import stat
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, BinaryIO, Generic, NoReturn

from systemfiles.foundation import unpack
from systemfiles.foundation.archive import BadStream, Fault
from systemfiles.foundation.diskimage import (
    EARLIEST,
    LATEST,
    MAJOR_MAX,
    MINOR_MAX,
    NAME_MAX,
    SYMLINK_MAX,
    Content,
    Inode,
    encoded,
)
from systemfiles.foundation.errors import InvalidArchive
from systemfiles.foundation.unpack import Compression, Packed, unpacked
from systemfiles.recipes.tars import Header, intact

_COMPRESSIONS = (Compression.GZIP, Compression.ZSTD)
_WHITEOUT, _OPAQUE, _AUFS = ".wh.", ".wh..wh..opq", ".wh..wh."
_PATH_MAX = 4096
_SYMLINKS_MAX = 40  # as many as the kernel follows in one path
_STEPS_MAX = 10_000_000  # path components looked up in all
_GLOBALS_MAX = 100
_RATIO_FREE = 16 << 20
_PIECE = 1 << 16
_OWNER_MAX = (1 << 32) - 2  # the largest number means nobody in particular
_SECOND = 1_000_000_000  # in nanoseconds
_XATTR, _OVERLAYFS = "SCHILY.xattr.", "trusted.overlay."
_XATTR_SIZE = 1 << 16  # include/uapi/linux/limits.h
_MTIME = re.compile(r"(-?)([0-9]{1,12})(?:\.([0-9]*))?")
_ENDS_MAX = 8  # how often one may read at the end; with a bad sparse map tarfile would read there for ever


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may cost: entries, decompressed bytes (both of all layers), and the ratio of any one layer's
    decompressed to compressed bytes, which counts after the first 16 MiB."""

    entries: int = 100_000
    size: int = 512 << 20
    ratio: int = 200


def merge(
    layers: Sequence[BinaryIO], keep: Callable[[IO[bytes]], Content], *, limits: Limits | None = None
) -> Inode[Content]:
    """The root of the tree that `layers` make, lowest first. `keep` puts a file's bytes somewhere and says where.

    Hard links stay links, even to a lower layer's file. Of a name that is twice in one layer the last counts. Raises
    InvalidArchive for what is no layer, is damaged, would escape its root or exceeds `limits`; ToolMissing for a zstd
    layer on a host without libarchive; and whatever `keep` raises.
    """
    tree = _Tree(keep, limits or Limits())
    for number, layer in enumerate(layers, 1):
        tree.subject = f"layer {number}"
        entries = list(_read(layer, tree))
        # whiteouts first: wherever they stand, they never concern their own layer
        for entry in entries:
            if entry.whiteout:
                tree.remove(entry)
        for entry in entries:
            if not entry.whiteout:
                tree.add(entry)
    return tree.root


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Content]):
    parent: tuple[str, ...]
    name: str
    node: Inode[Content] | None  # None for a hard link and a whiteout
    link: tuple[str, ...] = ()

    @property
    def whiteout(self) -> bool:
        return self.name.startswith(_WHITEOUT)


class _Tree(Generic[Content]):
    """The merged image so far, and what may still be spent on it."""

    def __init__(self, keep: Callable[[IO[bytes]], Content], limits: Limits) -> None:
        self.keep = keep
        self.limits = limits
        self.subject = "image"
        self.size = 0
        self.root: Inode[Content] = Inode(stat.S_IFDIR | 0o755)
        self._entries = 0
        self._steps = 0

    def refuse(self, problem: str) -> NoReturn:
        raise InvalidArchive(self.subject, problem)

    def count_entry(self) -> None:
        self._entries += 1
        if self._entries > self.limits.entries:
            self.refuse(f"the image has more than {self.limits.entries} entries")

    def remove(self, entry: _Entry[Content]) -> None:
        if not (parent := self._find(entry.parent)):
            return
        if entry.name == _OPAQUE:
            parent.children.clear()
        elif not entry.name.startswith(_AUFS):  # what AUFS kept for itself, in layers of old Docker versions
            parent.children.pop(entry.name.removeprefix(_WHITEOUT), None)

    def add(self, entry: _Entry[Content]) -> None:
        node = entry.node or self._linked(entry)
        siblings = self._make(entry.parent).children
        existing = siblings.get(entry.name) if entry.name else self.root
        if existing and existing.is_dir and node.is_dir:
            existing.mode, existing.uid, existing.gid = node.mode, node.uid, node.gid
            existing.mtime, existing.xattrs = node.mtime, node.xattrs
        else:
            siblings[entry.name] = node

    def _linked(self, entry: _Entry[Content]) -> Inode[Content]:
        *parent, name = entry.link
        directory = self._find(parent)
        node = directory.children.get(name) if directory else None
        if node is None or node.is_dir:
            self.refuse(f"{entry.name!r} is a hard link to {'/'.join(entry.link)!r}, which is no file")
        return node

    def _find(self, path: Sequence[str]) -> Inode[Content] | None:
        return self._walk(path, create=False)

    def _make(self, path: Sequence[str]) -> Inode[Content]:
        found = self._walk(path, create=True)
        if found is None:
            self.refuse(f"{'/'.join(path)!r} leads through something that is no directory")
        return found

    def _walk(self, path: Sequence[str], *, create: bool) -> Inode[Content] | None:
        """The directory at `path`, every symbolic link followed inside the root. None if there is none."""
        trail = [self.root]
        todo = deque(path)
        links = 0
        while todo:
            self._step()
            name = todo.popleft()
            if name in ("", "."):
                continue
            if name == "..":
                trail = trail[:-1] or trail  # nothing is above the root
                continue
            node = trail[-1].children.get(name)
            if node is None and create:
                self.count_entry()
                node = trail[-1].children[name] = Inode(stat.S_IFDIR | 0o755)
            if node is None or node.type not in (stat.S_IFDIR, stat.S_IFLNK):
                return None
            if node.type == stat.S_IFDIR:
                trail.append(node)
                continue
            links += 1
            if links > _SYMLINKS_MAX:
                self.refuse(f"{'/'.join(path)!r} leads through too many symbolic links")
            target = node.target.decode("utf-8", "surrogateescape")
            if target.startswith("/"):
                trail = [self.root]
            todo.extendleft(reversed(target.split("/")))
        return trail[-1]

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _STEPS_MAX:
            self.refuse("its paths take too long to follow")


def _read(layer: BinaryIO, tree: _Tree[Content]) -> Iterator[_Entry[Content]]:
    stream = _Unpacked(layer, tree)
    with (
        intact(tree.subject),
        tarfile.open(
            fileobj=stream,  # type: ignore[call-overload]  # stream mode calls nothing but read()
            mode="r|",
            bufsize=_PIECE,
            tarinfo=Header,
            encoding="utf-8",
            errors="surrogateescape",
        ) as archive,
    ):
        while member := archive.next():
            tree.count_entry()
            stream.content_end = member.offset_data + member.size
            if len(archive.pax_headers) > _GLOBALS_MAX or member.issparse() or member.size < 0:
                tree.refuse(f"{member.name!r} has a sparse map, a negative size or too many global headers")
            if entry := _entry(archive, member, tree):
                yield entry
            archive.members.clear()  # it would keep every header
        stream.drain()


def _entry(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: _Tree[Content]) -> _Entry[Content] | None:
    path = _parts(member.name, tree)
    if not path:  # the root itself
        return _Entry((), "", _node(archive, member, tree)) if member.isdir() else None
    *parent, name = path
    if any(part.startswith(_AUFS) for part in parent):
        return None
    if any(part.startswith(_WHITEOUT) for part in parent) or name in (_WHITEOUT, ".wh..", ".wh..."):
        tree.refuse(f"{member.name!r} is a whiteout of nothing")
    if name.startswith(_WHITEOUT):
        return _Entry(tuple(parent), name, None)
    if member.islnk():
        target = _parts(member.linkname, tree)
        if not target:
            tree.refuse(f"{member.name!r} is a hard link to nothing")
        return _Entry(tuple(parent), name, None, target)
    return _Entry(tuple(parent), name, _node(archive, member, tree))


def _node(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: _Tree[Content]) -> Inode[Content]:
    kinds = {
        tarfile.SYMTYPE: stat.S_IFLNK,
        tarfile.DIRTYPE: stat.S_IFDIR,
        tarfile.CHRTYPE: stat.S_IFCHR,
        tarfile.BLKTYPE: stat.S_IFBLK,
        tarfile.FIFOTYPE: stat.S_IFIFO,
    }
    kind = stat.S_IFREG if member.isreg() else kinds.get(member.type)
    if kind is None:
        tree.refuse(f"{member.name!r} is of the unknown type {member.type!r}")
    node: Inode[Content] = Inode(kind | member.mode & 0o7777, member.uid, member.gid, _mtime(member))
    if not (0 <= node.uid <= _OWNER_MAX and 0 <= node.gid <= _OWNER_MAX):
        tree.refuse(f"{member.name!r} has an owner that cannot be")
    node.xattrs = _xattrs(member, tree)
    if kind == stat.S_IFLNK:
        node.mode |= 0o777  # what Linux gives it, whatever an archive says
        node.target = encoded(member.linkname)
        if not 0 < len(node.target) <= SYMLINK_MAX or b"\0" in node.target:
            tree.refuse(f"{member.name!r} is a symbolic link to what cannot be")
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        node.rdev = member.devmajor, member.devminor
        if not (0 <= member.devmajor <= MAJOR_MAX and 0 <= member.devminor <= MINOR_MAX):
            tree.refuse(f"{member.name!r} is a device that cannot be")
    elif kind == stat.S_IFREG and member.size and (content := archive.extractfile(member)):
        if member.size > tree.limits.size:  # before anything of that size is made
            tree.refuse(f"{member.name!r} alone is larger than {tree.limits.size} bytes")
        node.content = tree.keep(content)
    return node


def _mtime(member: tarfile.TarInfo) -> int:
    """Nanoseconds since 1970."""
    time = int(member.mtime) * _SECOND
    if written := _MTIME.fullmatch(member.pax_headers.get("mtime", "")):  # tarfile makes an inexact float of it
        sign, seconds, fraction = written.groups(default="")
        time = int(f"{sign}{seconds}{fraction[:9]:0<9}")
    return min(max(time, EARLIEST * _SECOND), LATEST * _SECOND)


def _xattrs(member: tarfile.TarInfo, tree: _Tree[Content]) -> dict[str, bytes]:
    named = {key.removeprefix(_XATTR): value for key, value in member.pax_headers.items() if key.startswith(_XATTR)}
    xattrs = {name: encoded(value) for name, value in named.items() if not name.startswith(_OVERLAYFS)}
    for name, value in xattrs.items():
        if len(encoded(name)) > NAME_MAX or "\0" in name or name.endswith(".") or len(value) >= _XATTR_SIZE:
            tree.refuse(f"{member.name!r} has an extended attribute that cannot be")
    return xattrs


def _parts(name: str, tree: _Tree[Content]) -> tuple[str, ...]:
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts or "\0" in name or len(name) >= _PATH_MAX:
        tree.refuse(f"the name {name[:200]!r} escapes its root or is none")
    if any(len(encoded(part)) > NAME_MAX for part in parts):
        tree.refuse(f"a part of the name {name[:200]!r} is longer than {NAME_MAX} bytes")
    return parts


class _Unpacked:
    """The decompressed bytes of a layer, counted against the limits."""

    def __init__(self, layer: BinaryIO, tree: _Tree[Content]) -> None:
        packed = Packed(layer)
        left = unpack.Limits(tree.limits.size - tree.size, tree.limits.ratio, _RATIO_FREE)
        self.content_end = 0
        """where the last known member's content ends"""
        self._count = 0
        self._tree = tree
        self._pieces = unpacked(packed, packed.told(_COMPRESSIONS), left, piece=_PIECE, members=True)
        self._ends = 0

    def read(self, _size: int) -> bytes:
        """The next piece, of any length: tarfile's stream mode keeps what it has not asked for."""
        try:
            data = next(self._pieces, b"")
        except BadStream as error:
            self._tree.refuse(_problem(error, self._tree.limits))
        self._tree.size += len(data)
        self._ends += not data
        data = data or self._missing_end()
        self._count += len(data)
        if self._ends > _ENDS_MAX:
            self._tree.refuse("it is truncated")
        return data

    def _missing_end(self) -> bytes:
        """The padding and the end that some tools leave out behind the last content.

        Go's archive/tar, by which most other tools read layers, does without them. The layer's digest guards its bytes.
        """
        end = -(-self.content_end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        behind_content = self.content_end <= self._count <= end and self._count > 0
        return bytes(end - self._count + 2 * tarfile.BLOCKSIZE) if behind_content else b""

    def drain(self) -> None:
        """Reads what follows the archive, so that the last checksum is seen to be right."""
        while self.read(_PIECE):
            pass


def _problem(error: BadStream, limits: Limits) -> str:
    if error.fault is Fault.SIZE:
        return f"the image unpacks to more than {limits.size} bytes"
    if error.fault is Fault.RATIO:
        return f"it unpacks to more than {limits.ratio} times its size"
    return f"its compressed data is damaged ({error})"
