"""The database under the registry: SQLite in a file, or PostgreSQL by URL, with one way to speak to both.

Statements are plain SQL that both accept, with `?` for each value. Each thread has a connection of its own. What a
write transaction did is on the disk when it returns. SQLite is set up so that many processes may write (WAL, BEGIN
IMMEDIATE, waiting for each other), and a lost power supply loses nothing (synchronous=FULL).

The drivers are imported here and nowhere else, and `psycopg` only by whoever uses it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from systemfiles.foundation.errors import NoSpace, StoreError, ToolMissing, UsageError
from systemfiles.foundation.files import free_bytes, make_dirs

if TYPE_CHECKING:
    import psycopg

DATABASE_VARIABLE = "SYSTEMFILES_DATABASE_URL"
BUSY_SECONDS = 60
Row = tuple[Any, ...]
_POSTGRESQL = re.compile(r"postgres(ql)?(\+psycopg)?://")


class Transaction(Protocol):
    """What may be done inside one."""

    def execute(self, statement: str, values: Sequence[object] = (), /) -> int:
        """Runs one statement; returns how many rows it changed."""
        ...

    def rows(self, statement: str, values: Sequence[object] = (), /) -> list[Row]:
        """What a query gives, all of it."""
        ...


def marks(values: Iterable[object]) -> str:
    """A placeholder for each of `values`."""
    return ", ".join("?" for _ in values)


class Database(Protocol):
    """Safe to share among threads, and among processes that were forked."""

    where: str
    """What it is called in messages: a path, or a URL without its password."""

    def reading(self) -> contextlib.AbstractContextManager[Transaction]:
        """One consistent view. Raises StoreError."""
        ...

    def writing(self) -> contextlib.AbstractContextManager[Transaction]:
        """Durable once the block has ended well; nothing happened when it has not. Raises StoreError, NoSpace."""
        ...

    def identity(self) -> object:
        """What changes when another database takes this one's place; None while there is none."""
        ...

    def schema(self) -> str | None:
        """The version of the schema of what is there, None where there is nothing yet. Raises StoreError."""
        ...

    def migrate(self, migrate: Callable[[str, Callable[[], Any], str | None], None]) -> None:
        """Calls `migrate` with SQLAlchemy's name of the dialect, what opens a connection, and how a transaction has to
        be begun on it. Raises StoreError."""
        ...

    def close(self) -> None:
        """Closes this thread's connection; it is opened again by the next use."""
        ...


def open_database(default: Path, url: str | None = None) -> Database:
    """The database at `url`, else at $SYSTEMFILES_DATABASE_URL, else the SQLite file `default`. Connects to nothing.

    Raises UsageError for a URL of something else.
    """
    url = url or os.environ.get(DATABASE_VARIABLE)
    if not url:
        return SQLite(default)
    if _POSTGRESQL.match(url):
        return PostgreSQL(url)
    if url.startswith("sqlite:///"):
        return SQLite(Path(url.removeprefix("sqlite:///")))
    msg = f"{DATABASE_VARIABLE} names no database that is known here"
    raise UsageError(msg, details=[("known", "postgresql://USER@HOST/NAME, sqlite:////PATH")])


class _PerThread:
    """A connection for each thread, made when it is first needed, and never one that a parent process had."""

    def __init__(self, connect: Callable[[], Any], close: Callable[[Any], None]) -> None:
        self._connect = connect
        self._close = close
        self._local = threading.local()

    def get(self) -> Any:
        if getattr(self._local, "owner", None) != os.getpid():
            self._local.connection, self._local.owner = self._connect(), os.getpid()
        return self._local.connection

    def drop(self) -> None:
        if getattr(self._local, "owner", None) == os.getpid():
            self._local.owner = None
            self._close(self._local.connection)


class SQLite:
    """One file, with -wal and -shm beside it while it is in use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)
        self._connections = _PerThread(self._open, lambda opened: opened[0].close())

    def identity(self) -> object:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def schema(self) -> str | None:
        if self.identity() is None:
            return None
        with self.reading() as transaction:
            if transaction.rows("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"):
                return _only_version(transaction)
        return None

    def migrate(self, migrate: Callable[[str, Callable[[], Any], str | None], None]) -> None:
        make_dirs(self.path.parent)
        with self._explaining():
            self._create()
            connection = self._connect()
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                migrate("sqlite", lambda: connection, "BEGIN IMMEDIATE")
            finally:
                connection.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Transaction]:
        with self._transaction("BEGIN") as transaction:
            yield transaction

    @contextlib.contextmanager
    def writing(self) -> Iterator[Transaction]:
        with self._transaction("BEGIN IMMEDIATE") as transaction:  # a deferred one could not wait to become a writer
            yield transaction

    def close(self) -> None:
        self._connections.drop()

    def _create(self) -> None:
        """An empty file that those may write to who may write to its directory."""
        mode = 0o660 if self.path.parent.stat().st_mode & 0o020 else 0o600
        with contextlib.suppress(FileExistsError):
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, mode)
            os.fchmod(fd, mode)  # whatever the umask
            os.close(fd)

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[Transaction]:
        with self._explaining():
            connection = self._connection()
            connection.execute(begin)
            try:
                yield _SQLiteTransaction(connection)
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def _connection(self) -> sqlite3.Connection:
        """This thread's, to the file that has the name now: what is written to a removed one would be lost."""
        found = self.identity()
        connection, identity = self._connections.get()
        if identity != found:
            self._connections.drop()
            connection, _ = self._connections.get()
        return connection  # type: ignore[no-any-return]

    def _open(self) -> tuple[sqlite3.Connection, object]:
        identity = self.identity()  # before, so that a file that takes its place meanwhile is noticed
        return self._connect(), identity

    def _connect(self) -> sqlite3.Connection:
        # opened by its URI, as plain opening would make an empty database where there is none
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorname", "") or ""
            if code.startswith("SQLITE_FULL"):
                raise NoSpace(self.path, needed=None, free=free_bytes(self.path.parent)) from error
            msg = f"the registry {self.path} cannot be used ({error})"
            raise StoreError(msg, hint=_SQLITE_HINTS.get(code.removeprefix("SQLITE_").partition("_")[0])) from error
        except OSError as error:
            msg = f"the registry {self.path} cannot be used ({error.strerror})"
            raise StoreError(msg) from error


def _only_version(transaction: Transaction) -> str | None:
    found = transaction.rows("SELECT version_num FROM alembic_version")
    return str(found[0][0]) if found else None


_REBUILD = "move it away, with its -wal and -shm: it is built again from what is on disk, without its leases"
_SQLITE_HINTS = {
    "BUSY": f"another process has been writing to it for {BUSY_SECONDS} s",
    "CORRUPT": _REBUILD,
    "NOTADB": _REBUILD,
    "READONLY": "whoever leases or pins needs write permission on it and on its directory",
}


class _SQLiteTransaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[object] = ()) -> int:
        return self._connection.execute(statement, values).rowcount

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[Row]:
        return self._connection.execute(statement, values).fetchall()


class PostgreSQL:
    """A server that several hosts may share."""

    def __init__(self, url: str) -> None:
        self._url = _POSTGRESQL.sub("postgresql://", url, count=1)
        self.where = re.sub(r"//([^:@/]*):[^@/]*@", r"//\1@", self._url)
        self._connections = _PerThread(self._connect, lambda connection: connection.close())

    def identity(self) -> object:
        return self._url

    def schema(self) -> str | None:
        with self.reading() as transaction:
            if transaction.rows("SELECT 1 WHERE to_regclass('alembic_version') IS NOT NULL"):
                return _only_version(transaction)
        return None

    def migrate(self, migrate: Callable[[str, Callable[[], Any], str | None], None]) -> None:
        with self._explaining(), self._connect() as connection:
            connection.autocommit = False
            migrate("postgresql+psycopg", lambda: connection, None)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Transaction]:
        with self._transaction(read_only=True) as transaction:
            yield transaction

    @contextlib.contextmanager
    def writing(self) -> Iterator[Transaction]:
        with self._transaction(read_only=False) as transaction:
            yield transaction

    def close(self) -> None:
        self._connections.drop()

    @contextlib.contextmanager
    def _transaction(self, *, read_only: bool) -> Iterator[Transaction]:
        with self._explaining():
            connection: psycopg.Connection = self._connections.get()
            if connection.read_only is not read_only:
                connection.read_only = read_only
            with connection.transaction():
                yield _PostgreSQLTransaction(connection)

    def _connect(self) -> psycopg.Connection:
        driver = "psycopg"
        try:
            import psycopg
        except ImportError:
            raise ToolMissing(driver, hint="pip install 'systemfiles[postgres]'") from None
        return psycopg.connect(self._url, autocommit=True, connect_timeout=10, application_name="systemfiles")

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            import psycopg

            if not isinstance(error, psycopg.Error) or isinstance(error, psycopg.IntegrityError):
                raise
            if isinstance(error, psycopg.OperationalError):
                self._connections.drop()  # the next use connects again
            msg = f"the registry {self.where} cannot be used ({str(error).strip().splitlines()[0]:.300})"
            raise StoreError(msg) from error


class _PostgreSQLTransaction:
    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[object] = ()) -> int:
        return self._connection.execute(_as_format(statement), values).rowcount

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[Row]:
        return self._connection.execute(_as_format(statement), values).fetchall()


@lru_cache(maxsize=512)
def _as_format(statement: str) -> bytes:
    """`statement` with psycopg's placeholders. No statement here has a `?` or `%` that means itself."""
    return statement.replace("?", "%s").encode()
