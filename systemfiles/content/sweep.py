"""Which blobs of the content store anything still needs, and the removal of the others.

Needed is what index.json reaches, whoever wrote the entry; what somebody is about to rely on; and what the caller says.
A manifest that is damaged does not tell what it needs, so then nothing is removed at all. What has another name than a
blob's is left alone: other tools write there, too. Times are whole seconds, as everywhere in a collection.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from systemfiles.content.index import MANAGED
from systemfiles.content.layout import Layout
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import StoreError
from systemfiles.foundation.files import fsync_path, storing

log = logging.getLogger(__name__)

_BATCH = 200
_HEX = re.compile(r"[0-9a-f]{64}")


class Removed(NamedTuple):
    """A blob that went. `freed` is what the disk got back: nothing while another name has the bytes."""

    digest: Digest
    freed: int


def reached(layout: Layout, *, without: Collection[str] = ()) -> set[str]:
    """The digests, in hex, of all that index.json reaches, perhaps `without` entries of ours that have these names.

    Raises StoreError or IntegrityError when that cannot be told.
    """
    if index_is_lost(layout):
        msg = f"{layout.root} has blobs and no index.json, so it cannot be told what other tools need"
        raise StoreError(msg, hint="restore it from a backup; doit makes one without the names that other tools gave")
    return {
        part.digest.hex
        for name, target in layout.entries()
        if name not in without or MANAGED not in target.annotations
        for part in layout.reachable(target, strict=True)
    }


def index_is_lost(layout: Layout) -> bool:
    """Whether there are blobs, and nothing that names them."""
    return "index.json" in layout.missing() and any(True for _ in blobs(layout))


def size_of(layout: Layout) -> int:
    """The bytes of all blobs."""
    return sum(found.st_size for _, found in blobs(layout))


def blobs(layout: Layout) -> Iterator[tuple[Path, os.stat_result]]:
    """Every blob that is here, by name. Raises StoreError."""
    directory = layout.root / "blobs" / "sha256"
    try:
        there = sorted(path for path in directory.iterdir() if _HEX.fullmatch(path.name))
    except FileNotFoundError:
        return
    except OSError as error:
        msg = f"{directory} cannot be listed ({error.strerror})"
        raise StoreError(msg) from error
    for path in there:
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISREG(found.st_mode):
            yield path, found


def orphans(layout: Layout, *, older_than: float, needed: set[str]) -> Iterator[tuple[Path, os.stat_result]]:
    """The blobs that were written at `older_than` (seconds since 1970) or before, and that nothing needs."""
    for path, found in blobs(layout):
        if path.name not in needed and int(found.st_mtime) <= older_than:
            yield path, found


def sweep(layout: Layout, *, older_than: float, also_needed: Callable[[], Iterable[str]]) -> Iterator[Removed]:
    """Removes such blobs, in short turns under the content store's lock; `also_needed` is asked in each of them."""
    needed = reached(layout) | {*also_needed()}
    found = [path for path, _ in orphans(layout, older_than=older_than, needed=needed)]
    for start in range(0, len(found), _BATCH):
        with layout.exclusively(behind=True):
            needed = reached(layout) | layout.ingested() | {*also_needed()}
            turn = [path for path in found[start : start + _BATCH] if path.name not in needed]
            removed = [*_remove(turn, older_than)]
            if removed:
                with storing(turn[0].parent):
                    fsync_path(turn[0].parent)
        yield from removed


def _remove(paths: Iterable[Path], older_than: float) -> Iterator[Removed]:
    for path in paths:
        with storing(path):
            try:
                facts = path.lstat()
                if int(facts.st_mtime) > older_than:
                    continue  # somebody wrote it anew
                path.unlink()
            except FileNotFoundError:
                continue
        log.info("blob %s is needed by nothing: removed", path.name)
        yield Removed(Digest.from_hex(path.name), facts.st_blocks * 512 if facts.st_nlink == 1 else 0)
