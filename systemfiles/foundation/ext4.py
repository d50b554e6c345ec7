"""ext4, written from a tree of inodes without mounting anything: the same bytes for the same tree, on any host.

The disk is cut into groups of 32768 blocks of 4096 bytes. Each is filled from its beginning, so that what is in use
is a prefix of it::

    [super block, group descriptors]     in groups 0, 1 and the powers of 3, 5 and 7; the others have none
    block bitmap, inode bitmap
    inode table                          256 bytes an inode
    data                                 directories, files, long link targets, extents, attributes, the journal

Directories are sorted lists of names; the kernel indexes those that it changes. A disk for reading only needs no
journal. There are no checksums of metadata, and a disk has at most 16 TiB.

Source: Linux Documentation/filesystems/ext4/ (blockgroup, super, bitmaps).
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from systemfiles.foundation import ext4structs as ext4
from systemfiles.foundation.diskimage import BLOCK, Image, Inode, Inventory, Span, refuse
from systemfiles.foundation.errors import UsageError
from systemfiles.foundation.ext4structs import EXTENTS_FLAG, EXTENTS_INLINE, EXTENTS_PER_BLOCK, GROUP, INLINE, Fork

LEAST_JOURNAL = 1024
"""Blocks, jbd2's JBD2_MIN_JOURNAL_BLOCKS."""

_INODES_PER_BLOCK = BLOCK // ext4.INODE_SIZE
_BLOCKS_PER_INODE = 2  # of those to spare
_MOST_BLOCKS = (1 << 32) - 1
_LINK_MAX = 65000
_LEAST_RUN = 28000  # blocks that any group has for data, and more
_DEVICES = (stat.S_IFCHR, stat.S_IFBLK)
_WITHOUT_DATA = (*_DEVICES, stat.S_IFIFO, stat.S_IFSOCK)

Run = tuple[int, int]
"""First block and number of blocks."""


def write_ext4(
    image: Image,
    root: Inode[Span],
    contents: BinaryIO,
    *,
    label: str,
    size: int | None = None,
    journal: int = 0,
) -> None:
    """Writes the tree below `root`, whose files' bytes are in `contents`, to an image that is empty.

    `label` has at most 16 bytes; the UUID and the seed of hashes are made from it. `size` in bytes is as small as can
    be by default, with nothing to spare; space to spare has an inode for each 8 KiB. There is a `journal` of so many
    blocks, at least LEAST_JOURNAL or none. Raises UsageError when `size` is too small or too large, InvalidArchive for
    a tree that ext4 cannot hold, NoSpace, StoreError.
    """
    inventory = Inventory.of(root)
    needed = sum(map(_most_blocks, inventory.links)) + journal + _leaves(journal)
    layout = _plan(needed, ext4.FIRST_FREE - 1 + len(inventory.links), size)
    image.resize(size or layout.blocks * BLOCK)
    writer = _Writer(image, contents, layout, inventory)
    writer.write_tree()
    copy = writer.write_journal(journal) if journal else b""
    writer.write_groups(label.encode(), copy)


# --- what everything takes ---


def _up(number: int, unit: int) -> int:
    return -(-number // unit)


def _most_blocks(inode: Inode[Span]) -> int:
    """How many blocks it takes at the most."""
    data = 0 if _place(inode) is not None else _up(_size(inode), BLOCK)
    return data + _leaves(data) + bool(ext4.attributes(inode.xattrs))


def _size(inode: Inode[Span]) -> int:
    if inode.is_dir:
        return sum(map(len, ext4.directory(inode, inode, lambda _: 0)))
    return inode.content.size if inode.content else len(inode.target)


def _place(inode: Inode[Span]) -> bytes | None:
    """What stands in an inode that has no blocks; None for one that may have some."""
    if inode.type in _WITHOUT_DATA:
        return ext4.device(inode.rdev) if inode.type in _DEVICES else b""
    return inode.target if inode.type == stat.S_IFLNK and len(inode.target) < INLINE else None


def _leaves(blocks: int) -> int:
    """How many blocks of extents so many blocks of data may need."""
    extents = blocks // _LEAST_RUN + 2
    return 0 if extents <= EXTENTS_INLINE else _up(extents, EXTENTS_PER_BLOCK)


# --- where everything is ---


@dataclass(frozen=True, slots=True)
class _Layout:
    blocks: int
    groups: int
    inodes: int  # in each group

    @classmethod
    def of(cls, blocks: int, inodes: int) -> _Layout:
        """At most `blocks`, and at least `inodes`, in as many groups as that makes."""
        if blocks > _MOST_BLOCKS:
            msg = "an ext4 disk of more than 16 TiB is not supported"
            raise UsageError(msg)
        groups = _up(blocks, GROUP) or 1
        layout = cls(blocks, groups, _up(_up(inodes, groups), _INODES_PER_BLOCK) * _INODES_PER_BLOCK)
        if groups > 1 and layout.size(groups - 1) <= layout.overhead(groups - 1):
            return cls.of((groups - 1) * GROUP, inodes)  # what is left over is too small for a group
        return layout

    def fits(self, needed: int) -> bool:
        return self.inodes <= GROUP and self.room >= needed

    @property
    def room(self) -> int:
        """Blocks for data."""
        return sum(self.size(group) - self.overhead(group) for group in range(self.groups))

    @property
    def descriptors(self) -> int:
        return _up(self.groups * 32, BLOCK)

    def head(self, group: int) -> int:
        """Blocks of the super block and the descriptors."""
        return 1 + self.descriptors if _has_super_block(group) else 0

    def overhead(self, group: int) -> int:
        """Blocks at a group's beginning that hold no data."""
        return self.head(group) + 2 + self.inodes // _INODES_PER_BLOCK

    def size(self, group: int) -> int:
        return min(GROUP, self.blocks - group * GROUP)

    def table(self, group: int) -> int:
        """The first block of the inode table; the two bitmaps are before it."""
        return group * GROUP + self.head(group) + 2


def _plan(needed: int, inodes: int, size: int | None) -> _Layout:
    """Room for `needed` blocks of data and for `inodes`, on `size` bytes or on as few as possible."""
    if size is not None:
        layout = _Layout.of(size // BLOCK, inodes)
        if not layout.fits(needed):
            msg = f"a disk of {size} bytes is too small for what should be on it"
            raise UsageError(msg, hint=f"{_plan(needed, inodes, None).blocks * BLOCK} bytes would do")
        spare = (layout.room - needed) // _BLOCKS_PER_INODE
        generous = _Layout.of(size // BLOCK, inodes + spare)
        return generous if generous.fits(needed) else layout
    groups = _up(needed, GROUP) or 1
    while not (layout := _Layout.of(groups * GROUP, inodes)).fits(needed):
        groups += 1
    least = (groups - 1) * GROUP + layout.overhead(groups - 1) + 1
    return replace(layout, blocks=max(layout.blocks - (layout.room - needed), least))


def _has_super_block(group: int) -> bool:
    if group <= 1:
        return True
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return False


class _Blocks:
    """Gives out blocks for data, from the disk's beginning to its end."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self._used = [layout.overhead(0)]

    def used(self, group: int) -> int:
        return self._used[group] if group < len(self._used) else self._layout.overhead(group)

    def take(self, count: int) -> list[Run]:
        """So many blocks, in as few runs as possible."""
        runs = []
        while count:
            group = len(self._used) - 1
            used = self._used[group]
            length = min(self._layout.size(group) - used, count)
            if length:
                runs.append((group * GROUP + used, length))
            self._used[group] += length
            count -= length
            if count:
                self._used.append(self._layout.overhead(group + 1))
        return runs


# --- what is written ---


class _Writer:
    def __init__(self, image: Image, contents: BinaryIO, layout: _Layout, inventory: Inventory[Span]) -> None:
        self._image = image
        self._contents = contents
        self._layout = layout
        self._inventory = inventory
        self._blocks = _Blocks(layout)
        self._last = ext4.FIRST_FREE - 1  # inode
        self._numbers: dict[Inode[Span], int] = {}
        self._directories = [0] * layout.groups
        for inode in inventory.links:
            self._number(inode)

    def _number(self, inode: Inode[Span]) -> None:
        first = not self._numbers
        self._last += not first
        self._numbers[inode] = number = ext4.ROOT if first else self._last
        self._directories[(number - 1) // self._layout.inodes] += inode.is_dir

    def write_tree(self) -> None:
        for inode, links in self._inventory.links.items():
            if links > _LINK_MAX and not inode.is_dir:
                refuse("the image", f"a file has {links} names, and ext4 allows {_LINK_MAX}")
            fork = self._fork(inode)
            if attributes := ext4.attributes(inode.xattrs):
                ((block, _),) = self._blocks.take(1)
                self._image.write(block * BLOCK, attributes)
                fork = replace(fork, attributes=block, blocks=fork.blocks + 1)
            # a directory with too many below it counts 1, which means that nobody counted (dir_nlink)
            self._write_inode(self._numbers[inode], inode, 1 if links > _LINK_MAX else links, fork)

    def _fork(self, inode: Inode[Span]) -> Fork:
        """Writes the data of an inode."""
        size, place = _size(inode), _place(inode)
        if place is not None:
            return Fork(size, place)
        runs = self._blocks.take(_up(size, BLOCK))
        if inode.content:
            self._copy(inode.content, runs)
        else:
            parent = self._inventory.parents.get(inode, inode)
            whole = ext4.directory(inode, parent, self._numbers.__getitem__) if inode.is_dir else [inode.target]
            self._write_blocks(runs, whole)
        return self._mapped(size, runs)

    def _copy(self, content: Span, runs: list[Run]) -> None:
        start, left = content.start, content.size
        for first, count in runs:
            length = min(count * BLOCK, left)
            self._image.copy(first * BLOCK, self._contents, Span(start, length))
            start, left = start + length, left - length

    def _write_blocks(self, runs: list[Run], blocks: Iterable[bytes]) -> None:
        for number, block in zip(_each(runs), blocks, strict=False):
            self._image.write(number * BLOCK, block)

    def _mapped(self, size: int, runs: list[Run]) -> Fork:
        """The extent tree for data of `size` bytes in these runs; writes what of it does not fit into an inode."""
        extents, block = [], 0
        for first, count in runs:
            extents.append(ext4.extent(block, count, first))
            block += count
        if len(extents) <= EXTENTS_INLINE:
            return Fork(size, ext4.extent_node(extents, EXTENTS_INLINE, depth=0), block, EXTENTS_FLAG)
        leaves = [extents[at : at + EXTENTS_PER_BLOCK] for at in range(0, len(extents), EXTENTS_PER_BLOCK)]
        if len(leaves) > EXTENTS_INLINE:
            refuse("the image", f"a file of {size} bytes is larger than is supported")
        places = self._blocks.take(len(leaves))
        self._write_blocks(places, [ext4.extent_node(leaf, EXTENTS_PER_BLOCK, depth=0) for leaf in leaves])
        index = [ext4.extent_index(leaf[0], place) for leaf, place in zip(leaves, _each(places), strict=True)]
        node = ext4.extent_node(index, EXTENTS_INLINE, depth=1)
        return Fork(size, node, block + len(leaves), EXTENTS_FLAG)

    def _write_inode(self, number: int, inode: Inode[Span], links: int, fork: Fork) -> None:
        group, index = divmod(number - 1, self._layout.inodes)
        start = self._layout.table(group) * BLOCK + index * ext4.INODE_SIZE
        self._image.write(start, ext4.inode(inode, links, fork))

    def write_journal(self, blocks: int) -> bytes:
        """An empty journal; returns the copy of its place that the super block keeps."""
        runs = self._blocks.take(blocks)
        self._write_blocks(runs, [ext4.journal_super_block(blocks)])
        fork = self._mapped(blocks * BLOCK, runs)
        self._write_inode(ext4.JOURNAL, Inode(stat.S_IFREG | 0o600), 1, fork)
        return fork.place.ljust(INLINE, b"\0") + bytes(4) + fork.size.to_bytes(4, "little")

    def write_groups(self, label: bytes, journal: bytes) -> None:
        """Bitmaps, descriptors and super blocks."""
        layout = self._layout
        groups = [self._group(number) for number in range(layout.groups)]
        for number, group in enumerate(groups):
            self._image.write(group.block_bitmap * BLOCK, ext4.bitmap(self._blocks.used(number), layout.size(number)))
            used = layout.inodes - group.free_inodes
            self._image.write(group.inode_bitmap * BLOCK, ext4.bitmap(used, layout.inodes))
        table = b"".join(group.packed() for group in groups)
        for number in filter(_has_super_block, range(layout.groups)):
            start = number * GROUP * BLOCK
            head = ext4.super_block(
                number,
                blocks=layout.blocks,
                inodes=layout.groups * layout.inodes,
                inodes_per_group=layout.inodes,
                free_blocks=sum(group.free_blocks for group in groups),
                free_inodes=sum(group.free_inodes for group in groups),
                label=label,
                unique=hashlib.sha256(label).digest(),
                journal=journal,
            )
            self._image.write(start + (0 if number else 1024), head)
            self._image.write(start + BLOCK, table)

    def _group(self, number: int) -> ext4.Group:
        layout = self._layout
        table = layout.table(number)
        used = min(max(self._last - number * layout.inodes, 0), layout.inodes)
        free = layout.size(number) - self._blocks.used(number)
        return ext4.Group(table - 2, table - 1, table, free, layout.inodes - used, self._directories[number])


def _each(runs: list[Run]) -> Iterator[int]:
    for first, count in runs:
        yield from range(first, first + count)
