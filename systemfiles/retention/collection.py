"""Collection of artifacts and other assets: what nothing holds goes, in an order that any crash leaves right.

1. Rows become tombstones, in batches, each in a transaction that finds no live lease.
2. For each tombstone, under the artifact's lock and the content store's: the pins, the names that other tools gave in
   index.json, the row, and what is current by then are looked for once more; then our name in index.json and the
   directory go.
3. The audit log is told, and the tombstone dropped.

A crash leaves tombstones, with which the next collection begins. What cannot be removed is told of, and everything else
is removed all the same. The blobs are the business of eviction.py.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from systemfiles.content.artifacts import ARCHES, RECORD, listed
from systemfiles.content.store import Store, layout_name
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    IntegrityError,
    LockTimeout,
    NotProvisioned,
    StoreError,
    UsageError,
)
from systemfiles.foundation.files import fsync_path, scratch_dir, storing
from systemfiles.foundation.lock import locked
from systemfiles.foundation.paths import KINDS, Paths, is_version
from systemfiles.registry.database import marks
from systemfiles.registry.registry import Registry
from systemfiles.registry.tombstones import BATCH, Candidate, Tombstone
from systemfiles.retention.outcome import UNFINISHED, UNHELD, Gone, Outcome, tell
from systemfiles.retention.pins import Pins
from systemfiles.retention.reasons import id_of, id_of_file, named_by_others
from systemfiles.retention.registrar import Registrar

log = logging.getLogger(__name__)

Key = tuple[str, str, Arch]
Seen = Mapping[str, object]
"""By asset id: the identity of its record when it was decided what is kept."""
Current = Callable[[], Mapping[str, str]]


class _Carried(NamedTuple):
    """A tombstone that is done with; `freed` is None when what it stands for stays."""

    stone: Tombstone
    freed: int | None


class Collector:
    """Removes the artifacts and assets of one data directory that nothing holds. Safe to share among threads."""

    def __init__(self, paths: Paths, registry: Registry, registrar: Registrar, store: Store, pins: Pins) -> None:
        self._paths = paths
        self._registry = registry
        self._registrar = registrar
        self._store = store
        self._pins = pins

    def look(self) -> Seen:
        """What is here. To be called before it is decided what is kept: what is made after that is not collected."""
        return {
            layout_name(kind, *version): _identity(self._paths.artifact(kind, *version))
            for kind in KINDS
            for version in self._store.artifacts.versions(kind)
        }

    def collect(
        self, kept: Collection[str], seen: Seen, *, young: int, outcome: Outcome, current: Current = dict
    ) -> None:
        """Removes what has an id that is not in `kept`, no live lease, and no use after `young` (UTC seconds).

        `current` says at any time what is the current version of something by then, and of what.
        """
        for pending in self._registry.tombstones.pending():
            self._drop([stone for stone in pending if stone.asset_id in kept])
            self._carry_out([stone for stone in pending if stone.asset_id not in kept], seen, outcome, current)
        self._registrar.sync()
        there = {id_of(artifact) for artifact in self._registrar.artifacts()} & seen.keys()
        self._condemn(sorted(there - {*kept}), young, seen, outcome, current)
        for batch in self._registry.tombstones.candidates(now=self._registry.now(), unused_since=young):
            alone = [each.id for each in batch if each.id not in kept and not self._has_record(each)]
            self._condemn(alone, young, seen, outcome, current)
        self._clear(kept, young, outcome)

    def delete(self, asset: str, *, force: bool = False) -> Outcome:
        """Removes one asset now; with `force` whatever leases it has, but no pin. Raises AssetInUse."""
        outcome, seen = Outcome(), self.look()
        stones = self._registry.tombstones.delete(asset, now=self._registry.clock(), force=force)
        self._carry_out(stones, seen, outcome)
        return outcome

    def unfinished(self, kept: Collection[str], young: int) -> Iterator[tuple[str, Path]]:
        """Directories of artifacts that have no record, whatever was begun in them; those to clear away, with ids."""
        for kind in KINDS:
            for directory in listed(self._paths.kind(kind), "*/*"):
                asset = f"{kind}-{directory.parent.name}-{directory.name}"
                ours = artifact_at(str(directory.relative_to(self._paths.data_dir)), asset)
                if ours and asset not in kept and _is_unfinished(directory, young):
                    yield asset, directory

    def directory(self, key: Key) -> Path:
        """An artifact's."""
        return self._paths.artifact(*key)

    def file_of(self, path: str) -> Path:
        """An asset's file. Raises UsageError for a path that leads out of the data directory, or to what is ours."""
        return self._paths.asset(path)

    # ── tombstones ───────────────────────────────────────────────────────────────────────────────────────────────

    def _condemn(self, ids: list[str], young: int, seen: Seen, outcome: Outcome, current: Current) -> None:
        for start in range(0, len(ids), BATCH):
            stones = self._registry.tombstones.condemn(
                ids[start : start + BATCH], reason=UNHELD, now=self._registry.clock(), unused_since=young
            )
            self._carry_out(stones, seen, outcome, current)

    def _carry_out(self, stones: Iterable[Tombstone], seen: Seen, outcome: Outcome, current: Current = dict) -> None:
        every = [*stones]
        for start in range(0, len(every), BATCH):
            batch = every[start : start + BATCH]
            others = [stone for stone in batch if artifact_at(stone.path, stone.asset_id) is None]
            carried = [*self._remove_assets(others, outcome)]
            for stone in batch:
                if key := artifact_at(stone.path, stone.asset_id):
                    carried += self._remove_artifact(stone, key, seen, outcome, current)
            gone = [
                Gone(stone.asset_id, stone.reason, stone.last_held_by, stone.size_bytes)
                for stone, freed in carried
                if freed is not None
            ]
            outcome.went(*gone)
            outcome.freed += sum(freed or 0 for _, freed in carried)
            tell(self._paths, gone, now=self._registry.clock())
            self._drop([stone for stone, _ in carried])

    def _drop(self, stones: list[Tombstone]) -> None:
        for start in range(0, len(stones), BATCH):
            self._registry.tombstones.drop([stone.id for stone in stones[start : start + BATCH]])

    def _remove_assets(self, stones: list[Tombstone], outcome: Outcome) -> Iterator[_Carried]:
        """Removes their files; none that is another asset's, as another program may have left it."""
        if not stones:
            return
        directories = set()
        with self._store.layout.exclusively(behind=True):
            taken = self._taken([stone.path for stone in stones])
            for stone in stones:
                try:
                    path = self.file_of(stone.path)
                    yield _Carried(stone, None if stone.path in taken else _unlink(path))
                    directories.add(path.parent)
                except UsageError as error:  # what that path leads to is not ours, and will never be
                    msg = f"asset {stone.asset_id!r:.300} is forgotten, and no file removed: {error.summary}"
                    outcome.failed(StoreError(msg))
                    yield _Carried(stone, None)
                except StoreError as error:
                    outcome.failed(error)  # the tombstone stays
            for directory in sorted(directories):
                with storing(directory):
                    if directory.is_dir():
                        fsync_path(directory)

    def _remove_artifact(
        self, stone: Tombstone, key: Key, seen: Seen, outcome: Outcome, current: Current
    ) -> Iterator[_Carried]:
        name = layout_name(*key)
        try:
            with locked(self._paths.lock(name), timeout=0), self._store.layout.exclusively(behind=True):
                if why := self._held_again(stone, key, seen) or current().get(stone.asset_id, ""):
                    log.info("%s stays: %s", stone.asset_id, why)
                    yield _Carried(stone, None)
                    return
                self._store.layout.unname(name)
                yield _Carried(stone, self._remove_directory(self._paths.artifact(*key)))
        except LockTimeout:
            log.info("%s is being worked on: it goes next time", stone.asset_id)
        except StoreError as error:
            outcome.failed(error)  # the tombstone stays

    def _held_again(self, stone: Tombstone, key: Key, seen: Seen) -> str:
        """Why an artifact that was condemned must stay all the same; "" if nothing came between."""
        if stone.asset_id in self._with_rows([stone.asset_id]):
            return "somebody has begun to use it"
        for pin in self._pins:
            if any(id_of_file(file) == stone.asset_id for file in pin.files):
                return f"pinned by {pin.name}"
        now = _identity(self._paths.artifact(*key))
        if now is None:
            return ""
        if seen.get(stone.asset_id) != now:
            return "it was made anew"
        try:
            artifact = self._store.artifacts.load(*key)
        except (NotProvisioned, IntegrityError):
            return ""
        named = named_by_others(self._store.layout)
        return next((f"named {named[facts.sha256]}" for facts in artifact.files.values() if facts.sha256 in named), "")

    def _has_record(self, row: Candidate) -> bool:
        """Whether a row is that of an artifact, and the artifact is there."""
        key = artifact_at(row.path, row.id)
        return key is not None and (self._paths.artifact(*key) / RECORD).exists()

    def _taken(self, paths: list[str]) -> set[str]:
        """Those of these paths that an asset has."""
        with self._registry.database.reading() as transaction:
            rows = transaction.rows(
                f"SELECT path FROM asset_locations WHERE store_id = ? AND path IN ({marks(paths)})",
                (self._registry.store_id, *paths),
            )
        return {row[0] for row in rows}

    def _with_rows(self, ids: list[str]) -> set[str]:
        with self._registry.database.reading() as transaction:
            rows = transaction.rows(
                f"SELECT asset_id FROM asset_locations WHERE store_id = ? AND asset_id IN ({marks(ids)})",
                (self._registry.store_id, *ids),
            )
        return {row[0] for row in rows}

    # ── directories ──────────────────────────────────────────────────────────────────────────────────────────────

    def _clear(self, kept: Collection[str], young: int, outcome: Outcome) -> None:
        for asset, directory in [*self.unfinished(kept, young)]:
            try:
                with locked(self._paths.lock(asset), timeout=0), self._store.layout.exclusively(behind=True):
                    if not _is_unfinished(directory, young) or self._with_rows([asset]):
                        continue
                    gone = Gone(asset, UNFINISHED, "", 0)
                    tell(self._paths, [gone], now=self._registry.clock())  # nothing would, after a crash
                    self._store.layout.unname(asset)
                    outcome.freed += self._remove_directory(directory)
                outcome.went(gone)
            except LockTimeout:
                continue  # somebody is at it
            except StoreError as error:
                outcome.failed(error)
        for directory in [each for kind in KINDS for each in listed(self._paths.kind(kind), "*")]:
            with contextlib.suppress(OSError):
                if int(directory.stat().st_mtime) <= young:
                    directory.rmdir()  # that is empty; nothing else can be removed so

    def _remove_directory(self, directory: Path) -> int:
        """Takes an artifact away as a whole; returns what the disk got back: files that are blobs too go with those."""
        if not directory.exists():
            return 0
        with scratch_dir(self._paths.tmp) as work, storing(directory):
            aside = work / "artifact"
            directory.rename(aside)
            fsync_path(directory.parent)
            freed = on_disk(aside)
            shutil.rmtree(aside)
            alone = directory.parent.lstat().st_blocks * 512
        with storing(directory.parent):
            try:
                directory.parent.rmdir()
            except OSError:
                return freed  # another architecture's is there
            fsync_path(directory.parent.parent)
        return freed + alone


def on_disk(directory: Path, links: Counter[int] | None = None) -> int:
    """What the disk gets back when a directory goes with its files, but for those that have names elsewhere.

    `links` counts, by inode, names that have gone or will go as well.
    """
    freed = directory.lstat().st_blocks * 512
    for path in directory.iterdir():
        found = path.lstat()
        others = found.st_nlink - (links[found.st_ino] if links else 1)
        freed += found.st_blocks * 512 if not others else 0
    return freed


def artifact_at(path: str, asset: str) -> Key | None:
    """Which artifact an asset is whose path in the registry is `path`; None for any other asset, wherever it lies."""
    parts = path.split("/")
    if len(parts) != 4 or parts[0] != "system" or parts[1] not in KINDS or not is_version(parts[2]):
        return None
    if parts[3] not in ARCHES or layout_name(parts[1], parts[2], Arch(parts[3])) != asset:
        return None
    return parts[1], parts[2], Arch(parts[3])


def _identity(directory: Path) -> object:
    try:
        found = (directory / RECORD).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _is_unfinished(directory: Path, young: int) -> bool:
    try:
        found = directory.lstat()
        return directory.is_dir() and int(found.st_mtime) <= young and not (directory / RECORD).exists()
    except OSError:
        return False


def _unlink(path: Path) -> int:
    with storing(path):
        try:
            found = path.lstat()
            path.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return 0
    return found.st_blocks * 512 if found.st_nlink == 1 else 0
