"""Which blobs of the content store anything still needs, and the removal of the others.

Needed is what index.json reaches, whoever wrote the entry; what somebody is about to rely on; and what the caller says.
A manifest that is damaged does not tell what it needs, so then nothing is removed at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from systemfiles.content.layout import MANAGED, Layout
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.files import fsync_path, storing

log = logging.getLogger(__name__)

_BATCH = 200


class Removed(NamedTuple):
    """A blob that went. `freed` is what the disk got back: nothing while another name has the bytes."""

    digest: Digest
    freed: int


def reached(layout: Layout, *, without: Collection[str] = ()) -> set[str]:
    """The digests, in hex, of all that index.json reaches, perhaps `without` entries of ours that have these names.

    Raises StoreError or IntegrityError when that cannot be told.
    """
    return {
        part.digest.hex
        for name, target in layout.entries()
        if name not in without or MANAGED not in target.annotations
        for part in layout.reachable(target, strict=True)
    }


def size_of(layout: Layout) -> int:
    """The bytes of all blobs."""
    return sum(path.lstat().st_size for path in _blobs(layout))


def orphans(layout: Layout, *, older_than: float, needed: set[str]) -> Iterator[Path]:
    """The blobs that were written before `older_than` (seconds since 1970) and that nothing needs."""
    for path in _blobs(layout):
        if path.name not in needed and path.lstat().st_mtime <= older_than:
            yield path


def sweep(layout: Layout, *, older_than: float, also_needed: Callable[[], Iterable[str]]) -> Iterator[Removed]:
    """Removes such blobs, in short turns under the content store's lock; `also_needed` is asked in each of them."""
    found = [*orphans(layout, older_than=older_than, needed=reached(layout) | {*also_needed()})]
    for start in range(0, len(found), _BATCH):
        with layout.exclusively():
            needed = reached(layout) | layout.ingested() | {*also_needed()}
            removed = [*_remove(path for path in found[start : start + _BATCH] if path.name not in needed)]
        yield from removed


def _blobs(layout: Layout) -> list[Path]:
    return sorted((layout.root / "blobs" / "sha256").glob("*"))


def _remove(paths: Iterable[Path]) -> Iterator[Removed]:
    for path in paths:
        with storing(path):
            try:
                facts = path.lstat()
                path.unlink()
            except FileNotFoundError:
                continue
            fsync_path(path.parent)
        log.info("blob %s is needed by nothing: removed", path.name)
        yield Removed(Digest.from_hex(path.name), facts.st_blocks * 512 if facts.st_nlink == 1 else 0)
