"""The registry of one data directory: its database, brought to this release's schema, and who it is in there.

A data directory is a *store* in its database, under the id that it keeps itself::

    system/store.json     {"schema": 1, "store": "01KAG5W5X8J8Q2M2Y7R1VJZ3TN", "registries": ["registry.sqlite"]}

`registries` are the databases in which it may have leases: one, unless a process was told of another than the rest.
Then no collection knows them all, and none removes anything until it was said which one counts.

A database that does not know the store has lost it, and with it the leases; what else it knew is on disk. When it is
store.json that is lost, a database inside the data directory knows whose it is. In another one the store begins anew,
and its leases are lost if there were any.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from systemfiles.foundation.errors import StoreError, UsageError
from systemfiles.foundation.files import write_file
from systemfiles.foundation.lock import Timeout, locked
from systemfiles.foundation.paths import Paths
from systemfiles.registry.assets import Assets
from systemfiles.registry.database import DATABASE_VARIABLE, Database
from systemfiles.registry.leases import Leases
from systemfiles.registry.postgresql import PostgreSQL
from systemfiles.registry.schema import is_current, upgrade
from systemfiles.registry.sqlite import SQLite, Still
from systemfiles.registry.tombstones import Tombstones
from systemfiles.registry.ulid import new_ulid

Clock = Callable[[], float]
_STORE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def open_database(paths: Paths, url: str | None = None) -> Database:
    """The database at `url`, else at $SYSTEMFILES_DATABASE_URL, else in the data directory. Connects to nothing.

    Raises UsageError for a URL of something else.
    """
    url = url or os.environ.get(DATABASE_VARIABLE)
    if not url:
        return SQLite(paths.registry, lock=paths.lock(paths.registry.name))
    if PostgreSQL.owns(url):
        return PostgreSQL(url)
    if url.startswith("sqlite:////"):
        return SQLite(Path(url.removeprefix("sqlite:///")))
    msg = f"{DATABASE_VARIABLE} names no database that is known here"
    raise UsageError(msg, details=[("known", "postgresql://USER@HOST/NAME, sqlite:////PATH")])


class Registry:
    """Opens itself at its first use, and again when it may be another one. Safe to share among threads and forks."""

    def __init__(
        self, paths: Paths, *, url: str | None = None, clock: Clock = time.time, timeout: Timeout = None
    ) -> None:
        self.clock = clock
        self._paths = paths
        self._timeout = timeout
        self._unchecked = open_database(paths, url)
        self._still = Still(self._unchecked.path) if isinstance(self._unchecked, SQLite) else self._unchecked
        self._opened: object = None
        self._store_id = ""

    @property
    def database(self) -> Database:
        """The database with this release's schema, made if it is not there. Raises StoreError."""
        self.open()
        return self._unchecked

    def open(self) -> None:
        """Makes `database` and this store in it what they have to be, unless they are. Raises StoreError."""
        identity = self._unchecked.identity()
        if (identity is None or identity != self._opened) and not self._found():
            with locked(self._paths.lock("registry"), timeout=self._timeout):
                if not self._found():
                    self._make()

    @property
    def store_id(self) -> str:
        """Which store this data directory is in the database. Raises StoreError."""
        if not self._store_id:
            self.open()
        return self._store_id

    @property
    def assets(self) -> Assets:
        return Assets(self.database)

    @property
    def leases(self) -> Leases:
        return Leases(self.database)

    @property
    def tombstones(self) -> Tombstones:
        return Tombstones(self.database, self.store_id)

    def now(self) -> int:
        """The second it is, as the clock has it."""
        return int(self.clock())

    def existing(self) -> Database | None:
        """The database when it is there as this release needs it; makes and changes nothing. Raises StoreError."""
        return self._unchecked if is_current(self._unchecked) else None

    def look(self) -> tuple[Database, str] | None:
        """The database and who this store is in it, to be read without a trace; None where there is no such yet.

        Raises StoreError.
        """
        if not is_current(self._still):
            if self._still.schema() is None:
                return None
            msg = f"the registry {self._still.where} was written by an earlier release of systemfiles"
            raise StoreError(msg, hint="whatever writes to it upgrades it, such as `systemfiles gc`")
        store_id = self.known_store()
        if store_id is None and isinstance(self._unchecked, SQLite) and self._unchecked.path == self._paths.registry:
            with self._still.reading() as transaction:
                known = [row[0] for row in transaction.rows("SELECT id FROM stores")]
            store_id = str(known[0]) if len(known) == 1 else None
        return None if store_id is None else (self._still, store_id)

    def known_store(self) -> str | None:
        """The store's id when the data directory has one; makes nothing. Raises StoreError."""
        return self._read_store()[0]

    @property
    def where(self) -> str:
        """What the database is called in messages."""
        return self._unchecked.where

    @property
    def others(self) -> tuple[str, ...]:
        """The other databases in which this store may have leases. Raises StoreError."""
        return tuple(name for name in self._read_store()[1] if name != self._name)

    @property
    def _name(self) -> str:
        """What store.json calls the database: one in the data directory is where that is, and users are no places."""
        where = self._unchecked.where
        inside = isinstance(self._unchecked, SQLite) and self._unchecked.path == self._paths.registry
        return self._paths.registry.name if inside else re.sub(r"//[^/@]*@", "//", where)

    def _read_store(self) -> tuple[str | None, list[str]]:
        """What store.json says: the store's id, and its databases."""
        try:
            value = json.loads(self._paths.store.read_bytes())
            store_id, names = value["store"], value.get("registries", [])
            if value["schema"] != 1 or not _STORE_ID.fullmatch(store_id) or not isinstance(names, list):
                raise ValueError
            return store_id, [*map(str, names)]
        except FileNotFoundError:
            return None, []
        except OSError as error:
            msg = f"{self._paths.store} cannot be read ({error.strerror})"
            raise StoreError(msg) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            msg = f"{self._paths.store} does not say which store this is"
            raise StoreError(msg, hint="restore it from a backup; or remove it, which loses the leases") from error

    def _write_store(self, store_id: str, registries: list[str]) -> None:
        data = json.dumps({"schema": 1, "store": store_id, "registries": registries}).encode()
        write_file(self._paths.store, data, scratch=self._paths.tmp, mode=0o644)

    @property
    def leases_lost(self) -> bool:
        """Whether leases that this store had are gone or in another database, and that was not accepted yet."""
        with self.database.reading() as transaction:
            intact = transaction.rows("SELECT 1 FROM stores WHERE id = ? AND leases_lost = 0", (self._store_id,))
        return not intact or bool(self.others)

    def accept_lost_leases(self) -> None:
        """Lets collections go on without them, and with those of this database only."""
        with self.database.writing() as transaction:
            transaction.execute("UPDATE stores SET leases_lost = 0 WHERE id = ?", (self._store_id,))
        if self.others:
            with locked(self._paths.lock("registry"), timeout=self._timeout):
                self._write_store(self._store_id, [self._name])

    def close(self) -> None:
        """Closes this thread's connection; the next use opens it again."""
        self._unchecked.close()

    def _found(self) -> bool:
        """Whether the database is as it has to be and knows this store, which is the rule, and needs no lock."""
        identity, (known, registries) = self._unchecked.identity(), self._read_store()
        if known is None or self._name not in registries or not is_current(self._unchecked):
            return False
        with self._unchecked.reading() as transaction:
            there = bool(transaction.rows("SELECT 1 FROM stores WHERE id = ?", (known,)))
        if there:
            self._store_id, self._opened = known, identity
        return there

    def _make(self) -> None:
        """Makes what is missing: the schema, the store's row, store.json."""
        if not is_current(self._unchecked):
            upgrade(self._unchecked)
        identity, (known, registries) = self._unchecked.identity(), self._read_store()
        if known is not None and self._name not in registries:
            self._write_store(known, [*registries, self._name])  # before there may be a lease in it
        self._store_id = self._enter(known)
        if known is None:
            self._write_store(self._store_id, [self._name])
        self._opened = identity

    def _enter(self, known: str | None) -> str:
        """Adds this store to the database; returns its id."""
        database = self._unchecked
        place = os.fsencode(f"{os.uname().nodename}:{self._paths.data_dir}").decode(errors="backslashreplace")
        inside = isinstance(database, SQLite) and database.path == self._paths.registry
        where, values = ("TRUE", ()) if inside else ("place = ?", (place,))
        with database.reading() as transaction:
            before = [row[0] for row in transaction.rows(f"SELECT id FROM stores WHERE {where}", values)]
            held = f"SELECT 1 FROM asset_leases WHERE store_id IN (SELECT id FROM stores WHERE {where}) LIMIT 1"
            lost = known is not None or bool(transaction.rows(held, values))
        if known is None and inside and len(before) == 1:
            return str(before[0])
        store_id = known or new_ulid(self.clock())
        with database.writing() as transaction:
            transaction.execute(
                "INSERT INTO stores (id, place, created_at, leases_lost) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (store_id, place, self.now(), int(lost)),
            )
        return store_id
