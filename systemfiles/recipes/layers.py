"""OCI image layers merged into cpio records in memory, for the small images that initrds are made of.

What a layer is and does is told in recipes/imagetree.py. Not taken over: modification times, extended attributes, and
device nodes and FIFOs. They belong to the machine an image was made on; a guest has its own.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from typing import IO, BinaryIO

from systemfiles.foundation import cpio
from systemfiles.foundation.diskimage import Inode
from systemfiles.foundation.errors import InvalidArchive
from systemfiles.recipes.imagetree import Limits, merge

__all__ = ["Limits", "apply_layers"]


def apply_layers(layers: Sequence[BinaryIO], *, limits: Limits | None = None) -> tuple[cpio.Record, ...]:
    """The tree that `layers` make, lowest first, as normalised records with their content in memory.

    Modes (setuid bits too) and numeric owners are the image's. Raises as `imagetree.merge`, and InvalidArchive for what
    a cpio archive cannot hold.
    """
    return cpio.normalise(_records(merge(layers, _in_memory, limits=limits)))


def _in_memory(content: IO[bytes]) -> bytes:
    return content.read()


def _records(root: Inode[bytes]) -> Iterator[cpio.Record]:
    """Every name in the tree but device nodes and FIFOs."""
    names: dict[Inode[bytes], str] = {}
    todo = [("", root)]
    while todo:
        prefix, parent = todo.pop()
        for part, node in sorted(parent.children.items()):
            name = prefix + part
            if len(name) >= cpio.PATH_MAX:  # links may nest deeper than any single name says
                subject = f"{name[:40]}…"
                raise InvalidArchive(subject, f"a name is longer than {cpio.PATH_MAX - 1} bytes")
            if node.is_dir:
                todo.append((f"{name}/", node))
            elif node.type not in (stat.S_IFREG, stat.S_IFLNK):
                continue
            if (first := names.setdefault(node, name)) != name:
                yield cpio.hardlink(name, first)
            else:
                yield cpio.Record(name, node.mode, node.content or node.target, uid=node.uid, gid=node.gid)
