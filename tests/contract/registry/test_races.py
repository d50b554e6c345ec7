"""Two at once: one comes before the other, whichever it is, and neither is lied to."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier

import pytest

from systemfiles.foundation.errors import (
    AssetExists,
    AssetInUse,
    AssetNotFound,
    LeaseNotFound,
    SystemFilesError,
    UsageError,
)
from systemfiles.registry.assets import Assets
from systemfiles.registry.leases import Leases
from systemfiles.registry.tombstones import Tombstones
from tests.contract.registry.support import PATIENCE, STORE, Base, Running, Standing, World, asset, pending

ROUNDS = 400 if os.environ.get("SYSTEMFILES_TEST_FULL") else 60


@contextlib.contextmanager
def meanwhile(
    world: World, first: Callable[[Standing], object], second: Callable[[], object]
) -> Iterator[list[object]]:
    """Lets `first` stand still before its commit, starts `second`, which has to wait, and lets both end."""
    standing = Standing(world.base.open())
    one = Running(lambda: first(standing))
    assert standing.reached.wait(PATIENCE)
    two = Running(second)
    assert two.waits()
    standing.go_on.set()
    results: list[object] = [one.result()]
    try:
        results.append(two.result())
    except SystemFilesError as error:
        results.append(error)
    yield results


@pytest.fixture
def pair(world: World) -> World:
    world.add("a", "b")
    return world


def test_who_acquires_first_has_it(pair: World) -> None:
    with meanwhile(
        pair,
        lambda standing: Leases(standing.database).acquire(["a", "b"], "vm-1", now=1000, store_id=STORE),
        lambda: pair.tombstones.condemn(["a", "b"], reason="", now=1000),
    ) as (lease, stones):
        assert stones == ()
        assert pair.leases.list(now=1000) == (lease,)


def test_who_condemns_first_leaves_nothing_to_acquire(pair: World) -> None:
    with meanwhile(
        pair,
        lambda standing: Tombstones(standing.database, STORE).condemn(["b"], reason="", now=1000),
        lambda: pair.leases.acquire(["a", "b"], "vm-1", now=1000, store_id=STORE),
    ) as (_, error):
        assert len(pending(pair.tombstones)) == 1
        assert isinstance(error, AssetNotFound)
        assert pair.lease_rows() == 0


def test_a_lease_that_is_renewed_first_holds(pair: World) -> None:
    """Though for the collection it has ended meanwhile."""
    lease = pair.leases.acquire(["a", "b"], "vm-1", now=1000, ttl=60, store_id=STORE)
    with meanwhile(
        pair,
        lambda standing: Leases(standing.database).renew(lease.id, now=1059, ttl=60),
        lambda: pair.tombstones.condemn(["a", "b"], reason="", now=1060),
    ) as (_, stones):
        assert stones == ()
        assert pair.leases.list(now=1060)[0].asset_ids == ("a", "b")


def test_a_renewal_behind_a_collection_finds_no_lease(pair: World) -> None:
    lease = pair.leases.acquire(["a", "b"], "vm-1", now=1000, ttl=60, store_id=STORE)
    with meanwhile(
        pair,
        lambda standing: Tombstones(standing.database, STORE).condemn(["b"], reason="", now=1060),
        lambda: pair.leases.renew(lease.id, now=1059, ttl=60),
    ) as (_, error):
        assert isinstance(error, LeaseNotFound)
        assert pair.leases.list(now=1060) == ()


def test_a_deletion_waits_for_who_acquires(pair: World) -> None:
    with meanwhile(
        pair,
        lambda standing: Leases(standing.database).acquire(["a"], "vm-1", now=1000),
        lambda: pair.tombstones.delete("a", now=1000),
    ) as (_, error):
        assert isinstance(error, AssetInUse)


def test_force_wins_over_who_acquires_meanwhile(pair: World) -> None:
    with meanwhile(
        pair,
        lambda standing: Leases(standing.database).acquire(["a"], "vm-1", now=1000),
        lambda: pair.tombstones.delete("a", now=1000, force=True),
    ):
        assert len(pending(pair.tombstones)) == 1
        assert pair.lease_rows() == 0


def test_of_two_releases_one_finds_the_lease(pair: World) -> None:
    lease = pair.leases.acquire(["a", "b"], "vm-1", now=1000)
    with meanwhile(
        pair,
        lambda standing: Leases(standing.database).release(lease.id, now=1000),
        lambda: pair.leases.release(lease.id, now=1000),
    ) as (_, error):
        assert isinstance(error, LeaseNotFound)


def test_a_release_waits_for_a_renewal(pair: World) -> None:
    lease = pair.leases.acquire(["a", "b"], "vm-1", now=1000, ttl=5)
    with meanwhile(
        pair,
        lambda standing: Leases(standing.database).renew(lease.id, now=1000, ttl=60),
        lambda: pair.leases.release(lease.id, now=1000),
    ):
        assert pair.lease_rows() == 0


def test_of_two_that_register_an_id_one_has_it(world: World) -> None:
    with meanwhile(
        world,
        lambda standing: Assets(standing.database).register(asset("x", name="first", labels={"l": "1"})),
        lambda: world.assets.register(asset("x", name="second", labels={"l": "2"})),
    ) as (_, error):
        assert isinstance(error, AssetExists)
        assert world.assets.get("x", now=1).name == "first"


def test_an_id_can_be_registered_again_behind_its_deletion(pair: World) -> None:
    with meanwhile(
        pair,
        lambda standing: Tombstones(standing.database, STORE).delete("a", now=1000),
        lambda: pair.assets.register(asset("a", name="second"), store_id=STORE, path="p"),
    ):
        assert pair.assets.get("a", now=1).name == "second"
        assert len(pending(pair.tombstones)) == 1


def test_of_two_that_register_a_path_one_has_it(world: World) -> None:
    with meanwhile(
        world,
        lambda standing: Assets(standing.database).register(asset("x"), store_id=STORE, path="p"),
        lambda: world.assets.register(asset("y"), store_id=STORE, path="p"),
    ) as (_, error):
        assert isinstance(error, UsageError)
        assert world.ids() == ["x"]


def test_a_path_cannot_be_registered_again_behind_its_deletion(pair: World) -> None:
    with meanwhile(
        pair,
        lambda standing: Tombstones(standing.database, STORE).delete("a", now=1000),
        lambda: pair.assets.register(asset("c"), store_id=STORE, path="files/a"),
    ) as (_, error):
        assert isinstance(error, UsageError)
        assert "is still to be removed" in error.summary
        assert pair.ids() == ["b"]


def test_of_two_updates_neither_is_lost(pair: World) -> None:
    pair.assets.update("a", now=1, labels={"old": "1"})
    with meanwhile(
        pair,
        lambda standing: Assets(standing.database).update("a", now=1, labels={"x": "1", "z": "1"}, version="1"),
        lambda: pair.assets.update("a", now=1, labels={"x": "2", "y": "2"}, tag="2"),
    ):
        found = pair.assets.get("a", now=1)
        assert (found.version, found.tag, found.labels) == ("1", "2", {"x": "2", "y": "2"})


def test_an_update_behind_a_deletion_finds_nothing(pair: World) -> None:
    with meanwhile(
        pair,
        lambda standing: Tombstones(standing.database, STORE).delete("a", now=1000),
        lambda: pair.assets.update("a", now=1, labels={"x": "2"}),
    ) as (_, error):
        assert isinstance(error, AssetNotFound)
        assert pair.base.sql("SELECT * FROM asset_labels") == []


def test_a_pin_that_two_index_at_once_is_one_lease(pair: World) -> None:
    with meanwhile(
        pair,
        lambda standing: Leases(standing.database).acquire(["a", "b"], "pin:x", now=1000, lease_id="pin:x"),
        lambda: pair.leases.acquire(["a", "b"], "pin:x", now=1000, lease_id="pin:x"),
    ) as (first, second):
        assert first == second
        assert pair.lease_rows() == 2


def test_readers_see_what_was_committed_and_wait_for_nobody(pair: World) -> None:
    standing = Standing(pair.base.open())
    one = Running(lambda: Leases(standing.database).acquire(["a"], "vm-1", now=1000))
    assert standing.reached.wait(PATIENCE)
    assert pair.leases.list(now=1000) == ()
    assert pair.assets.get("a", now=1, access=False).reference_count == 0
    standing.go_on.set()
    one.result()
    assert pair.assets.get("a", now=1, access=False).reference_count == 1


def test_what_is_read_in_one_go_is_of_one_moment(pair: World) -> None:
    with pair.database.reading() as transaction:
        before = transaction.rows("SELECT count(*) FROM assets")
        Running(lambda: World(pair.base).tombstones.delete("a", now=1000)).result()
        assert transaction.rows("SELECT count(*) FROM assets") == before
    assert pair.ids() == ["b"]


@pytest.mark.parametrize("base", ["postgresql"], indirect=True)
@pytest.mark.parametrize("deed", ["acquire", "renew", "release", "condemn"])
def test_rows_are_locked_in_the_order_of_their_ids(world: World, deed: str) -> None:
    """Whatever order they are named in: so no two wait for each other."""
    ids = ["a", "b", "c", "m", "x", "y", "z"]
    world.add(*reversed(ids))
    lease = world.leases.acquire(ids, "vm-1", now=1000, ttl=60)
    deeds: dict[str, Callable[[], object]] = {
        "acquire": lambda: world.leases.acquire(reversed(ids), "vm-2", now=1000),
        "renew": lambda: world.leases.renew(lease.id, now=1000),
        "release": lambda: world.leases.release(lease.id, now=1000),
        "condemn": lambda: world.tombstones.condemn([*reversed(ids)], reason="", now=2000),
    }
    with World(world.base).database.writing() as other:
        other.rows("SELECT 1 FROM assets WHERE id = 'm' FOR UPDATE")
        running = Running(deeds[deed])
        assert running.waits()
        free = world.base.sql("SELECT id FROM assets ORDER BY id FOR UPDATE SKIP LOCKED")
        assert [row[0] for row in free] == ["x", "y", "z"]
    running.result()


# ── two processes ────────────────────────────────────────────────────────────────────────────────────────────────────

_SPAWN = multiprocessing.get_context("spawn")


def _of_round(number: int) -> list[str]:
    """So many that two who do not lock them in one order wait for each other."""
    return [f"{number}-{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


def _hold(base: Base, together: Barrier) -> None:
    leases = Leases(base.open())
    for number in range(ROUNDS):
        together.wait(PATIENCE)
        with contextlib.suppress(AssetNotFound):
            leases.acquire(_of_round(number), f"vm-{number}", now=1000, store_id=STORE)


def _take(base: Base, together: Barrier) -> None:
    tombstones = Tombstones(base.open(), STORE)
    for number in range(ROUNDS):
        together.wait(PATIENCE)
        tombstones.condemn(_of_round(number), reason="", now=1000)


def test_two_processes_never_both_win(world: World) -> None:
    every = {id for number in range(ROUNDS) for id in _of_round(number)}
    world.add_many(every)
    together = _SPAWN.Barrier(2)
    workers = [_SPAWN.Process(target=work, args=(world.base, together)) for work in (_hold, _take)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE * 2)
        assert worker.exitcode == 0
    held = {id for lease in world.leases.list(now=1000) for id in lease.asset_ids}
    gone = {stone.asset_id for stone in pending(world.tombstones)}
    assert held | gone == every
    assert not held & gone
    assert sorted(held) == world.ids()
