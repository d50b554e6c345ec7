"""PostgreSQL comes and goes: a typed error without the password, and then it works again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from systemfiles.foundation.errors import StoreError, UsageError
from systemfiles.registry.database import DATABASE_VARIABLE
from systemfiles.registry.leases import Leases
from systemfiles.registry.postgresql import PostgreSQL
from systemfiles.registry.schema import upgrade
from tests.contract.registry.support import Running, asset, python, registry, spawned_environment
from tests.postgres import PASSWORD, USER, Server


@pytest.fixture
def url(postgres: Server) -> Iterator[str]:
    """A database of its own; the server runs again afterwards, whatever was done to it."""
    yield postgres.new_database()
    postgres.stop(signal.SIGKILL)
    postgres.start()


def told(call: object) -> StoreError:
    with pytest.raises(StoreError) as caught:
        call()  # type: ignore[operator]
    for text in (str(caught.value), repr(caught.value), caught.value.summary, str(caught.value.hint)):
        assert PASSWORD not in text
    return caught.value


def test_a_server_that_was_killed_and_started_again_between_calls_is_not_noticed(
    postgres: Server, url: str, tmp_path: Path
) -> None:
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))
    lease = opened.leases.acquire(["a"], "vm-1", now=1000)
    for how in (signal.SIGKILL, signal.SIGINT):
        postgres.stop(how)
        postgres.start()
        assert opened.leases.list(now=1000) == (lease,)
        opened.leases.renew(lease.id, now=1000)
    assert not opened.leases_lost


def test_a_server_that_is_down_is_one_typed_error_until_it_is_up(postgres: Server, url: str, tmp_path: Path) -> None:
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))
    postgres.stop(signal.SIGKILL)
    for _ in range(3):
        error = told(lambda: opened.leases.acquire(["a"], "vm-1", now=1000))
        assert f"{USER}@127.0.0.1:{postgres.port}" in error.summary
        assert DATABASE_VARIABLE in str(error.hint)
    postgres.start()
    assert opened.leases.acquire(["a"], "vm-1", now=1000).asset_ids == ("a",)
    assert not opened.leases_lost


def test_a_server_that_dies_in_a_transaction_has_kept_nothing_of_it(postgres: Server, url: str, tmp_path: Path) -> None:
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))

    def interrupted() -> None:
        with opened.database.writing() as transaction:
            transaction.execute("DELETE FROM assets")
            postgres.stop(signal.SIGKILL)
            transaction.rows("SELECT 1")

    told(interrupted)
    postgres.start()
    assert opened.assets.get("a", now=1).id == "a"


def test_a_connection_that_the_server_ended_is_made_anew(postgres: Server, url: str, tmp_path: Path) -> None:
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))
    with postgres.connection() as connection:
        name = url.rpartition("/")[2]
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
    assert opened.assets.get("a", now=1).id == "a"


def test_every_thread_gets_over_a_restart(postgres: Server, url: str, tmp_path: Path) -> None:
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))
    postgres_went = [False]

    def work() -> int:
        first = len(opened.leases.list(now=1000))
        while not postgres_went[0]:
            pass
        return first + len(opened.leases.list(now=1000))

    threads = [Running(work) for _ in range(3)]
    assert all(thread.waits() for thread in threads)
    postgres.stop(signal.SIGKILL)
    postgres.start()
    postgres_went[0] = True
    assert [thread.result() for thread in threads] == [0, 0, 0]


def test_a_database_that_was_made_anew_has_lost_the_leases(postgres: Server, url: str, tmp_path: Path) -> None:
    """Though this process has not been told."""
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))
    opened.leases.acquire(["a"], "vm-1", now=1000)
    name = url.rpartition("/")[2]
    with postgres.connection() as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
        error = told(lambda: opened.leases.list(now=1))
        assert "a database that exists" in str(error.hint)
        connection.execute(f"CREATE DATABASE {name}".encode())
    assert opened.leases.list(now=1) == ()
    assert opened.leases_lost
    opened.accept_lost_leases()
    assert not opened.leases_lost


def test_tables_that_were_dropped_are_made_anew_and_the_leases_lost(postgres: Server, url: str, tmp_path: Path) -> None:
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))
    with postgres.connection(url.rpartition("/")[2]) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    told(lambda: opened.leases.list(now=1))
    assert opened.leases.list(now=1) == ()
    assert opened.leases_lost


def test_rows_that_were_deleted_are_leases_that_are_lost(postgres: Server, url: str, tmp_path: Path) -> None:
    """A dump of another day was put in, perhaps: who does not know this store knows none of its leases."""
    opened = registry(tmp_path, url=url)
    assert not opened.leases_lost
    with postgres.connection(url.rpartition("/")[2]) as connection:
        connection.execute("DELETE FROM stores")
    assert opened.leases_lost


# ── URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:SECRET@db.test/name", "postgresql://me@db.test/name"),
        ("postgres://me:SECRET@db.test:5433/name", "postgresql://me@db.test:5433/name"),
        ("postgresql+psycopg://me:SECRET@db.test/name", "postgresql://me@db.test/name"),
        ("postgresql://me@db.test/name", "postgresql://me@db.test/name"),
        ("postgresql://db.test/name", "postgresql://db.test/name"),
        ("postgresql:///name?host=/run/postgresql&user=me&password=SECRET", "postgresql:///name"),
        ("postgresql://me:SEC%40RET@db.test/name?sslmode=require", "postgresql://me@db.test/name"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert PostgreSQL(url).where == shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:SEC/RET@127.0.0.1:1/name",
        "postgresql://me:SEC@RET@127.0.0.1:1/name",
        "postgresql://me:RET?SEC@127.0.0.1:1/name",
        "postgresql://me:RET#SEC@127.0.0.1:1/name",
        "postgresql://me:SEC%ZZRET@127.0.0.1:1/name",
        "postgresql://127.0.0.1:1/name?password=SEC@RET",
        "postgresql://me:SECRET@127.0.0.1:port/name",
        "postgresql://me:SECRET@[::1/name",
        "postgresql://me:SECRET@127.0.0.1:1/name?nonsense=RET",
        "postgresql://me:SECRET@127.0.0.1:1/name",
    ],
)
def test_no_error_shows_a_password_however_the_url_is_written(url: str) -> None:
    with pytest.raises((UsageError, StoreError)) as caught:
        PostgreSQL(url).schema()
    shown = f"{caught.value} {caught.value!r}"
    assert "SEC" not in shown
    assert "RET" not in shown


@pytest.mark.parametrize("url", ["mysql://a:SECRET@b/c", "postgresql", "sqlite:///relative", "sqlite://", "/path", "x"])
def test_a_url_of_something_else_is_refused_and_not_shown(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry(tmp_path, url=url)
    assert "SECRET" not in str(caught.value)
    assert "postgresql://" in str(caught.value)


def test_a_wrong_password_says_where_it_is_set(postgres: Server, tmp_path: Path) -> None:
    url = postgres.url("postgres").replace(PASSWORD, "wrong-one")
    error = told(lambda: registry(tmp_path, url=url).leases.list(now=1))
    assert DATABASE_VARIABLE in str(error.hint)
    assert "wrong-one" not in str(error)


def test_a_database_that_does_not_exist_says_so(postgres: Server, tmp_path: Path) -> None:
    error = told(lambda: registry(tmp_path, url=postgres.url("missing")).leases.list(now=1))
    assert "missing" in error.summary


def test_a_user_who_may_make_no_tables_is_told_what_to_grant(postgres: Server, tmp_path: Path) -> None:
    name = postgres.new_database().rpartition("/")[2]
    with postgres.connection() as connection:
        connection.execute("CREATE ROLE reader LOGIN")
    url = postgres.socket_url(name).replace(f"{USER}@", "reader@")
    error = told(lambda: registry(tmp_path, url=url).leases.list(now=1))
    assert "grant" in str(error.hint)


def test_a_server_that_only_reads_says_so(postgres: Server, tmp_path: Path) -> None:
    url = postgres.new_database()
    upgrade(PostgreSQL(url))
    with psycopg.connect(url, autocommit=True) as connection:
        name = url.rpartition("/")[2]
        connection.execute(f"ALTER DATABASE {name} SET transaction_read_only = on".encode())
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))  # it was asked to write explicitly, and may
    assert opened.assets.get("a", now=1).id == "a"


def test_a_socket_does_as_well_as_a_port(postgres: Server, tmp_path: Path) -> None:
    name = postgres.new_database().rpartition("/")[2]
    opened = registry(tmp_path, url=postgres.socket_url(name))
    opened.assets.register(asset("a"))
    assert registry(tmp_path, url=postgres.url(name)).assets.get("a", now=1).id == "a"


def test_the_variable_names_the_database(postgres: Server, tmp_path: Path) -> None:
    url = postgres.new_database()
    script = """
import sys
from pathlib import Path
from systemfiles.foundation.paths import Paths
from systemfiles.registry.registry import Registry
print(Registry(Paths(Path(sys.argv[1]))).database.where)
"""
    done = python(script, tmp_path, env={**spawned_environment(), DATABASE_VARIABLE: url})
    assert done.stdout.strip() == url.replace(f":{PASSWORD}", "")
    assert not (tmp_path / "registry.sqlite").exists()


def test_texts_of_a_database_in_another_encoding_come_back_or_are_refused(postgres: Server, tmp_path: Path) -> None:
    with postgres.connection() as connection:
        connection.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C'")
    opened = registry(tmp_path, url=postgres.url("latin"))
    opened.assets.register(asset("a", name="é"))
    assert opened.assets.get("a", now=1).name == "é"
    told(lambda: opened.assets.register(asset("b", name="\N{SNOWMAN}")))
    assert opened.assets.get("a", now=1).name == "é"


def test_without_the_driver_one_is_told_what_to_install(postgres: Server, tmp_path: Path) -> None:
    script = """
import sys
sys.modules["psycopg"] = None
from pathlib import Path
from systemfiles.foundation.errors import ToolMissing
from systemfiles.foundation.paths import Paths
from systemfiles.registry.registry import Registry
try:
    Registry(Paths(Path(sys.argv[1])), url=sys.argv[2]).leases.list(now=1)
except ToolMissing as error:
    print(error.hint)
"""
    done = python(script, tmp_path, postgres.url("postgres"))
    assert "systemfiles[postgres]" in done.stdout, done.stderr


def test_prepared_statements_survive_a_change_of_their_tables(postgres: Server, tmp_path: Path) -> None:
    """As by the migration of a later release, which only adds."""
    url = postgres.new_database()
    opened = registry(tmp_path, url=url)
    opened.assets.register(asset("a"))
    for _ in range(10):
        opened.assets.get("a", now=1)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE assets ADD COLUMN more TEXT")
    assert opened.assets.get("a", now=1).id == "a"
    assert Leases(opened.database).acquire(["a"], "vm-1", now=1).asset_ids == ("a",)
