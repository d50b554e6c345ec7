"""The structures of ext4 as bytes, all little-endian but the journal's; `foundation/ext4.py` says where they go.

Sources: Linux Documentation/filesystems/ext4/ (super, group_descr, inodes, ifork, directory, attributes, journal);
fs/ext4/xattr.h for the hashes of attributes, fs/ext4/acl.h and include/uapi/linux/posix_acl_xattr.h for access lists.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from systemfiles.foundation.diskimage import BLOCK, FILE_TYPES, Inode, Span, entries, refuse

GROUP = 32768  # blocks: as many as one block has bits
INODE_SIZE = 256
ROOT, JOURNAL, FIRST_FREE = 2, 8, 11
INLINE = 60
"""Bytes of an inode that may hold a link's target with its NUL, or the root of the extent tree."""
EXTENTS_INLINE, EXTENTS_PER_BLOCK = 4, 340
EXTENTS_FLAG = 0x80000

_COMPAT = 0x8 | 0x20  # ext_attr, dir_index
_HAS_JOURNAL = 0x4
_INCOMPAT = 0x2 | 0x40  # filetype, extents
_RO_COMPAT = 0x1 | 0x2 | 0x20 | 0x40  # sparse_super, large_file, dir_nlink, extra_isize
_EXTRA = 32  # bytes in use of an inode's second half
_ACLS = {"system.posix_acl_access": 2, "system.posix_acl_default": 3}
_PREFIXES = {"user.": 1, "trusted.": 4, "security.": 6}
_NAMED = (0x02, 0x08)  # the tags of an access list's entries that carry an id: user and group


# --- inodes ---


@dataclass(frozen=True, slots=True)
class Fork:
    """What an inode says of its data: `size` in bytes, what stands in its 60 bytes, and how many blocks it takes."""

    size: int
    place: bytes
    blocks: int = 0
    flags: int = 0
    attributes: int = 0


def inode(node: Inode[Span], links: int, fork: Fork) -> bytes:
    """An inode (inodes.rst, "Index Nodes"). All four times are the one there is."""
    seconds, nanoseconds = divmod(node.mtime, 1_000_000_000)
    time, extra = seconds & 0xFFFFFFFF, nanoseconds << 2 | (seconds + (1 << 31)) >> 32
    return struct.pack(
        "<HHIIIIIHHIII60sIIIIHHHHHHHHIIIIIII",
        node.mode,
        node.uid & 0xFFFF,
        fork.size & 0xFFFFFFFF,
        *(time, time, time, 0),
        node.gid & 0xFFFF,
        links,
        fork.blocks * (BLOCK // 512),
        fork.flags,
        0,
        fork.place,
        *(0, fork.attributes, fork.size >> 32, 0),
        *(0, 0, node.uid >> 16, node.gid >> 16, 0, 0),
        *(_EXTRA, 0, extra, extra, extra, time, extra),
        *(0, 0),
    )


def device(rdev: tuple[int, int]) -> bytes:
    """What stands in the inode of a device node: the old encoding of its number, or a zero and the new one."""
    major, minor = rdev
    if major < 256 and minor < 256:
        return struct.pack("<I", major << 8 | minor)
    return struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)


def extent(block: int, length: int, first: int) -> bytes:
    """`length` blocks of a file from its `block` on are those of the disk from `first` on."""
    return struct.pack("<IHHI", block, length, 0, first)


def extent_index(leaf: bytes, place: int) -> bytes:
    """Where the node is that begins with the extent `leaf`."""
    return leaf[:4] + struct.pack("<IHH", place, 0, 0)


def extent_node(children: Sequence[bytes], most: int, *, depth: int) -> bytes:
    """A node of an extent tree (ifork.rst, "Extent Tree")."""
    return struct.pack("<HHHHI", 0xF30A, len(children), most, depth, 0) + b"".join(children)


# --- directories ---


def directory(node: Inode[Span], parent: Inode[Span], number: Callable[[Inode[Span]], int]) -> Iterator[bytes]:
    """The blocks of a directory (directory.rst, "Linear (Classic) Directories")."""
    block, last = bytearray(), 0
    for name, child in ((b".", node), (b"..", parent), *entries(node)):
        length = 8 + len(name) + -len(name) % 4
        if len(block) + length > BLOCK:
            yield _ended(block, last)
            block, last = bytearray(), 0
        last = len(block)
        block += struct.pack("<IHBB", number(child), length, len(name), FILE_TYPES[child.type]) + name
        block += bytes(-len(name) % 4)
    yield _ended(block, last)


def _ended(block: bytearray, last: int) -> bytes:
    """A block of a directory, filled up by the entry that begins at `last`."""
    struct.pack_into("<H", block, last + 4, BLOCK - last)
    return bytes(block).ljust(BLOCK, b"\0")


# --- extended attributes ---


def attributes(xattrs: dict[str, bytes]) -> bytes:
    """The block that holds these attributes (attributes.rst); nothing when there are none that ext4 knows.

    Raises InvalidArchive when they do not fit.
    """
    known = sorted(filter(None, (_attribute(name, value) for name, value in xattrs.items())), key=_order)
    if not known:
        return b""
    taken = sum(_padded(16 + len(name)) + _padded(len(value)) for _, name, value in known)
    if taken > BLOCK - 32 - 4:
        refuse("the image", f"a file has {taken} bytes of extended attributes, more than ext4 can hold")
    heads, values, hashes = b"", b"", 0
    for index, name, value in known:
        values = value + bytes(-len(value) % 4) + values
        place = BLOCK - len(values) if value else 0
        hashed = _hash(name, value + bytes(-len(value) % 4))
        hashes = _rotated(hashes, 16) ^ hashed
        heads += struct.pack("<BBHIII", len(name), index, place, 0, len(value), hashed) + name + bytes(-len(name) % 4)
    head = struct.pack("<5I12x", 0xEA020000, 1, 1, hashes, 0) + heads
    return head + bytes(BLOCK - len(head) - len(values)) + values


def _padded(size: int) -> int:
    return size + -size % 4


def _attribute(name: str, value: bytes) -> tuple[int, bytes, bytes] | None:
    if name in _ACLS:
        return _ACLS[name], b"", _access_list(value)
    for prefix, index in _PREFIXES.items():
        if name.startswith(prefix):
            return index, name.removeprefix(prefix).encode("utf-8", "surrogateescape"), value
    return None


def _order(attribute: tuple[int, bytes, bytes]) -> tuple[int, int, bytes]:
    index, name, _ = attribute
    return index, len(name), name


def _hash(name: bytes, value: bytes) -> int:
    hashed = 0
    for byte in name:
        hashed = _rotated(hashed, 5) ^ byte
    for (word,) in struct.iter_unpack("<I", value):
        hashed = _rotated(hashed, 16) ^ word
    return hashed


def _rotated(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) & 0xFFFFFFFF


def _access_list(value: bytes) -> bytes:
    """An access list as ext4 keeps it: without the ids that mean nothing."""
    if len(value) % 8 != 4 or value[:4] != b"\2\0\0\0":
        refuse("the image", "an access control list in it is none")
    kept = struct.pack("<I", 1)
    for tag, permissions, who in struct.iter_unpack("<HHI", value[4:]):
        kept += struct.pack("<HH", tag, permissions) + (struct.pack("<I", who) if tag in _NAMED else b"")
    return kept


# --- the disk as a whole ---


@dataclass(frozen=True, slots=True)
class Group:
    """A group's descriptor (group_descr.rst): three places, and what is left or in use."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_blocks: int
    free_inodes: int
    directories: int

    def packed(self) -> bytes:
        counts = (self.free_blocks, self.free_inodes, self.directories)
        return struct.pack("<3I3H14x", self.block_bitmap, self.inode_bitmap, self.inode_table, *counts)


def bitmap(used: int, size: int) -> bytes:
    """A block whose first `used` bits are set, and those from `size` on, which stand for nothing."""
    bits = (1 << used) - 1 | ((1 << BLOCK * 8) - 1) >> size << size
    return bits.to_bytes(BLOCK, "little")


def super_block(
    group: int,
    *,
    blocks: int,
    inodes: int,
    inodes_per_group: int,
    free_blocks: int,
    free_inodes: int,
    label: bytes,
    unique: bytes,
    journal: bytes = b"",
) -> bytes:
    """The super block (super.rst) as it stands in `group`.

    `unique` are 32 bytes for the UUID and the seed of the directories' hashes. `journal` is the copy of what stands in
    the journal's inode: its 60 bytes and its size, high word first.
    """
    compat = _COMPAT | (_HAS_JOURNAL if journal else 0)
    counts = (inodes, blocks, 0, free_blocks, free_inodes, 0)
    geometry = (2, 2, GROUP, GROUP, inodes_per_group)
    data = struct.pack("<6I5I", *counts, *geometry)
    data += struct.pack("<2IHHHHHHIIIIHH", 0, 0, 0, 0xFFFF, 0xEF53, 1, 1, 0, 0, 0, 0, 1, 0, 0)
    data += struct.pack("<IHHIII", FIRST_FREE, INODE_SIZE, group, compat, _INCOMPAT, _RO_COMPAT)
    data += struct.pack("<16s16s64x", unique[:16], label)
    data += struct.pack("<IBBH", 0, 0, 0, 0)
    data += struct.pack("<16x3I16s", JOURNAL if journal else 0, 0, 0, unique[16:32])
    # half-md4 hashes; user_xattr and acl are the default when it is mounted
    data += struct.pack("<BBHIII68s", 1, 1 if journal else 0, 0, 0xC, 0, 0, journal)
    data += struct.pack("<3IHHI", 0, 0, 0, _EXTRA, _EXTRA, 1)  # of the hashes' two forms that of signed characters
    return data.ljust(1024, b"\0")


def journal_super_block(blocks: int) -> bytes:
    """An empty journal's own, big-endian super block (journal.rst)."""
    return struct.pack(">9I28xI", 0xC03B3998, 4, 0, BLOCK, blocks, 1, 1, 0, 0, 1)
