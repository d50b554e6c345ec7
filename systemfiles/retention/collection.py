"""Collection of artifacts and other assets: what nothing holds goes, in an order that any crash leaves right.

1. Rows become tombstones, in batches, each in a transaction that finds no live lease.
2. For each tombstone, under the artifact's lock and the content store's: the pins, the names that other tools gave in
   index.json, and the row are looked for once more; then our name in index.json and the directory go.
3. The audit log is told, and the tombstone dropped.

A crash leaves tombstones, with which the next collection begins. The blobs are the business of eviction.py.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from systemfiles.content.artifacts import RECORD
from systemfiles.content.store import Store, layout_name
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import IntegrityError, LockTimeout, NotProvisioned, UnsupportedArch
from systemfiles.foundation.files import fsync_path, scratch_dir, storing
from systemfiles.foundation.lock import locked
from systemfiles.foundation.paths import KINDS, Paths, is_version
from systemfiles.foundation.units import utc
from systemfiles.registry.database import marks
from systemfiles.registry.registry import Registry
from systemfiles.registry.tombstones import BATCH, Tombstone
from systemfiles.retention.pins import Pins
from systemfiles.retention.reasons import id_of, id_of_file, named_by_others
from systemfiles.retention.registrar import Registrar

log = logging.getLogger(__name__)

Key = tuple[str, str, Arch]


class Gone(NamedTuple):
    """Something that went, or would go: what it is, why, who last held it ("": nobody known), the bytes it takes."""

    what: str
    why: str
    last_held_by: str
    size: int


class Collector:
    """Removes the artifacts and assets of one data directory that nothing holds."""

    def __init__(self, paths: Paths, registry: Registry, registrar: Registrar, store: Store, pins: Pins) -> None:
        self._paths = paths
        self._registry = registry
        self._registrar = registrar
        self._store = store
        self._pins = pins
        self._seen: dict[str, object] = {}  # the records of artifacts as they were when it was decided

    def collect(self, kept: Collection[str], *, young: int) -> Iterator[Gone]:
        """Removes what has an id that is not in `kept`, no live lease, and no use after `young` (UTC seconds)."""
        self._seen = {id_of(artifact): _identity(artifact.directory) for artifact in self._registrar.artifacts()}
        pending = self._registry.tombstones.pending()
        yield from self._carry_out([stone for stone in pending if stone.asset_id not in kept])
        self._drop([stone for stone in pending if stone.asset_id in kept])
        self._registrar.sync()
        yield from self._condemn([asset for asset in self._seen if asset not in kept], young)
        for batch in self._registry.tombstones.candidates(now=self._registry.now(), unused_since=young):
            yield from self._condemn([each.id for each in batch if _artifact_at(each.path) is None], young)

    def delete(self, asset: str, *, force: bool = False) -> Iterator[Gone]:
        """Removes one asset now; with `force` whatever leases it has. Raises AssetInUse."""
        yield from self._carry_out(self._registry.tombstones.delete(asset, now=self._registry.clock(), force=force))

    def _condemn(self, ids: list[str], young: int) -> Iterator[Gone]:
        for start in range(0, len(ids), BATCH):
            stones = self._registry.tombstones.condemn(
                ids[start : start + BATCH], reason="held by nothing", now=self._registry.clock(), unused_since=young
            )
            yield from self._carry_out(stones)

    def _carry_out(self, stones: Iterable[Tombstone]) -> Iterator[Gone]:
        for start in range(0, len(every := [*stones]), BATCH):
            batch = every[start : start + BATCH]
            done = [*self._bury_assets([stone for stone in batch if _artifact_at(stone.path) is None])]
            for stone in batch:
                if artifact := _artifact_at(stone.path):
                    done += self._bury_artifact(stone, *artifact)
            gone = [
                Gone(stone.asset_id, stone.reason, stone.last_held_by, size) for stone, size in done if size is not None
            ]
            tell(self._paths, gone, now=self._registry.clock())
            self._drop([stone for stone, _ in done])
            yield from gone

    def _drop(self, stones: list[Tombstone]) -> None:
        for start in range(0, len(stones), BATCH):
            self._registry.tombstones.drop([stone.id for stone in stones[start : start + BATCH]])

    def _bury_assets(self, stones: list[Tombstone]) -> Iterator[tuple[Tombstone, int | None]]:
        """Removes their files, if they have no row again; yields what the disk got back of each."""
        if not stones:
            return
        directories = set()
        with self._store.layout.exclusively():
            back = self._with_rows([stone.asset_id for stone in stones])
            for stone in stones:
                path = self._paths.inside(stone.path)
                yield stone, None if stone.asset_id in back else _unlink(path)
                directories.add(path.parent)
            for directory in sorted(directories):
                if directory.is_dir():
                    fsync_path(directory)

    def _bury_artifact(
        self, stone: Tombstone, kind: str, version: str, arch: Arch
    ) -> Iterator[tuple[Tombstone, int | None]]:
        lock = self._paths.lock(f"{kind}-{version}-{arch}")
        try:
            with locked(lock, timeout=0), self._store.layout.exclusively():
                if why := self._held_again(stone, kind, version, arch):
                    log.info("%s stays: %s", stone.asset_id, why)
                    yield stone, None
                    return
                self._store.layout.unname(layout_name(kind, version, arch))
                yield stone, self._remove_directory(self._paths.artifact(kind, version, arch))
        except LockTimeout:
            log.info("%s is being worked on: it goes next time", stone.asset_id)

    def _held_again(self, stone: Tombstone, kind: str, version: str, arch: Arch) -> str:
        """Why an artifact that was condemned must stay all the same; "" if nothing came between."""
        if stone.asset_id in self._with_rows([stone.asset_id]):
            return "somebody has begun to use it"
        for pin in self._pins:
            if any(id_of_file(file) == stone.asset_id for file in pin.files):
                return f"pinned by {pin.name}"
        try:
            artifact = self._store.artifacts.load(kind, version, arch)
        except (NotProvisioned, IntegrityError):
            return ""
        if self._seen.get(stone.asset_id, now := _identity(artifact.directory)) != now:
            return "it was made anew"
        named = named_by_others(self._store.layout)
        return next((f"named {named[facts.sha256]}" for facts in artifact.files.values() if facts.sha256 in named), "")

    def _with_rows(self, ids: list[str]) -> set[str]:
        with self._registry.database.reading() as transaction:
            rows = transaction.rows(
                f"SELECT asset_id FROM asset_locations WHERE store_id = ? AND asset_id IN ({marks(ids)})",
                (self._registry.store_id, *ids),
            )
        return {row[0] for row in rows}

    def _remove_directory(self, directory: Path) -> int:
        """Takes an artifact away as a whole; returns what the disk got back: files that are blobs too go with those."""
        if not directory.exists():
            return 0
        with scratch_dir(self._paths.tmp) as work, storing(directory):
            aside = work / "artifact"
            directory.rename(aside)
            fsync_path(directory.parent)
            freed = sum(_on_disk(path) for path in aside.iterdir())
            shutil.rmtree(aside)
        try:
            directory.parent.rmdir()
        except OSError:
            return freed  # another architecture's is there
        fsync_path(directory.parent.parent)
        return freed


def tell(paths: Paths, gone: Collection[Gone], *, now: float) -> None:
    """Adds lines to the audit log, durably: what went, when, why, and who last held it."""
    if not gone:
        return
    at = utc(now)
    lines = "".join(json.dumps({"at": at, **each._asdict()}) + "\n" for each in gone)
    with storing(paths.collected):
        mode = 0o660 if paths.data_dir.stat().st_mode & 0o020 else 0o640
        fd = os.open(paths.collected, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            os.write(fd, lines.encode())
            os.fsync(fd)
        finally:
            os.close(fd)


def _artifact_at(path: str) -> Key | None:
    """Which artifact a path in the registry is the directory of; None for another asset's file."""
    parts = path.split("/")
    if len(parts) != 4 or parts[0] != "system" or parts[1] not in KINDS or not is_version(parts[2]):
        return None
    try:
        return parts[1], parts[2], Arch.parse(parts[3])
    except UnsupportedArch:
        return None


def _identity(directory: Path) -> object:
    try:
        found = (directory / RECORD).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _unlink(path: Path) -> int:
    with storing(path):
        try:
            freed = _on_disk(path)
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return 0
    return freed


def _on_disk(path: Path) -> int:
    """What the disk gets back when this name goes."""
    found = path.lstat()
    return found.st_blocks * 512 if found.st_nlink == 1 else 0
