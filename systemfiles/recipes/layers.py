"""OCI image layers merged into one tree of cpio records, in memory: nothing here touches the host's file system.

A layer is a tar archive, plain or compressed with gzip or zstd, that changes the tree of the layers below it::

    usr/bin/x        is added, or replaces whatever was there (a directory over a directory keeps what is in it)
    usr/bin/.wh.y    removes usr/bin/y of the layers below, never an entry of its own layer
    etc/.wh..wh..opq empties etc as the layers below left it

Source: OCI image-spec, layer.md. Where it is silent we do as containerd does: a parent directory that is a symbolic
link is followed inside the image's root (`bin -> usr/bin` below, `bin/x` above gives usr/bin/x), the last part of a
name never is, missing parents are made, and a leading "/" or "./" means nothing. A name with ".." is refused.

Not taken over: modification times, and device nodes and FIFOs. They belong to the machine an image was made on; a
guest has its own.
"""

from __future__ import annotations

import stat
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NoReturn

from systemfiles.foundation import cpio, unpack
from systemfiles.foundation.archive import BadStream, Fault
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
_ENDS_MAX = 8  # how often one may read at the end; with a bad sparse map tarfile would read there for ever


@dataclass(frozen=True, slots=True)
class Limits:
    """What an image may cost: entries, decompressed bytes (both of all layers), and the ratio of any one layer's
    decompressed to compressed bytes, which counts after the first 16 MiB."""

    entries: int = 100_000
    size: int = 512 << 20
    ratio: int = 200


def apply_layers(layers: Sequence[BinaryIO], *, limits: Limits | None = None) -> tuple[cpio.Record, ...]:
    """The tree that `layers` make, lowest first, as normalised records with their content in memory.

    Modes (setuid bits too) and numeric owners are the image's; hard links stay links, even to a lower layer's file.
    Of a name that is twice in one layer the last counts. Raises InvalidArchive for what is no layer, is damaged,
    would escape its root or exceeds `limits`; ToolMissing for a zstd layer on a host without libarchive.
    """
    tree = _Tree(limits or Limits())
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
    return cpio.normalise(tree.records())


@dataclass(slots=True, eq=False)
class _Node:
    """An inode: names that share one are hard links of each other."""

    mode: int
    uid: int = 0
    gid: int = 0
    data: bytes = b""
    children: dict[str, _Node] = field(default_factory=dict)

    @property
    def type(self) -> int:
        return stat.S_IFMT(self.mode)


@dataclass(frozen=True, slots=True)
class _Entry:
    parent: tuple[str, ...]
    name: str
    node: _Node | None  # None for a hard link and a whiteout
    link: tuple[str, ...] = ()

    @property
    def whiteout(self) -> bool:
        return self.name.startswith(_WHITEOUT)


class _Tree:
    """The merged image so far, and what may still be spent on it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.subject = "image"
        self.size = 0
        self._root = _Node(stat.S_IFDIR | 0o755)
        self._entries = 0
        self._steps = 0

    def refuse(self, problem: str) -> NoReturn:
        raise InvalidArchive(self.subject, problem)

    def count_entry(self) -> None:
        self._entries += 1
        if self._entries > self.limits.entries:
            self.refuse(f"the image has more than {self.limits.entries} entries")

    def remove(self, entry: _Entry) -> None:
        if not (parent := self._find(entry.parent)):
            return
        if entry.name == _OPAQUE:
            parent.children.clear()
        elif not entry.name.startswith(_AUFS):  # what AUFS kept for itself, in layers of old Docker versions
            parent.children.pop(entry.name.removeprefix(_WHITEOUT), None)

    def add(self, entry: _Entry) -> None:
        node = entry.node or self._linked(entry)
        siblings = self._make(entry.parent).children
        existing = siblings.get(entry.name)
        if existing and existing.type == node.type == stat.S_IFDIR:
            existing.mode, existing.uid, existing.gid = node.mode, node.uid, node.gid
        else:
            siblings[entry.name] = node

    def _linked(self, entry: _Entry) -> _Node:
        *parent, name = entry.link
        directory = self._find(parent)
        node = directory.children.get(name) if directory else None
        if node is None or node.type == stat.S_IFDIR:
            self.refuse(f"{entry.name!r} is a hard link to {'/'.join(entry.link)!r}, which is no file")
        return node

    def _find(self, path: Sequence[str]) -> _Node | None:
        return self._walk(path, create=False)

    def _make(self, path: Sequence[str]) -> _Node:
        found = self._walk(path, create=True)
        if found is None:
            self.refuse(f"{'/'.join(path)!r} leads through something that is no directory")
        return found

    def _walk(self, path: Sequence[str], *, create: bool) -> _Node | None:
        """The directory at `path`, every symbolic link followed inside the root. None if there is none."""
        trail = [self._root]
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
                node = trail[-1].children[name] = _Node(stat.S_IFDIR | 0o755)
            if node is None or node.type not in (stat.S_IFDIR, stat.S_IFLNK):
                return None
            if node.type == stat.S_IFDIR:
                trail.append(node)
                continue
            links += 1
            if links > _SYMLINKS_MAX:
                self.refuse(f"{'/'.join(path)!r} leads through too many symbolic links")
            target = node.data.decode("utf-8", "surrogateescape")
            if target.startswith("/"):
                trail = [self._root]
            todo.extendleft(reversed(target.split("/")))
        return trail[-1]

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _STEPS_MAX:
            self.refuse("its paths take too long to follow")

    def records(self) -> Iterator[cpio.Record]:
        """Every name in the tree but device nodes and FIFOs."""
        names: dict[_Node, str] = {}
        todo = [("", self._root)]
        while todo:
            prefix, parent = todo.pop()
            for part, node in sorted(parent.children.items()):
                name = prefix + part
                if len(name) >= _PATH_MAX:  # links may nest deeper than any single name says
                    self.refuse(f"a name is longer than {_PATH_MAX - 1} bytes")
                if node.type == stat.S_IFDIR:
                    todo.append((f"{name}/", node))
                elif node.type not in (stat.S_IFREG, stat.S_IFLNK):
                    continue
                if (first := names.setdefault(node, name)) != name:
                    yield cpio.hardlink(name, first)
                else:
                    yield cpio.Record(name, node.mode, node.data, uid=node.uid, gid=node.gid)


def _read(layer: BinaryIO, tree: _Tree) -> Iterator[_Entry]:
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
            if len(archive.pax_headers) > _GLOBALS_MAX or member.issparse() or member.size < 0:
                tree.refuse(f"{member.name!r} has a sparse map, a negative size or too many global headers")
            if entry := _entry(archive, member, tree):
                yield entry
            archive.members.clear()  # it would keep every header
        stream.drain()


def _entry(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: _Tree) -> _Entry | None:
    path = _parts(member.name, tree)
    if not path:
        return None  # the root itself
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


def _node(archive: tarfile.TarFile, member: tarfile.TarInfo, tree: _Tree) -> _Node:
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
    node = _Node(kind | member.mode & 0o7777, member.uid, member.gid)
    if kind == stat.S_IFLNK:
        node.data = member.linkname.encode("utf-8", "surrogateescape")
    elif kind == stat.S_IFREG and (content := archive.extractfile(member)):
        if member.size > tree.limits.size:  # before anything of that size is made
            tree.refuse(f"{member.name!r} alone is larger than {tree.limits.size} bytes")
        node.data = content.read()
    return node


def _parts(name: str, tree: _Tree) -> tuple[str, ...]:
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts or "\0" in name or len(name) >= _PATH_MAX:
        tree.refuse(f"the name {name[:200]!r} escapes its root or is none")
    return parts


class _Unpacked:
    """The decompressed bytes of a layer, counted against the limits."""

    def __init__(self, layer: BinaryIO, tree: _Tree) -> None:
        packed = Packed(layer)
        left = unpack.Limits(tree.limits.size - tree.size, tree.limits.ratio, _RATIO_FREE)
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
        if self._ends > _ENDS_MAX:
            self._tree.refuse("it is truncated")
        return data

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
