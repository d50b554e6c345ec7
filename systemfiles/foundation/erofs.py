"""EROFS, uncompressed, written from a tree of inodes without mounting anything: the same bytes for the same tree.

::

    0      nothing (room for a boot sector)
    1024   super block, 128 bytes
    1152   inodes, each at a multiple of 32 bytes: 64 bytes, its extended attributes, and the last, incomplete block of
           its data, all within one block of 4096 bytes where they can be
    ...    the complete blocks of data, each file's in one run

A directory is a file too: each of its blocks has 12 bytes for each name, and then the names, sorted throughout.

Sources: Linux Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h. Readable by every kernel since 5.4.
"""

from __future__ import annotations

import hashlib
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from systemfiles.foundation.diskimage import BLOCK, FILE_TYPES, Image, Inode, Inventory, Span, encoded, entries, refuse
from systemfiles.foundation.errors import UsageError

_START = 1024 + 128
_SLOT = 32  # bytes: an inode is known by its place, counted in these
_INODE = 64
_MTIME = 0x2  # a compatible feature: the one time of an inode is that of its modification
_PLAIN, _INLINE = 0, 2
_EXTENDED = 1
_NAME = 12
_NONE = 0xFFFFFFFF
_XATTRS_HEAD = 12
_XATTRS_MAX = 0xFFFF
_PREFIXES = {
    "system.posix_acl_access": 2,
    "system.posix_acl_default": 3,
    "user.": 1,
    "trusted.": 4,
    "security.": 6,
}


def write_erofs(image: Image, root: Inode[Span], contents: BinaryIO, *, label: str, size: int | None = None) -> None:
    """Writes the tree below `root`, whose files' bytes are in `contents`, to an image that is empty.

    `label` has at most 16 bytes; the UUID is made from it. `size` in bytes is as small as can be by default, else zeros
    fill it. Raises UsageError when `size` is too small, InvalidArchive for a tree that EROFS cannot hold, NoSpace,
    StoreError.
    """
    inventory = Inventory.of(root)
    places, end = _places(inventory)
    if size is not None and size < end * BLOCK:
        msg = f"a disk of {size} bytes is too small for what should be on it"
        raise UsageError(msg, hint=f"{end * BLOCK} bytes would do")
    image.resize(size or end * BLOCK)
    image.write(1024, _super_block(places[root].start // _SLOT, len(places), end, label.encode()))
    for number, (inode, place) in enumerate(places.items(), 1):
        image.write(place.start, _inode(inode, place, number, inventory.links[inode]) + _attributes(inode.xattrs))
        if inode.content:
            _copy(image, contents, inode.content, place)
            continue
        blocks = [inode.target]
        if inode.is_dir:
            blocks = [*_directory(inode, inventory.parents[inode], places)]
        data = b"".join(block.ljust(BLOCK, b"\0") for block in blocks[:-1]) + blocks[-1]
        whole = place.blocks * BLOCK
        image.write(place.data * BLOCK, data[:whole])
        image.write(place.tail, data[whole:])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an inode is, and its data: `size` bytes, so many `blocks` of them from block `data`, the rest at `tail`."""

    start: int
    size: int
    data: int
    blocks: int
    tail: int

    @property
    def inline(self) -> bool:
        return self.size > self.blocks * BLOCK


def _places(inventory: Inventory[Span]) -> tuple[dict[Inode[Span], _Place], int]:
    """Where everything goes, and the number of blocks it takes."""
    starts: dict[Inode[Span], tuple[int, int, int]] = {}
    end = _START
    for inode in inventory.links:
        size = _size(inode)
        head = _INODE + len(_attributes(inode.xattrs))
        tail = size % BLOCK
        if head + tail > BLOCK:
            tail = 0  # it gets a block of its own
        if end % BLOCK + head + tail > BLOCK:
            end = -(-end // BLOCK) * BLOCK
        starts[inode] = (end, size, tail)
        end += -(-(head + tail) // _SLOT) * _SLOT
    block = -(-(end + _XATTRS_HEAD) // BLOCK)  # fsck.erofs reads as much behind each inode, the last one too
    places = {}
    for inode, (start, size, tail) in starts.items():
        blocks = -(-(size - tail) // BLOCK)
        head = _INODE + len(_attributes(inode.xattrs))
        places[inode] = _Place(start, size, block, blocks, start + head)
        block += blocks
    if block > _NONE:
        refuse("the image", "it takes more than the 16 TiB that EROFS can hold")
    return places, block


def _size(inode: Inode[Span]) -> int:
    if inode.is_dir:
        sizes = [_NAME * len(block) + sum(len(name) for name, _ in block) for block in _blocks_of_names(inode, inode)]
        return (len(sizes) - 1) * BLOCK + sizes[-1]
    return inode.content.size if inode.content else len(inode.target)


def _copy(image: Image, contents: BinaryIO, content: Span, place: _Place) -> None:
    whole = min(place.blocks * BLOCK, content.size)
    image.copy(place.data * BLOCK, contents, Span(content.start, whole))
    image.copy(place.tail, contents, Span(content.start + whole, content.size - whole))


# --- structures ---


def _super_block(root: int, inodes: int, blocks: int, label: bytes) -> bytes:
    uuid = hashlib.sha256(label).digest()[:16]
    head = struct.pack("<IIIBBHQQIIII", 0xE0F5E1E2, 0, _MTIME, 12, 0, root, inodes, 0, 0, blocks, 0, 0)
    return (head + struct.pack("<16s16s", uuid, label)).ljust(128, b"\0")


def _inode(inode: Inode[Span], place: _Place, number: int, links: int) -> bytes:
    """An inode in its extended form."""
    attributes = len(_attributes(inode.xattrs))
    what = place.data if place.blocks else _NONE
    if inode.type in (stat.S_IFCHR, stat.S_IFBLK):
        major, minor = inode.rdev
        what = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
    seconds, nanoseconds = divmod(inode.mtime, 1_000_000_000)
    return struct.pack(
        "<HHHHQIIIIqII16x",
        _EXTENDED | (_INLINE if place.inline else _PLAIN) << 1,
        (attributes - _XATTRS_HEAD) // 4 + 1 if attributes else 0,
        inode.mode,
        0,
        place.size,
        what,
        number,
        inode.uid,
        inode.gid,
        seconds,
        nanoseconds,
        links,
    )


def _attributes(xattrs: dict[str, bytes]) -> bytes:
    """Extended attributes as they follow an inode; nothing when there are none that EROFS knows."""
    packed = b""
    for name, value in sorted(xattrs.items()):
        for prefix, index in _PREFIXES.items():
            if name.startswith(prefix):
                suffix = encoded(name.removeprefix(prefix))
                if len(suffix) > 255 or len(value) > _XATTRS_MAX:
                    refuse("the image", "an extended attribute of a file is larger than EROFS can hold")
                packed += struct.pack("<BBH", len(suffix), index, len(value)) + suffix + value
                packed += bytes(-len(packed) % 4)
    if len(packed) // 4 >= _XATTRS_MAX:
        refuse("the image", "a file has more extended attributes than EROFS can hold")
    return bytes(_XATTRS_HEAD) + packed if packed else b""


def _blocks_of_names(inode: Inode[Span], parent: Inode[Span]) -> Iterator[list[tuple[bytes, Inode[Span]]]]:
    block: list[tuple[bytes, Inode[Span]]] = []
    size = 0
    for name, child in sorted([(b".", inode), (b"..", parent), *entries(inode)], key=lambda entry: entry[0]):
        if size + _NAME + len(name) > BLOCK:
            yield block
            block, size = [], 0
        block.append((name, child))
        size += _NAME + len(name)
    yield block


def _directory(inode: Inode[Span], parent: Inode[Span], places: dict[Inode[Span], _Place]) -> Iterator[bytes]:
    for block in _blocks_of_names(inode, parent):
        heads, names = b"", b""
        for name, child in block:
            start = _NAME * len(block) + len(names)
            heads += struct.pack("<QHBB", places[child].start // _SLOT, start, FILE_TYPES[child.type], 0)
            names += name
        yield heads + names
