"""The registry in SQLite: one file, with -wal and -shm beside it while it is in use.

Many processes may write: WAL, BEGIN IMMEDIATE, waiting for each other. A lost power supply loses nothing
(synchronous=FULL). Source: sqlite.org, "Write-Ahead Logging".
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from systemfiles.foundation.errors import NoSpace, StoreError, SystemFilesError
from systemfiles.foundation.files import free_bytes, fsync_path, make_dirs, storing
from systemfiles.foundation.lock import locked
from systemfiles.registry.connections import unforked
from systemfiles.registry.database import BUSY_SECONDS, Database, Transaction

_REBUILD = "move it away, with its -wal and -shm: it is built again from what is on disk, without its leases"
_PERMISSION = "whoever leases or pins needs write permission on it and on its directory"
_HINTS = {
    "BUSY": f"another process has been writing to it for {BUSY_SECONDS} s",
    "CANTOPEN": _PERMISSION,
    "CORRUPT": _REBUILD,
    "IOERR": "see whether its file system is whole and lets it grow",
    "NOTADB": _REBUILD,
    "READONLY": _PERMISSION,
}
"""By the result codes of sqlite.org/rescode.html."""


class SQLite(Database):
    """One file. What is written to it when it has lost its name would be lost, so connections go by its inode."""

    dialect = "sqlite"
    begin_reading = "BEGIN"
    begin_writing = "BEGIN IMMEDIATE"  # a deferred one could not wait to become a writer
    for_update = ""  # there is one writer at a time
    _find_versions = "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"

    def __init__(self, path: Path, *, lock: Path | None = None) -> None:
        """`lock` guards its making; without one, that is a file beside it."""
        self.path = path.absolute()
        self._lock = lock or self.path.with_name(f"{self.path.name}-lock")
        self.where = str(self.path)
        super().__init__()

    @contextlib.contextmanager
    def migrating(self) -> Iterator[sqlite3.Connection]:
        make_dirs(self.path.parent)
        with self._explaining(), locked(self._lock), unforked:
            self._create()
            with contextlib.closing(self._open()) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                # foreign keys stay off: a migration may build a table anew without losing what refers to it
                yield connection

    def make_tables(self, connection: sqlite3.Connection, script: str) -> bool:
        if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            return False
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{script}\nCOMMIT;")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        return True

    def _create(self) -> None:
        """An empty file that those may write to who may write to its directory, if there is none."""
        if self._target() is not None:
            return
        if self.path.is_symlink():
            msg = f"the registry {self.path} is a link to {self.path.readlink()}, which is not there"
            raise StoreError(msg, hint="mount what it is on; or remove the link, which loses the leases")
        with storing(self.path):
            for suffix in ("-wal", "-shm"):  # of a database that was removed; a process may still use them
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            mode = 0o660 if self.path.parent.stat().st_mode & 0o020 else 0o600
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
            os.fchmod(fd, mode)  # whatever the umask
            os.close(fd)
            fsync_path(self.path.parent)

    def _target(self) -> object:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _connect(self) -> sqlite3.Connection:
        connection = self._open()
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def _open(self) -> sqlite3.Connection:
        # by its URI, as plain opening would make an empty database where there is none
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,  # whoever forks closes it
        )
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    def _run(self, connection: sqlite3.Connection, statement: str, values: Sequence[object]) -> sqlite3.Cursor:
        return connection.execute(statement, values)

    def _explain(self, error: Exception) -> SystemFilesError | None:
        if not isinstance(error, sqlite3.Error):
            return None
        code = (getattr(error, "sqlite_errorname", "") or "").removeprefix("SQLITE_").partition("_")[0]
        if code == "FULL":
            return NoSpace(self.path, needed=None, free=free_bytes(self.path.parent))
        hint = _REBUILD if "no such table" in str(error) else _HINTS.get(code)
        return StoreError(f"the registry {self.path} cannot be used ({error})", hint=hint)


class Still(SQLite):
    """The same file, to be read without a trace: nothing is made beside it, and nothing written back into it."""

    def _target(self) -> object:
        """A connection sees no change of a file that it takes for immutable, so each change asks for a new one."""
        state = self._state()
        return state and (*state, self._is_in_use())

    @contextlib.contextmanager
    def reading(self) -> Iterator[Transaction]:
        state, immutable = self._state(), not self._is_in_use()
        with super().reading() as transaction:
            yield transaction
        if immutable and self._state() != state:  # what others write goes to -wal first, and does not matter there
            msg = f"the registry {self.path} was changed while it was read"
            raise StoreError(msg, hint="try again")

    def _state(self) -> tuple[int, ...] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def _open(self) -> sqlite3.Connection:
        # one that nobody has written to has no -wal, or an empty one; opened in any other way, it would be given one
        how = "mode=ro" if self._is_in_use() else "mode=ro&immutable=1"
        return sqlite3.connect(
            f"{self.path.as_uri()}?{how}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )

    def _is_in_use(self) -> bool:
        """By a process that wrote to it, or by one that was killed.

        There is nothing in an empty -wal, and a full disk, where it was made in vain, has no space for a -shm either.
        """
        try:
            return self.path.with_name(f"{self.path.name}-wal").stat().st_size > 0
        except OSError:
            return False
