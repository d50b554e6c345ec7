"""Reads who holds what in a data directory, with the standard library alone: the registry, pins, the audit log.

It knows registry.sqlite (as the first migration makes it), store.json, pins/*.json and collected.jsonl, and none of the
code that writes them. The database is read as the next process would find it: from a copy, with its log or journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATABASE = "registry.sqlite"
LATER = "9999"
"""A version of the schema that only tests have: with one more table, `later`."""
_TABLES = {
    "alembic_version", "assets", "asset_labels", "asset_leases", "asset_locations", "content_use", "stores",
    "tombstones",
}  # fmt: skip
_SAID_OF_THE_GONE = {"at", "what", "why", "last_held_by", "size"}
_BOOTED = {"kernel": ("vmlinux", "Image"), "initrd": ("initrd",)}

Told = tuple[str, str]
"""What is wrong, and with what: a path below the data directory, and a sentence that begins there."""


@dataclass
class Ledger:
    """What the data directory says of holds.

    `stores` are the ids in the database with whether their leases are lost, `rows` has the path of each asset that this
    store has, `files` the sha256 of those paths that are files, `leases` the holder and the assets of each live lease
    by its id, `doomed` the assets that have a tombstone. `pins` are the bytes of each by its name, `pinned` the digests
    (in hex) of all files of what each holds, `told` is the audit log. `held` has who holds a path.
    """

    version: str = ""
    store: str = ""
    stores: dict[str, bool] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    leases: dict[str, tuple[str, frozenset[str]]] = field(default_factory=dict)
    doomed: tuple[str, ...] = ()
    pins: dict[str, bytes] = field(default_factory=dict)
    pinned: dict[str, frozenset[str]] = field(default_factory=dict)
    told: bytes = b""
    held: dict[str, str] = field(default_factory=dict)

    def held_by(self, holder: str) -> list[frozenset[str]]:
        """The assets of each lease of a holder."""
        return [assets for who, assets in self.leases.values() if who == holder]

    @property
    def answers(self) -> dict[str, Any]:
        """What callers are told of holds, without times and numbers that are drawn.

        Leases that stand for pins are brought in step with these by collections, see `unlike_pins`.
        """
        pins = {name: {k: v for k, v in _object(data).items() if k != "created_at"} for name, data in self.pins.items()}
        gone = {(line.get("what"), line.get("why")) for line in map(_object, self.told.splitlines())}
        return {
            "leases": sorted((who, sorted(assets)) for who, assets in self.leases.values() if who[:4] != "pin:"),
            "tombstones": sorted(self.doomed),
            "pins": pins,
            "collected": sorted(map(str, gone)),
            "stores": sorted(self.stores.values()),
        }

    def unlike_pins(self) -> set[str]:
        """The pins that the database does not know, and those that it knows and that are not there."""
        return {who.removeprefix("pin:") for who, _ in self.leases.values() if who[:4] == "pin:"} ^ {*self.pins}


def read(data_dir: Path) -> tuple[Ledger, list[Told]]:
    """All that is said of holds, and what is wrong with it, or with what it says is there."""
    ledger, problems = Ledger(), list[Told]()
    reader = _Reader(data_dir, ledger)
    for part in (reader.store, reader.pins, reader.audit, reader.database, reader.held):
        problems += part()
    return ledger, problems


def losses(before: Ledger, after: Ledger, may_go: Callable[[str], bool]) -> Iterator[Told]:
    """Holds, and files of assets, that were there and are not, or are others, but for what may go."""
    if before.store in before.stores and (after.store, before.store in after.stores) != (before.store, True):
        yield "system/store.json", f"was {before.store}, and is {after.store or 'lost'} among {[*after.stores]}"
    for lease, (holder, assets) in before.leases.items():
        if not may_go(f"lease {holder}") and after.leases.get(lease) != (holder, assets):
            yield f"lease {lease}", f"of {holder} was on {sorted(assets)}, now {after.leases.get(lease)}"
    for name, data in before.pins.items():
        if after.pins.get(name) != data and not (may_go(f"pin {name}") and name not in after.pins):
            yield f"system/pins/{name}.json", f"was another: {data!r:.200}"
    for path, sha256 in before.files.items():
        found = after.files.get(path)
        if found != sha256 and not (may_go(path) and found is None):
            yield path, f"was there with sha256 {sha256}, now {found}"
    if not after.told.startswith(before.told):
        yield "collected.jsonl", "lost lines"


class _Reader:
    def __init__(self, data_dir: Path, ledger: Ledger) -> None:
        self._root = data_dir
        self._ledger = ledger

    def store(self) -> Iterator[Told]:
        path = self._root / "system" / "store.json"
        if not path.exists():
            return
        value = _object(path.read_bytes())
        self._ledger.store = str(value.get("store", ""))
        if value.get("schema") != 1 or not self._ledger.store:
            yield "system/store.json", f"does not say which store this is: {value}"

    def pins(self) -> Iterator[Told]:
        """A pin is whole, and what it names is as it says."""
        for path in sorted((self._root / "system" / "pins").glob("*.json")):
            self._ledger.pins[path.stem] = data = path.read_bytes()
            try:
                value = json.loads(data)
                self._ledger.pinned[path.stem] = _digests(value)
                whole = (value["schema"], value["name"]) == (1, path.stem)
                places = {kind: f"system/{kind}/{value[kind]['version']}/{value[kind]['arch']}" for kind in _BOOTED}
                sums = {kind: value[kind]["sha256"] for kind in _BOOTED}
            except (ValueError, KeyError, TypeError) as error:
                yield f"system/pins/{path.name}", f"is no pin ({error!r})"
                continue
            if not whole:
                yield f"system/pins/{path.name}", "is another pin than its name says"
            for kind, place in places.items():
                self._ledger.held[place] = f"pin {path.stem}"
                found = [self._root / place / name for name in _BOOTED[kind]]
                if sums[kind] not in [_sha256(file) for file in found if file.exists()]:
                    yield place, f"is pinned by {path.stem}, and its file is another or gone"

    def audit(self) -> Iterator[Told]:
        """The audit log consists of whole lines."""
        path = self._root / "collected.jsonl"
        if not path.exists():
            return
        self._ledger.told = data = path.read_bytes()
        for line in data.splitlines(keepends=True):
            if _object(line).keys() != _SAID_OF_THE_GONE or not line.endswith(b"\n"):
                yield "collected.jsonl", f"has a line that is not whole: {line!r:.200}"

    def database(self) -> Iterator[Told]:
        """The database is sound, its schema wholly of one version, and every row of ours has its file."""
        if not (self._root / DATABASE).exists():
            return
        with tempfile.TemporaryDirectory() as directory:
            for suffix in ("", "-wal", "-journal"):
                if (self._root / f"{DATABASE}{suffix}").exists():
                    shutil.copy(self._root / f"{DATABASE}{suffix}", directory)
            try:
                with contextlib.closing(sqlite3.connect(Path(directory, DATABASE))) as connection:
                    yield from self._tables(connection)
            except sqlite3.Error as error:
                yield DATABASE, f"cannot be read ({error})"

    def _tables(self, db: sqlite3.Connection) -> Iterator[Told]:
        db.execute("PRAGMA synchronous=OFF")
        for row in (*db.execute("PRAGMA integrity_check"), *db.execute("PRAGMA foreign_key_check")):
            if row != ("ok",):
                yield DATABASE, f"is not sound: {row}"
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return
        versions = [row[0] for row in db.execute("SELECT version_num FROM alembic_version")]
        if len(versions) != 1 or tables != _TABLES | ({"later"} if versions == [LATER] else set()):
            yield DATABASE, f"has the tables {sorted(tables)} at version {versions}"
            return
        self._ledger.version = versions[0]
        self._ledger.stores = {name: bool(lost) for name, lost in db.execute("SELECT id, leases_lost FROM stores")}
        yield from self._rows(db)
        yield from self._leases(db)
        mine = (self._ledger.store,)
        self._ledger.doomed = tuple(
            r[0] for r in db.execute("SELECT asset_id FROM tombstones WHERE store_id = ?", mine)
        )

    def _rows(self, db: sqlite3.Connection) -> Iterator[Told]:
        for asset, store, path in db.execute("SELECT asset_id, store_id, path FROM asset_locations"):
            if store != self._ledger.store:
                yield DATABASE, f"{asset} is in the store {store}, and this is {self._ledger.store}"
            self._ledger.rows[asset] = path
            place = self._root / path
            if path.startswith("system/"):
                if not (place / "artifact.json").exists():
                    yield path, f"is the place of {asset}, which has a row, and no file"
            elif place.exists():
                self._ledger.files[path] = _sha256(place)
            else:
                yield path, f"is the file of {asset}, which has a row, and it is not there"
        for (asset,) in db.execute("SELECT id FROM assets WHERE id NOT IN (SELECT asset_id FROM asset_locations)"):
            yield DATABASE, f"{asset} has a row and no place"

    def _leases(self, db: sqlite3.Connection) -> Iterator[Told]:
        """A lease has all of its assets; the ones that hold are told."""
        found = [*db.execute("SELECT id, asset_id, acquired_by, expires_at, asset_count, store_id FROM asset_leases")]
        counts = Counter(row[0] for row in found)
        for lease, asset, holder, ends, count, store in found:
            if counts[lease] != count:
                yield DATABASE, f"lease {lease} has {counts[lease]} assets of {count}"
            if ends is not None and ends <= time.time():
                continue
            if asset not in self._ledger.rows or store != self._ledger.store:
                yield DATABASE, f"lease {lease} of {holder} is on {asset} in {store}, which is not there"
                continue
            _, assets = self._ledger.leases.get(lease, ("", frozenset()))
            self._ledger.leases[lease] = (holder, assets | {asset})
            self._ledger.held.setdefault(self._ledger.rows[asset], holder)

    def held(self) -> Iterator[Told]:
        """What is held is there; whether it is whole is for who reads artifacts."""
        for path, holder in self._ledger.held.items():
            place = self._root / path
            if not (place / "artifact.json" if path.startswith("system/") else place).exists():
                yield path, f"is held by {holder} and gone"


def _digests(pin: dict[str, Any]) -> frozenset[str]:
    return frozenset(facts["sha256"] for kind in _BOOTED for facts in pin[kind]["record"]["files"].values())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _object(data: bytes) -> dict[str, Any]:
    """The JSON object, an empty one where that is something else."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
