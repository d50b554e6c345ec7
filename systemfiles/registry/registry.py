"""The registry of one data directory: its database, brought to this release's schema, and who it is in there.

A data directory is a *store* in its database, under the id that it keeps itself::

    system/store.json     {"schema": 1, "store": "01KAG5W5X8J8Q2M2Y7R1VJZ3TN"}

So a database that does not know the store has lost it, and with it the leases; what else it knew is on disk.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from systemfiles.foundation.errors import StoreError
from systemfiles.foundation.files import write_file
from systemfiles.foundation.lock import Timeout, locked
from systemfiles.foundation.paths import Paths
from systemfiles.registry.assets import Assets
from systemfiles.registry.database import Database, SQLite, open_database
from systemfiles.registry.leases import Leases
from systemfiles.registry.schema import is_current, upgrade
from systemfiles.registry.tombstones import Tombstones
from systemfiles.registry.ulid import new_ulid

Clock = Callable[[], float]


class Registry:
    """Opens itself at its first use, and again when its file was replaced. Safe to share among threads."""

    def __init__(
        self, paths: Paths, *, url: str | None = None, clock: Clock = time.time, timeout: Timeout = None
    ) -> None:
        self.clock = clock
        self._paths = paths
        self._timeout = timeout
        self._unchecked = open_database(paths.registry, url)
        self._opening = threading.Lock()
        self._opened: object = None
        self._store_id = ""

    @property
    def database(self) -> Database:
        """The database with this release's schema, made if it is not there. Raises StoreError."""
        identity = self._unchecked.identity()
        if identity is None or identity != self._opened:
            with self._opening, locked(self._paths.lock("registry"), timeout=self._timeout):
                self._open()
        return self._unchecked

    @property
    def store_id(self) -> str:
        """Which store this data directory is in the database. Raises StoreError."""
        assert self.database  # which opens it
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

    def known_store(self) -> str | None:
        """The store's id when the data directory has one; makes nothing. Raises StoreError."""
        try:
            value = json.loads(self._paths.store.read_bytes())
            store_id = value["store"]
            if value["schema"] != 1 or not isinstance(store_id, str) or not store_id:
                raise ValueError(store_id)
        except FileNotFoundError:
            return None
        except OSError as error:
            msg = f"{self._paths.store} cannot be read ({error.strerror})"
            raise StoreError(msg) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            msg = f"{self._paths.store} does not say which store this is"
            raise StoreError(msg, hint="restore it from a backup; or remove it, which loses the leases") from error
        return str(store_id)

    @property
    def leases_lost(self) -> bool:
        """Whether the leases that this store had are gone, and that was not accepted yet."""
        with self.database.reading() as transaction:
            return bool(transaction.rows("SELECT 1 FROM stores WHERE id = ? AND leases_lost = 1", (self._store_id,)))

    def accept_lost_leases(self) -> None:
        """Lets collections go on without them."""
        with self.database.writing() as transaction:
            transaction.execute("UPDATE stores SET leases_lost = 0 WHERE id = ?", (self._store_id,))

    def close(self) -> None:
        """Closes this thread's connection; the next use opens it again."""
        self._unchecked.close()

    def _open(self) -> None:
        if not is_current(self._unchecked):
            upgrade(self._unchecked)
        known = self.known_store()
        self._store_id = known or self._only_store() or new_ulid(self.clock())
        with self._unchecked.writing() as transaction:
            transaction.execute(
                "INSERT INTO stores (id, created_at, leases_lost) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (self._store_id, self.now(), int(known is not None)),
            )
        if known is None:
            data = json.dumps({"schema": 1, "store": self._store_id}).encode()
            write_file(self._paths.store, data, scratch=self._paths.tmp, mode=0o644)
        self._opened = self._unchecked.identity()

    def _only_store(self) -> str | None:
        """Whose a database is that lies in this data directory, should store.json be lost."""
        if not isinstance(self._unchecked, SQLite):
            return None
        with self._unchecked.reading() as transaction:
            rows = transaction.rows("SELECT id FROM stores ORDER BY created_at, id")
        return str(rows[0][0]) if rows else None
