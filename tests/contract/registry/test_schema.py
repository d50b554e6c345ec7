"""The schema: made once, wholly or not at all, however many come at once; a later one is refused, an older upgraded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import systemfiles.registry.schema
from systemfiles.foundation.errors import StoreError
from systemfiles.registry.leases import Leases
from systemfiles.registry.schema import HEAD, is_current, upgrade
from tests.conftest import CHECKOUT
from tests.contract.registry.support import Base, Running, World, asset, python, registry
from tests.postgres import Server


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Base]:
    """Nothing, or a database without tables."""
    if request.param == "sqlite":
        yield Base("sqlite", f"sqlite:///{tmp_path}/new/registry.sqlite")
        return
    server: Server = request.getfixturevalue("postgres")
    yield Base("postgresql", server.new_database())


def tables(base: Base) -> set[str]:
    if base.kind == "sqlite":
        found = base.sql("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    else:
        found = base.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return {row[0] for row in found}


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    """Those of this release and a directory to add to."""
    target = tmp_path / "migrations"
    source = Path(systemfiles.registry.schema.__file__).parent / "migrations"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def add(migrations: Path, body: str) -> None:
    text = f'from alembic import op\nrevision = "0002"\ndown_revision = "0001"\n\n\ndef upgrade():\n{body}\n'
    (migrations / "versions" / "0002_test.py").write_text(text)


def test_nothing_becomes_this_releases_schema(empty: Base) -> None:
    database = empty.open()
    assert not is_current(database)
    upgrade(database)
    assert is_current(database)
    assert tables(empty) == {
        *("stores", "assets", "asset_labels", "asset_leases", "asset_locations", "tombstones", "content_use"),
        "alembic_version",
    }
    upgrade(database)  # the same once more changes nothing
    assert empty.sql("SELECT version_num FROM alembic_version") == [(HEAD,)]


def test_the_tables_of_a_new_file_are_those_that_the_migrations_make(tmp_path: Path, migrations: Path) -> None:
    made = []
    for name, given in (("tables", {}), ("migrations", {"migrations": migrations})):
        base = Base("sqlite", f"sqlite:///{tmp_path}/{name}.sqlite")
        upgrade(base.open(), **given)
        rows = base.sql("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name")
        made.append([(*row[:3], " ".join(str(row[3]).split()).replace("( ", "(")) for row in rows])
        assert base.sql("SELECT version_num FROM alembic_version") == [(HEAD,)]
    assert made[0] == made[1]


def test_a_new_host_imports_no_alembic(tmp_path: Path) -> None:
    script = (
        "import sys; from systemfiles import SystemFiles; SystemFiles(sys.argv[1]).holdings.registry.store_id; "
        "assert not {'alembic', 'sqlalchemy'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=CHECKOUT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def together(script: str, *arguments: str | Path) -> list[str]:
    """What eight processes print that run this at one moment, each with a name of its own as the first argument."""
    prelude = """
import sys
import alembic.command, sqlalchemy
from pathlib import Path
from systemfiles.registry.assets import Assets
from systemfiles.registry.schema import is_current, upgrade
from tests.contract.registry.support import Base, asset, registry
print("ready", flush=True)
sys.stdin.readline()
"""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", prelude + script, f"a{number}", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )
        for number in range(8)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    printed = []
    for worker in workers:
        output, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        printed.append(output)
    return printed


def test_eight_processes_that_open_nothing_at_once_make_one_schema(empty: Base) -> None:
    script = """
database = Base(*sys.argv[2:4]).open()
if not is_current(database):
    upgrade(database)
Assets(database).register(asset(sys.argv[1]))
"""
    together(script, empty.kind, empty.url)
    assert empty.sql("SELECT count(*) FROM assets") == [(8,)]
    assert empty.sql("SELECT version_num FROM alembic_version") == [(HEAD,)]


_ENTER = """
opened = registry(Path(sys.argv[2]), url=sys.argv[3] or None)
opened.assets.register(asset(sys.argv[1]))
print(opened.store_id, opened.leases_lost)
"""


def test_eight_processes_that_open_one_data_directory_are_one_store(tmp_path: Path) -> None:
    answers = together(_ENTER, tmp_path / "data", "")
    assert {*answers} == {f"{registry(tmp_path / 'data').store_id} False\n"}


def test_eight_processes_that_open_it_with_a_database_elsewhere_are_one_store(tmp_path: Path, empty: Base) -> None:
    answers = together(_ENTER, tmp_path / "data", empty.url)
    assert {*answers} == {f"{registry(tmp_path / 'data', url=empty.url).store_id} False\n"}


def test_threads_that_open_data_directories_at_once_get_one_each(tmp_path: Path) -> None:
    opened = [registry(tmp_path / f"data-{number}") for number in range(6)]
    threads = [Running(partial(getattr, each, "store_id")) for each in opened]
    assert len({thread.result() for thread in threads}) == 6
    for each in opened:
        each.assets.register(asset("a"))
        assert each.leases.acquire(["a"], "vm-1", now=1000).asset_ids == ("a",)


def test_a_process_that_is_killed_while_it_migrates_leaves_nothing_of_it(empty: Base, migrations: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from systemfiles.registry.schema import upgrade
from tests.contract.registry.support import Base
database = Base(*sys.argv[1:3]).open()
import alembic.op
real = alembic.op.execute
count = 0
def execute(statement):
    global count
    real(statement)
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
alembic.op.execute = execute
upgrade(database, migrations=Path(sys.argv[4]))
"""
    for after in (1, 5, 12):
        done = python(script, empty.kind, empty.url, str(after), str(migrations))
        assert done.returncode == -9, done.stderr
        assert tables(empty) == set()
        assert empty.open().schema() is None
    upgrade(empty.open())
    assert is_current(empty.open())


# ── a second migration ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_later_migration_keeps_what_is_there(empty: Base, migrations: Path) -> None:
    upgrade(empty.open())
    world = World(empty)
    world.add("a", "b", labels={"x": "y"})
    lease = world.leases.acquire(["a"], "vm-1", now=1000)
    add(
        migrations,
        """
    op.execute("ALTER TABLE assets ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'")
    op.execute("CREATE TABLE more (id TEXT PRIMARY KEY)")
    with op.batch_alter_table("assets") as table:  # which builds it anew in SQLite
        table.alter_column("colour", new_column_name="hue")
        table.drop_column("public_url")
""",
    )
    assert not is_current(world.database, "0002")
    upgrade(world.database, migrations=migrations)
    assert is_current(world.database, "0002")
    assert empty.sql("SELECT id, hue FROM assets ORDER BY id") == [("a", "red"), ("b", "red")]
    assert empty.sql("SELECT count(*) FROM asset_labels") == [(2,)]
    assert empty.sql("SELECT count(*) FROM asset_locations") == [(2,)]
    assert Leases(world.database).list(now=1000) == (lease,)
    if empty.kind == "sqlite":
        assert empty.sql("PRAGMA foreign_key_check") == []


@pytest.mark.parametrize(
    "fault",
    ['op.execute("INSERT INTO missing VALUES (1)")', 'op.execute("nonsense")', 'op.execute("DROP TABLE assets, x")'],
)
def test_a_migration_that_fails_changes_nothing(empty: Base, migrations: Path, fault: str) -> None:
    upgrade(empty.open())
    world = World(empty)
    world.add("a")
    add(migrations, f"    op.execute('CREATE TABLE more (id TEXT)')\n    op.execute('DELETE FROM assets')\n    {fault}")
    with pytest.raises(StoreError) as caught:
        upgrade(world.database, migrations=migrations)
    assert "registry" in caught.value.summary
    assert "more" not in tables(empty)
    assert is_current(world.database)
    assert world.assets.get("a", now=1).id == "a"


def test_writers_wait_for_a_migration(empty: Base, migrations: Path) -> None:
    """And readers see the old schema or the new one."""
    upgrade(empty.open())
    world = World(empty)
    world.add("a")
    add(migrations, "    op.execute('ALTER TABLE assets ADD COLUMN more TEXT')\n    import time; time.sleep(1)")
    script = """
import sys
from pathlib import Path
from systemfiles.registry.schema import upgrade
from tests.contract.registry.support import Base
upgrade(Base(*sys.argv[1:3]).open(), migrations=Path(sys.argv[3]))
"""
    words = [sys.executable, "-c", script, empty.kind, empty.url, str(migrations)]
    with subprocess.Popen(words, cwd=CHECKOUT) as process:
        number = 0
        while process.poll() is None:
            world.leases.acquire(["a"], f"vm-{number}", now=1000)
            assert world.assets.get("a", now=1, access=False).reference_count == number + 1
            number += 1
    assert process.returncode == 0
    assert is_current(world.database, "0002")
    assert world.assets.get("a", now=1, access=False).reference_count == number > 0


# ── a later release's ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_schema_of_a_later_release_is_refused_and_left_alone(empty: Base, tmp_path: Path) -> None:
    upgrade(empty.open())
    empty.sql("UPDATE alembic_version SET version_num = '0099'")
    for _ in range(2):
        with pytest.raises(StoreError, match="later release") as caught:
            registry(tmp_path / "data", url=empty.url).leases.list(now=1)
        assert ("its schema", "0099") in caught.value.details
        assert caught.value.hint
    assert empty.sql("SELECT version_num FROM alembic_version") == [("0099",)]
    assert empty.sql("SELECT count(*) FROM stores") == [(0,)]


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_alembic_and_sqlalchemy_are_not_imported_where_the_schema_is_current(base: Base, tmp_path: Path) -> None:
    registry(tmp_path / "data", url=base.url).assets.register(asset("a"))
    script = """
import sys
from pathlib import Path
from tests.contract.registry.support import Base
for name in [name for name in sys.modules if name.partition(".")[0] in ("alembic", "sqlalchemy")]:
    del sys.modules[name]
from systemfiles.foundation.paths import Paths
from systemfiles.registry.registry import Registry
registry = Registry(Paths(Path(sys.argv[1])), url=sys.argv[2])
registry.leases.release(registry.leases.acquire(["a"], "vm-1", now=1000).id, now=1000)
print(registry.leases_lost, "alembic" in sys.modules, "sqlalchemy" in sys.modules)
"""
    done = python(script, tmp_path / "data", base.url)
    assert done.stdout == "False False False\n", done.stderr


def test_importing_the_registry_imports_no_driver_of_a_server_and_nothing_heavy() -> None:
    script = """
import sys
before = {*sys.modules}
import systemfiles.registry.registry
new = {name.partition(".")[0] for name in {*sys.modules} - before}
print(*sorted(new - {*sys.stdlib_module_names} - {"systemfiles"}))
"""
    done = python(script)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_importing_the_registry_is_quick() -> None:
    """Ten times what it takes; SQLAlchemy or pydantic would be a multiple of that."""
    script = """
import sys, time
started = time.process_time()
import systemfiles.registry.registry
print(time.process_time() - started)
"""
    assert min(float(python(script).stdout) for _ in range(3)) < 0.3
