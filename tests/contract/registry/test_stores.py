"""Which store a data directory is, and whether its leases are lost: by what is left of store.json and the database."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from systemfiles.foundation.errors import LockTimeout, StoreError
from systemfiles.foundation.lock import locked
from systemfiles.foundation.paths import Paths
from systemfiles.registry.registry import Registry
from tests.contract.registry.support import Base, Clock, Running, asset, pending, registry
from tests.postgres import Server


def store_file(data: Path) -> Path:
    return Paths(data).store


def hold(opened: Registry, *, holder: str = "vm-1") -> None:
    """Registers an asset of this store and leases it."""
    opened.assets.register(asset("a"), store_id=opened.store_id, path="files/a")
    opened.leases.acquire(["a"], holder, now=1000, store_id=opened.store_id)


def test_constructing_one_touches_nothing(tmp_path: Path) -> None:
    Registry(Paths(tmp_path / "data"))
    assert [*tmp_path.iterdir()] == []


def test_a_store_keeps_its_id_whoever_opens_it(tmp_path: Path, base: Base) -> None:
    first = registry(tmp_path / "data", url=base.url)
    hold(first)
    second = registry(tmp_path / "data", url=base.url)
    assert second.store_id == first.store_id == json.loads(store_file(tmp_path / "data").read_text())["store"]
    assert len(second.leases.list(now=1000)) == 1
    assert not second.leases_lost
    assert base.sql("SELECT count(*) FROM stores") == [(1,)]


def test_asking_what_exists_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    opened = registry(tmp_path / "data")
    assert opened.existing() is None
    assert opened.known_store() is None
    assert [*(tmp_path / "data").iterdir()] == []
    hold(opened)
    again = registry(tmp_path / "data")
    assert again.existing() is not None
    assert again.known_store() == opened.store_id


def seen(opened: Registry) -> list[str] | None:
    """The assets that there are to somebody who only looks."""
    found = opened.look()
    if found is None:
        return None
    with found[0].reading() as transaction:
        return [row[0] for row in transaction.rows("SELECT id FROM assets ORDER BY id")]


def traces(data: Path) -> dict[str, tuple[int, int, int]]:
    stats = {str(path.relative_to(data)): path.stat() for path in data.rglob("*")}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def test_who_only_looks_leaves_no_trace_and_sees_what_is_there_now(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    looking = registry(data)
    assert seen(looking) is None
    assert traces(data) == {}
    other = registry(data)
    for number, id in enumerate("abc"):
        other.assets.register(asset(id))
        assert seen(looking) == [*"abc"[: number + 1]]  # while it is in use
        other.close()
        before = traces(data)
        assert seen(looking) == [*"abc"[: number + 1]]
        looking.close()
        assert traces(data) == before


def test_who_only_looks_is_not_given_what_is_of_two_moments(tmp_path: Path) -> None:
    other = registry(tmp_path / "data")
    other.assets.register(asset("a"))
    other.close()
    found = registry(tmp_path / "data").look()
    assert found is not None

    def read() -> None:
        with found[0].reading() as transaction:
            transaction.rows("SELECT id FROM assets")
            other.assets.register(asset("b"))
            other.close()  # which writes it into the file

    with pytest.raises(StoreError, match="changed while it was read"):
        read()
    assert seen(registry(tmp_path / "data")) == ["a", "b"]


def test_opening_what_is_there_writes_nothing_and_waits_for_nobody(tmp_path: Path) -> None:
    hold(registry(tmp_path / "data"))
    paths = Paths(tmp_path / "data")
    with locked(paths.lock("registry")), contextlib.closing(sqlite3.connect(paths.registry)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        assert len(registry(tmp_path / "data").leases.list(now=1000)) == 1


def test_who_has_to_wait_for_its_making_waits_as_long_as_told(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    with locked(paths.lock("registry")):
        made = Registry(paths, clock=Clock(), timeout=0.1)
        assert isinstance(Running(lambda: _error_of(lambda: made.leases.list(now=1))).result(), LockTimeout)
    assert made.leases.list(now=1) == ()


def _error_of(call: Callable[[], object]) -> StoreError | None:
    try:
        call()
    except StoreError as error:
        return error
    return None


# ── the database is lost ─────────────────────────────────────────────────────────────────────────────────────────────


def lose(base: Base) -> None:
    for table in ("asset_leases", "assets", "stores", "tombstones"):
        base.sql(f"DELETE FROM {table}")


def test_a_database_that_does_not_know_the_store_has_lost_its_leases(tmp_path: Path, base: Base) -> None:
    first = registry(tmp_path / "data", url=base.url)
    hold(first)
    lose(base)
    again = registry(tmp_path / "data", url=base.url)
    assert again.leases_lost
    assert again.store_id == first.store_id
    assert first.leases_lost  # a process that has it open knows as well
    assert registry(tmp_path / "data", url=base.url).leases_lost  # and it stays so


def test_lost_leases_are_accepted_once(tmp_path: Path, base: Base) -> None:
    hold(registry(tmp_path / "data", url=base.url))
    lose(base)
    again = registry(tmp_path / "data", url=base.url)
    again.accept_lost_leases()
    assert not again.leases_lost
    assert not registry(tmp_path / "data", url=base.url).leases_lost
    lose(base)
    assert registry(tmp_path / "data", url=base.url).leases_lost


# ── there is more than one database ──────────────────────────────────────────────────────────────────────────────────


def test_a_database_that_knew_the_store_before_does_not_know_all_its_leases(tmp_path: Path, base: Base) -> None:
    """As for a command under sudo, which drops the environment."""
    before = registry(tmp_path / "data")
    hold(before)
    told = registry(tmp_path / "data", url=base.url)
    hold(told)
    assert registry(tmp_path / "data").leases_lost
    assert registry(tmp_path / "data", url=base.url).leases_lost
    assert told.others == ("registry.sqlite",)
    told.accept_lost_leases()
    assert registry(tmp_path / "data").others
    assert not registry(tmp_path / "data", url=base.url).leases_lost


def test_another_user_of_one_database_is_no_other_database(tmp_path: Path) -> None:
    for user in ("", "one@", "two@"):
        named = Registry(Paths(tmp_path / "data"), url=f"postgresql://{user}db.example.com:5432/assets")
        assert named._name == "postgresql://db.example.com:5432/assets"


# ── store.json is lost ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_database_in_the_data_directory_knows_whose_it_is(tmp_path: Path) -> None:
    first = registry(tmp_path / "data")
    hold(first)
    store_file(tmp_path / "data").unlink()
    again = registry(tmp_path / "data")
    assert again.store_id == first.store_id
    assert not again.leases_lost
    assert len(again.leases.list(now=1000)) == 1
    assert again.known_store() == first.store_id


def test_elsewhere_the_store_begins_anew_and_its_leases_are_lost(tmp_path: Path, base: Base) -> None:
    first = registry(tmp_path / "data", url=base.url)
    hold(first)
    store_file(tmp_path / "data").unlink()
    again = registry(tmp_path / "data", url=base.url)
    assert again.store_id != first.store_id
    assert again.leases_lost


def test_elsewhere_a_store_that_had_no_leases_has_lost_none(tmp_path: Path, base: Base) -> None:
    """As when a process was killed between the row and store.json."""
    first = registry(tmp_path / "data", url=base.url)
    assert first.store_id
    store_file(tmp_path / "data").unlink()
    assert not registry(tmp_path / "data", url=base.url).leases_lost


def test_another_data_directory_never_takes_a_store_that_is_not_its_own(tmp_path: Path, base: Base) -> None:
    first = registry(tmp_path / "one", url=base.url)
    hold(first)
    second = registry(tmp_path / "two", url=base.url)
    assert second.store_id != first.store_id
    assert not second.leases_lost
    assert not first.leases_lost


def test_among_several_stores_nobody_guesses(tmp_path: Path) -> None:
    """Somebody put another store.json in, and then it was lost."""
    hold(registry(tmp_path / "data"))
    store_file(tmp_path / "data").write_text('{"schema": 1, "store": "another"}')
    assert registry(tmp_path / "data").leases_lost
    store_file(tmp_path / "data").unlink()
    again = registry(tmp_path / "data")
    assert again.leases_lost
    assert again.store_id != "another"


def test_a_data_directory_that_was_copied_with_its_database_is_the_same_store(tmp_path: Path) -> None:
    first = registry(tmp_path / "data")
    hold(first)
    first.close()
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    copied = registry(tmp_path / "copy")
    assert copied.store_id == first.store_id
    assert not copied.leases_lost
    assert len(copied.leases.list(now=1000)) == 1


# ── store.json is damaged, or another's ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "5",
        "{}",
        '{"schema": 1}',
        '{"schema": 1, "store": ""}',
        '{"schema": 1, "store": null}',
        '{"schema": 1, "store": 5}',
        '{"schema": 1, "store": ["a"]}',
        '{"schema": 1, "store": "a\\u0000b"}',
        '{"schema": 1, "store": "\\ud800"}',
        '{"schema": 1, "store": "a/../b"}',
        '{"schema": 2, "store": "abc"}',
        '{"store": "abc"}',
        json.dumps({"schema": 1, "store": "x" * 65}),
        "\udcff",
        "[" * 100_000,
        '{"schema": ' + "1" * 5000 + ', "store": "abc"}',
    ],
    ids=lambda text: text[:30],
)
def test_a_damaged_store_file_is_a_typed_error_and_nothing_is_guessed(tmp_path: Path, text: str) -> None:
    opened = registry(tmp_path / "data")
    hold(opened)
    before = store_file(tmp_path / "data").read_bytes()
    store_file(tmp_path / "data").chmod(0o644)
    store_file(tmp_path / "data").write_bytes(text.encode(errors="surrogateescape"))
    for _ in range(2):
        with pytest.raises(StoreError, match=r"store\.json") as caught:
            registry(tmp_path / "data").leases.list(now=1)
        assert caught.value.hint
    assert len(opened.leases.list(now=1000)) == 1  # who has it open goes on
    store_file(tmp_path / "data").write_bytes(before)
    assert len(registry(tmp_path / "data").leases.list(now=1000)) == 1


def test_a_store_file_that_cannot_be_read_is_a_typed_error(tmp_path: Path) -> None:
    hold(registry(tmp_path / "data"))
    store_file(tmp_path / "data").unlink()
    store_file(tmp_path / "data").mkdir()
    with pytest.raises(StoreError, match=r"store\.json"):
        registry(tmp_path / "data").leases.list(now=1)


def test_the_store_file_of_another_store_holds_none_of_its_leases(tmp_path: Path) -> None:
    hold(registry(tmp_path / "one"))
    hold(registry(tmp_path / "two"))
    shutil.copy(store_file(tmp_path / "two"), store_file(tmp_path / "one"))
    assert registry(tmp_path / "one").leases_lost
    assert not registry(tmp_path / "two").leases_lost


# ── one database, two data directories ───────────────────────────────────────────────────────────────────────────────


def test_two_data_directories_in_one_database_keep_apart(tmp_path: Path, base: Base) -> None:
    one, two = (registry(tmp_path / name, url=base.url) for name in ("one", "two"))
    hold(one)
    with two.database.writing() as transaction:
        transaction.execute("INSERT INTO asset_locations VALUES ('a', ?, 'files/a', 'present')", (two.store_id,))
    two.leases.acquire(["a"], "vm-1", now=1000, store_id=two.store_id)
    assert len(one.leases.list(now=1000, store_id=one.store_id, holder="vm-1")) == 1
    assert one.tombstones.condemn(["a"], reason="", now=1000) == ()
    one.tombstones.delete("a", now=1000, force=True)
    assert len(pending(one.tombstones)) == 1
    assert pending(two.tombstones) == ()
    assert two.tombstones.condemn(["a"], reason="", now=1000) == ()
    assert [lease.store_id for lease in two.leases.list(now=1000)] == [two.store_id]


def test_the_loss_of_one_stores_row_is_no_loss_of_the_others(tmp_path: Path, base: Base) -> None:
    one, two = (registry(tmp_path / name, url=base.url) for name in ("one", "two"))
    assert one.store_id != two.store_id
    base.sql("DELETE FROM stores WHERE id = ?", one.store_id)
    assert one.leases_lost
    assert not two.leases_lost
    one.accept_lost_leases()
    assert registry(tmp_path / "two", url=base.url).leases_lost is False


def test_two_threads_that_open_it_first_agree(tmp_path: Path, postgres: Server) -> None:
    for url in (None, postgres.new_database()):
        opened = registry(tmp_path / str(bool(url)), url=url)
        threads = [Running(partial(getattr, opened, "store_id")) for _ in range(8)]
        assert len({thread.result() for thread in threads}) == 1
