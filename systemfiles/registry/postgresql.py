"""The registry in PostgreSQL, which several hosts may share. `psycopg` is imported by whoever connects."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from systemfiles.foundation.errors import StoreError, SystemFilesError, ToolMissing, UsageError
from systemfiles.registry.connections import unforked
from systemfiles.registry.database import BUSY_SECONDS, DATABASE_VARIABLE, Database

if TYPE_CHECKING:
    import psycopg

_SCHEME = re.compile(r"postgres(ql)?(\+psycopg)?://")
_URL = re.compile(r"(?P<scheme>postgresql://)((?P<user>[^:@/?#]*)(:[^@/?#]*)?@)?(?P<place>[^@?#]*)(\?[^@]*)?")
_DEFAULTS: dict[str, Any] = {
    "application_name": "systemfiles",
    "connect_timeout": 10,
    "tcp_user_timeout": 30_000,  # milliseconds until a host that does not answer is given up
}
_UNREACHABLE = f"{DATABASE_VARIABLE} must name a database that exists, on a server that runs and lets this user in"
_HINTS = {
    "25006": "this server only reads: name the primary",
    "40P01": "try again: somebody changed the same rows in another order",
    "42501": "grant the user the right to make tables, and to read and write them",
    "53100": "the disk of the server is full",
    "55P03": f"others have been writing to the same rows for {BUSY_SECONDS} s",
}
"""By SQLSTATE. Source: PostgreSQL's documentation, appendix A."""


class PostgreSQL(Database):
    """A server's database."""

    dialect = "postgresql+psycopg"
    begin_reading = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    begin_writing = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"  # after a lock one sees what others did
    for_update = "FOR UPDATE"
    _find_versions = "SELECT 1 WHERE to_regclass('alembic_version') IS NOT NULL"

    def __init__(self, url: str) -> None:
        """Raises UsageError for one in which a password could be taken for something else, and shown."""
        self._url = _SCHEME.sub("postgresql://", url, count=1)
        parts = _URL.fullmatch(self._url)
        if parts is None:
            raise _unreadable()
        self.where = f"{parts['scheme']}{parts['user'] or ''}{'@' if parts['user'] else ''}{parts['place']}"
        super().__init__()

    @staticmethod
    def owns(url: str) -> bool:
        """Whether it is the URL of one."""
        return _SCHEME.match(url) is not None

    @contextlib.contextmanager
    def migrating(self) -> Iterator[psycopg.Connection]:
        with self._explaining(), unforked, contextlib.closing(self._connect()) as connection:
            yield connection

    def _target(self) -> object:
        return self.where

    def _connect(self) -> psycopg.Connection:
        driver = "psycopg"
        try:
            import psycopg
            from psycopg.conninfo import conninfo_to_dict
        except ImportError:
            raise ToolMissing(driver, hint="pip install 'systemfiles[postgres]'") from None
        try:
            told = conninfo_to_dict(self._url)
        except psycopg.ProgrammingError:  # which quotes it, perhaps with the password
            raise _unreadable() from None
        connection = psycopg.connect(**_DEFAULTS | told | {"client_encoding": "utf8"}, autocommit=True)
        connection.execute(f"SET lock_timeout = '{BUSY_SECONDS}s'")
        return connection

    def _begin(self, begin: str) -> Any:
        if self._connections.is_new():
            return super()._begin(begin)
        from psycopg import OperationalError

        try:
            return super()._begin(begin)
        except OperationalError:  # the server was restarted since, perhaps; nothing is done yet
            self._connections.drop()
            return super()._begin(begin)

    def _run(self, connection: psycopg.Connection, statement: str, values: Sequence[object]) -> Any:
        return connection.execute(_as_format(statement), values)

    def _explain(self, error: Exception) -> SystemFilesError | None:
        import psycopg

        if not isinstance(error, psycopg.Error):
            return None
        hint = _HINTS.get(error.sqlstate or "")
        if hint is None and isinstance(error, psycopg.OperationalError):
            hint = _UNREACHABLE
        return StoreError(f"the registry {self.where} cannot be used ({' '.join(str(error).split()):.300})", hint=hint)


def _unreadable() -> UsageError:
    expected = "postgresql://USER:PASSWORD@HOST/NAME, each percent-encoded"
    return UsageError(f"{DATABASE_VARIABLE} cannot be read", details=[("expected", expected)])


@lru_cache(maxsize=512)
def _as_format(statement: str) -> bytes:
    """`statement` with psycopg's placeholders. No statement here has a `?` or `%` that means itself."""
    return statement.replace("?", "%s").encode()
