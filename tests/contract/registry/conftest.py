"""Databases of both kinds; every test that asks for `world` or `base` runs on each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from systemfiles.registry.postgresql import PostgreSQL
from systemfiles.registry.schema import upgrade
from systemfiles.registry.sqlite import SQLite
from tests.contract.registry.support import Base, World, migrated_copy
from tests.postgres import Server, postgres

__all__ = ["postgres"]


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SYSTEMFILES_DATABASE_URL", raising=False)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file without connections, to be copied."""
    database = SQLite(tmp_path_factory.mktemp("template") / "registry.sqlite")
    upgrade(database)
    return database.path


@pytest.fixture(scope="session")
def postgres_base(postgres: Server) -> Base:
    """A database that is used again and again, since making one takes long."""
    url = postgres.new_database()
    upgrade(PostgreSQL(url))
    return Base("postgresql", url)


@pytest.fixture(params=["sqlite", "postgresql"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    if request.param == "sqlite":
        return migrated_copy(request.getfixturevalue("sqlite_template"), tmp_path / "registry.sqlite")
    base: Base = request.getfixturevalue("postgres_base")
    for table in ("asset_leases", "assets", "tombstones", "stores", "content_use"):
        base.sql(f"DELETE FROM {table}")
    return base


@pytest.fixture
def world(base: Base) -> Iterator[World]:
    made = World(base)
    with contextlib.closing(made.database):
        yield made
