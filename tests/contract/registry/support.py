"""What these tests share: assets in few words, a database seen from several sides, transactions that stand still."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psycopg

from systemfiles.foundation.paths import Paths
from systemfiles.registry.assets import Asset, Assets, AssetType, insert, locate
from systemfiles.registry.database import Database, Transaction
from systemfiles.registry.leases import Leases
from systemfiles.registry.postgresql import PostgreSQL
from systemfiles.registry.registry import Registry
from systemfiles.registry.sqlite import SQLite
from systemfiles.registry.tombstones import Tombstone, Tombstones
from tests.conftest import CHECKOUT

STORE = "store-a"
PATIENCE = 60.0  # seconds after which somebody waits for ever


def asset(id: str, **facts: Any) -> Asset:
    """A kernel of this id that was made and last used at second `at`."""
    at = facts.pop("at", 1000)
    told: dict[str, Any] = {
        "name": f"name of {id}",
        "type": AssetType.KERNEL,
        "location": f"files/{id}",
        "size_bytes": 10,
        "checksum": "0" * 64,
        "created_at": at,
        "last_accessed_at": at,
    }
    return Asset(id=id, **told | facts)


@dataclass(frozen=True)
class Base:
    """A database with this release's schema, of one kind or the other."""

    kind: str
    url: str

    def open(self) -> Database:
        """Another handle on it, as another process would have one."""
        return PostgreSQL(self.url) if self.kind == "postgresql" else SQLite(self.file)

    @property
    def file(self) -> Path:
        return Path(self.url.removeprefix("sqlite:///"))

    def sql(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """What another program does to it."""
        connection: Any
        if self.kind == "postgresql":
            with psycopg.connect(self.url, autocommit=True) as connection:
                cursor = connection.execute(statement.replace("?", "%s").encode(), values or None)
                return cursor.fetchall() if cursor.description else []
        with contextlib.closing(sqlite3.connect(self.file, isolation_level=None)) as connection:
            found: list[tuple[Any, ...]] = connection.execute(statement, values).fetchall()
            return found


class World:
    """A database, and what is done with it; as one process, in one store."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.database = base.open()
        self.assets = Assets(self.database)
        self.leases = Leases(self.database)
        self.tombstones = Tombstones(self.database, STORE)

    def add(self, *ids: str, store: str = STORE, at: int = 1000, **facts: Any) -> None:
        """Registers assets whose bytes are in `store`."""
        for id in ids:
            self.assets.register(asset(id, at=at, **facts), store_id=store, path=f"files/{id}")

    def add_many(self, ids: Iterable[str], *, at: int = 1000) -> None:
        """The same in one transaction."""
        with self.database.writing() as transaction:
            for id in ids:
                insert(transaction, asset(id, at=at))
                locate(transaction, id, STORE, f"files/{id}")

    def ids(self) -> list[str]:
        return [row[0] for row in self.base.sql("SELECT id FROM assets ORDER BY id")]

    def lease_rows(self) -> int:
        return int(self.base.sql("SELECT count(*) FROM asset_leases")[0][0])


def pending(tombstones: Tombstones) -> tuple[Tombstone, ...]:
    """What has lost its row."""
    return tuple(stone for batch in tombstones.pending() for stone in batch)


class Standing:
    """A database whose write transactions stand still before they are committed, until they may go on."""

    def __init__(self, inner: Database) -> None:
        self._inner = inner
        self.reached = threading.Event()
        self.go_on = threading.Event()

    @property
    def database(self) -> Database:
        return cast("Database", self)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Transaction]:
        with self._inner.writing() as transaction:
            yield transaction
            self.reached.set()
            assert self.go_on.wait(PATIENCE)


class Running:
    """A call in a thread of its own, and what came of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._result: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def waits(self, seconds: float = 0.3) -> bool:
        """Whether it is still at it after some time."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def result(self) -> Any:
        """What it returned. Raises what it raised."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "it waits for ever"
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error


class Clock:
    """A clock that stands still unless it is set."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def registry(data_dir: Path, *, url: str | None = None, clock: Callable[[], float] | None = None) -> Registry:
    """A registry as another process would open it."""
    data_dir.mkdir(exist_ok=True)
    return Registry(Paths(data_dir), url=url, clock=clock or Clock())


def python(script: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs Python code in the checkout."""
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(words, check=False, capture_output=True, text=True, cwd=CHECKOUT, timeout=PATIENCE, **options)


def migrated_copy(template: Path, target: Path) -> Base:
    """An SQLite database of its own."""
    shutil.copy(template, target)
    return Base("sqlite", f"sqlite:///{target}")


def spawned_environment() -> dict[str, str]:
    """The environment without what this test run set."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SYSTEMFILES_")}


def use(opened: Registry) -> None:
    """Everything that a process does with it."""
    opened.assets.get("a", now=1000)
    opened.leases.release(opened.leases.acquire(["a"], "vm-2", now=1000).id, now=1000)


def is_whole(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return bool(connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)])
