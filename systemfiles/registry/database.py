"""What a database under the registry does, be it SQLite in a file or PostgreSQL by URL.

Statements are plain SQL that both accept, with `?` for each value. What a write transaction did is on the disk when it
returns. Whatever goes wrong below is one StoreError, which gives this thread's connection up: the next use makes a new
one, and looks again at what it leads to.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from systemfiles.foundation.errors import SystemFilesError, UsageError
from systemfiles.registry.connections import Connections, unforked

DATABASE_VARIABLE = "SYSTEMFILES_DATABASE_URL"
BUSY_SECONDS = 60
"""How long one waits for others who write."""

BIGGEST = (1 << 63) - 1
Row = tuple[Any, ...]


def marks(values: Iterable[object]) -> str:
    """A placeholder for each of `values`."""
    return ", ".join("?" for _ in values)


class Transaction:
    """What may be done inside one. Values are texts, integers and None; others raise UsageError in every database."""

    def __init__(self, run: Callable[[str, Sequence[object]], Any], for_update: str) -> None:
        self._run = run
        self.for_update = for_update
        """What ends a SELECT of rows that nobody else shall change before the transaction ends; "" where who writes is
        alone."""

    def execute(self, statement: str, values: Sequence[object] = ()) -> int:
        """Runs one statement; returns how many rows it changed."""
        return int(self._run(statement, _storable(values)).rowcount)

    def rows(self, statement: str, values: Sequence[object] = ()) -> list[Row]:
        """What a query gives, all of it."""
        found: list[Row] = self._run(statement, _storable(values)).fetchall()
        return found


class Database(ABC):
    """Safe to share among threads, and among processes that are forked."""

    dialect: str
    """What SQLAlchemy calls it."""

    where: str
    """What it is called in messages: a path, or a URL without its password."""

    begin_reading: str
    begin_writing: str
    for_update: str

    def __init__(self) -> None:
        self._connections = Connections(self._connect, self._target)
        self._failures = 0

    def reading(self) -> contextlib.AbstractContextManager[Transaction]:
        """One consistent view. Raises StoreError."""
        return self._transaction(self.begin_reading)

    def writing(self) -> contextlib.AbstractContextManager[Transaction]:
        """Durable once the block has ended well; nothing happened when it has not. Raises StoreError, NoSpace."""
        return self._transaction(self.begin_writing)

    def identity(self) -> object:
        """What changes when this may not be the database any more that it was; None while there is none."""
        target = self._target()
        return None if target is None else (self._failures, target)

    def schema(self) -> str | None:
        """The version of the schema of what is there, None where there is nothing yet. Raises StoreError."""
        if self._target() is None:
            return None
        with self.reading() as transaction:
            if not transaction.rows(self._find_versions):
                return None
            found = transaction.rows("SELECT version_num FROM alembic_version")
        return str(found[0][0]) if found else None

    @abstractmethod
    def migrating(self) -> contextlib.AbstractContextManager[Any]:
        """A connection of its own for a migration, to a database that is made if it is not there. Raises StoreError."""

    def make_tables(self, connection: Any, script: str) -> bool:
        """Whether `script` made all tables, in one transaction on a connection of `migrating`, as there were none."""
        return False

    def close(self) -> None:
        """Closes this thread's connection; it is opened again by the next use."""
        with unforked:
            self._connections.drop()

    _find_versions: str
    """A query that finds something when there is a table alembic_version."""

    @abstractmethod
    def _connect(self) -> Any:
        """A new connection without any transaction."""

    @abstractmethod
    def _target(self) -> object:
        """What a connection would lead to now; None when there is nothing."""

    @abstractmethod
    def _run(self, connection: Any, statement: str, values: Sequence[object]) -> Any:
        """The driver's cursor, when the statement was executed."""

    @abstractmethod
    def _explain(self, error: Exception) -> SystemFilesError | None:
        """What to tell of an error of the driver; None for any other."""

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[Transaction]:
        with unforked, self._explaining():
            connection = self._begin(begin)
            try:
                yield Transaction(lambda statement, values: self._run(connection, statement, values), self.for_update)
                connection.commit()
            except BaseException:
                with contextlib.suppress(Exception):  # a connection that is lost has nothing to take back
                    connection.rollback()
                raise

    def _begin(self, begin: str) -> Any:
        connection = self._connections.get()
        connection.execute(begin)
        return connection

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except SystemFilesError:
            raise
        except Exception as error:
            told = self._explain(error)
            if told is None:
                raise
            self._connections.drop()
            self._failures += 1
            raise told from error


def _storable(values: Sequence[object]) -> Sequence[object]:
    """`values`, when every database keeps each of them as it is. Raises UsageError."""
    for value in values:
        if isinstance(value, str):
            if "\0" in value or not (value.isascii() or _is_utf8(value)):
                msg = f"{value[:100]!r} cannot be kept in the registry"
                raise UsageError(msg, details=[("allowed", "texts of Unicode characters, without NUL")])
        elif value is not None and (type(value) is not int or not -BIGGEST <= value <= BIGGEST):
            kind = "a number of so many digits" if isinstance(value, int) else f"a {type(value).__name__}"
            msg = f"{kind} cannot be kept in the registry"
            raise UsageError(msg, details=[("allowed", f"texts, and whole numbers of at most {BIGGEST}")])
    return values


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
