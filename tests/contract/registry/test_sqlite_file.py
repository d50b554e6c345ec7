"""Whatever becomes of the file: one typed error that says what to do, and work goes on when that was done."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from systemfiles.foundation.errors import StoreError
from systemfiles.registry.registry import Registry
from systemfiles.registry.sqlite import SQLite
from tests.contract.registry.support import Running, asset, is_whole, python, registry, use


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Registry]:
    """A registry that is in use, with an asset and a lease."""
    made = registry(tmp_path / "data")
    made.assets.register(asset("a"))
    made.leases.acquire(["a"], "vm-1", now=1000)
    with contextlib.closing(made):
        yield made


def file_of(opened: Registry) -> Path:
    database = opened.existing()
    assert isinstance(database, SQLite)
    return database.path


def remove(path: Path, *, all_of_it: bool = True) -> None:
    for suffix in ("", "-wal", "-shm") if all_of_it else ("",):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


# ── it is gone, or another one ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("all_of_it", [True, False], ids=["with -wal and -shm", "alone"])
def test_a_file_that_was_removed_is_made_anew_and_its_leases_are_lost(opened: Registry, all_of_it: bool) -> None:
    store_id, path, lost = opened.store_id, file_of(opened), opened.leases_lost
    remove(path, all_of_it=all_of_it)
    assert opened.leases.list(now=1000) == ()
    assert (lost, opened.leases_lost) == (False, True)
    assert opened.store_id == store_id
    opened.assets.register(asset("a"))
    use(opened)
    assert is_whole(path)


def test_a_process_that_has_the_removed_file_open_harms_no_other(opened: Registry, tmp_path: Path) -> None:
    """Its -shm would tell the others of frames that their -wal does not have."""
    path = file_of(opened)
    for number in range(100):
        opened.assets.register(asset(f"a{number}", metadata={"text": "x" * 2000}))
    remove(path, all_of_it=False)
    script = """
import sys
from pathlib import Path
from tests.contract.registry.support import asset, registry
other = registry(Path(sys.argv[1]))
for number in range(20):
    other.assets.register(asset(f"b{number}"))
"""
    done = python(script, tmp_path / "data")
    assert done.returncode == 0, done.stderr
    opened.assets.register(asset("a"))
    use(opened)
    assert is_whole(path)
    with opened.database.reading() as transaction:
        assert transaction.rows("SELECT count(*) FROM assets") == [(21,)]


def test_a_file_that_was_replaced_is_what_is_read_from_then_on(opened: Registry, tmp_path: Path) -> None:
    other = registry(tmp_path / "other")
    other.assets.register(asset("b"))
    other.close()
    path = file_of(opened)
    remove(path)
    shutil.copy(tmp_path / "other" / "registry.sqlite", path)
    assert opened.assets.get("b", now=1).id == "b"
    assert opened.leases_lost


def test_every_thread_notices_a_replaced_file(opened: Registry) -> None:
    path = file_of(opened)
    results: list[int] = []

    def work() -> None:
        opened.leases.list(now=1000)
        results.append(len(opened.leases.list(now=1000)))

    Running(work).result()
    remove(path)
    for _ in range(3):
        Running(work).result()
    assert results == [1, 0, 0, 0]


# ── it is damaged ────────────────────────────────────────────────────────────────────────────────────────────────────


def write(data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(data)

    return damage


def cut(length: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        os.truncate(path, length)

    return damage


def overwrite(start: int, length: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\xa5" * length)

    return damage


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere" / "registry.sqlite")


def lose_a_table(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE asset_leases")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "garbage": write(b"not a database" * 1000),
    "text": write(b"hello\n"),
    "a header alone": cut(100),
    "a page": cut(4096),
    "half a page": cut(6000),
    "zeroes": write(bytes(8192)),
    "no header": overwrite(0, 100),
    "no roots": overwrite(4096, 200_000),
    "a directory": become_directory,
    "a fifo": become_fifo,
    "a link to nowhere": become_dangling,
    "a table less": lose_a_table,
}


@pytest.mark.parametrize("in_use", [True, False], ids=["in use", "closed"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_typed_error_and_work_goes_on_when_it_was_moved_away(
    opened: Registry, damage: str, in_use: bool
) -> None:
    path = file_of(opened)
    opened.close()  # which empties the -wal
    if in_use:
        opened.leases.list(now=1000)
    DAMAGES[damage](path)
    told = []
    for _ in range(2):
        try:
            use(opened)
        except StoreError as error:
            told.append(error)
    for fault in told:
        assert str(path) in str(fault)
        assert fault.hint
    shutil.move(path, path.with_name("damaged"))
    remove(path)
    assert opened.leases_lost
    opened.assets.register(asset("a"))
    use(opened)
    assert is_whole(path)
    assert told or in_use


def test_an_empty_file_is_a_lost_registry(opened: Registry) -> None:
    path = file_of(opened)
    opened.close()
    os.truncate(path, 0)
    with pytest.raises(StoreError):  # from the tables that were there a moment ago
        opened.leases.list(now=1000)
    assert opened.leases_lost
    opened.assets.register(asset("a"))
    use(opened)


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    path = data / "registry.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE alembic_version (version_num TEXT); INSERT INTO alembic_version VALUES ('0000_theirs')"
        )
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not of systemfiles") as caught:
        registry(data).leases.list(now=1)
    assert caught.value.hint
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("alembic_version",)]
    assert before[:16] == b"SQLite format 3\0"


def test_tables_of_another_program_are_not_mixed_with_ours(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    path = data / "registry.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE assets (whatever TEXT)")
    with pytest.raises(StoreError):
        registry(data).leases.list(now=1)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("assets",)]
