"""The version of the registry's schema, and how an older one becomes this release's.

The version is alembic's: one row in the table alembic_version. It is compared at the first use; alembic itself, which
takes 0.4 s to import, is only used where something is to change. migrations/versions has a file for each version; of
the first, the statements stand alone, so that a new host needs no alembic.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from systemfiles.foundation.errors import StoreError
from systemfiles.registry.database import Database

HEAD = "0001"
"""The schema that this release knows. Versions are ordered by their names."""

_alone = threading.Lock()  # alembic keeps what it is at in a global variable
_MIGRATIONS = Path(__file__).parent / "migrations"
_TABLES = _MIGRATIONS / "versions" / "0001_assets.sql"
_STAMP = f"""
CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO alembic_version VALUES ('{HEAD}');
"""


def is_current(database: Database, head: str = HEAD) -> bool:
    """Whether the schema is this release's. Raises StoreError for a later one."""
    version = database.schema()
    if version is not None and version > head:
        msg = f"the registry {database.where} was written by a later release of systemfiles"
        details = [("its schema", version), ("known here", head)]
        raise StoreError(msg, details=details, hint="upgrade systemfiles on this host")
    return version == head


def upgrade(database: Database, *, migrations: Path = _MIGRATIONS) -> None:
    """Brings the schema, or nothing yet, to the last of `migrations`: wholly, or not at all. Raises StoreError."""
    with database.migrating() as connection, _alone:
        if migrations != _MIGRATIONS or not database.make_tables(connection, f"{_TABLES.read_text()}{_STAMP}"):
            _run(database, connection, migrations)


def _run(database: Database, connection: Any, migrations: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError
    from sqlalchemy import create_engine, event
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.pool import StaticPool

    engine = create_engine(f"{database.dialect}://", creator=lambda: connection, poolclass=StaticPool)
    # the drivers would begin one only at the first INSERT, or never, and migrations make tables
    event.listen(engine, "begin", lambda begun: begun.exec_driver_sql(database.begin_writing))
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    try:
        with engine.begin() as transaction:
            config.attributes["connection"] = transaction
            command.upgrade(config, "head")
    except DBAPIError as error:
        raise (error.orig or error) from error
    except CommandError as error:
        msg = f"the registry {database.where} has a schema that is not of systemfiles ({error})"
        raise StoreError(msg, hint="give systemfiles a database of its own") from error
