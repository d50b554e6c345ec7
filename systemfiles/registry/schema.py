"""The version of the registry's schema, and how an older one becomes this release's.

The version is alembic's: one row in the table alembic_version. It is compared at the first use; alembic itself, which
takes 0.4 s to import, is only used where something is to change. migrations/versions has a file for each version.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from systemfiles.foundation.errors import StoreError
from systemfiles.registry.database import Database

HEAD = "0001"
"""The schema that this release knows. Versions are ordered by their names."""

_MIGRATIONS = Path(__file__).parent / "migrations"


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
    database.migrate(partial(_run, migrations))


def _run(migrations: Path, dialect: str, connect: Callable[[], Any], begin: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import create_engine, event
    from sqlalchemy.pool import StaticPool

    engine = create_engine(f"{dialect}://", creator=connect, poolclass=StaticPool)
    if begin:  # the driver would begin one only at the first INSERT, and migrations create tables
        event.listen(engine, "begin", lambda begun: begun.exec_driver_sql(begin))
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    with engine.begin() as transaction:
        config.attributes["connection"] = transaction
        command.upgrade(config, "head")
