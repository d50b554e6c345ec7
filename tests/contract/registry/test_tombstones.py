"""How assets leave: what is held stays, what is not becomes a tombstone of one store, and nothing is left behind."""

from __future__ import annotations

import pytest

from systemfiles.foundation.errors import AssetInUse, AssetNotFound, LeaseNotFound, UsageError
from systemfiles.registry.assets import insert, locate
from systemfiles.registry.tombstones import BATCH, Tombstone, Tombstones
from tests.contract.registry.support import STORE, World, asset, pending

OTHER = "store-b"
TABLES = ("assets", "asset_labels", "asset_leases", "asset_locations")


@pytest.fixture
def shared(world: World) -> tuple[World, Tombstones]:
    """Two stores in one database; `both` is in each, `mine` and `theirs` in one."""
    world.add("both", "mine", labels={"a": "b"})
    world.add("theirs", store=OTHER)
    world.base.sql("INSERT INTO asset_locations VALUES ('both', ?, 'elsewhere/both', 'present')", OTHER)
    return world, Tombstones(world.database, OTHER)


def rows(world: World) -> int:
    return sum(int(world.base.sql(f"SELECT count(*) FROM {table}")[0][0]) for table in TABLES)


def ids(stones: tuple[Tombstone, ...]) -> list[str]:
    return [stone.asset_id for stone in stones]


def candidates(tombstones: Tombstones, *, now: int = 1000, unused_since: int = 1000) -> list[str]:
    return [found.id for batch in tombstones.candidates(now=now, unused_since=unused_since) for found in batch]


def test_what_nobody_holds_becomes_a_tombstone(world: World) -> None:
    world.add("a", labels={"x": "y"}, size_bytes=7)
    lease = world.leases.acquire(["a"], "vm-1", now=1500, ttl=10)
    (stone,) = world.tombstones.condemn(["a"], reason="because", now=2000.5)
    facts = (
        stone.asset_id,
        stone.name,
        stone.path,
        stone.size_bytes,
        stone.reason,
        stone.last_held_by,
        stone.created_at,
    )
    assert facts == ("a", "name of a", "files/a", 7, "because", "vm-1", 2000)
    assert rows(world) == 0
    assert pending(world.tombstones) == (stone,)
    with pytest.raises(AssetNotFound):
        world.assets.get("a", now=1)
    with pytest.raises(AssetNotFound):
        world.leases.acquire(["a"], "vm-2", now=1)
    with pytest.raises(LeaseNotFound):
        world.leases.release(lease.id, now=1501)
    world.tombstones.drop([stone.id])
    assert pending(world.tombstones) == ()


def test_what_is_held_stays_as_it_is(world: World) -> None:
    world.add("a", "b", "c")
    world.leases.acquire(["a"], "vm-1", now=1000)
    world.leases.acquire(["b"], "vm-2", now=1000, ttl=10, store_id=STORE)
    assert ids(world.tombstones.condemn(["a", "b", "c", "nothing"], reason="", now=1009)) == ["c"]
    assert ids(world.tombstones.condemn(["a", "b", "c", "nothing"], reason="", now=1010)) == ["b"]
    assert world.ids() == ["a"]


def test_what_was_used_since_stays(world: World) -> None:
    world.add("old", at=1000)
    world.add("new", at=2000)
    assert ids(world.tombstones.condemn(["old", "new"], reason="", now=3000, unused_since=1999)) == ["old"]


def test_an_id_may_come_again_while_its_tombstone_is_there(world: World) -> None:
    world.add("a")
    (first,) = world.tombstones.delete("a", now=1000)
    world.assets.register(asset("a"), store_id=STORE, path="files/another")
    (second,) = world.tombstones.delete("a", now=1000)
    assert first.id != second.id
    assert pending(world.tombstones) == tuple(sorted((first, second), key=lambda stone: stone.id))


def test_a_path_comes_again_when_its_tombstone_is_gone_and_not_before(world: World) -> None:
    world.add("a")
    (stone,) = world.tombstones.delete("a", now=1000)
    for id in ("a", "b"):
        with pytest.raises(UsageError, match="'files/a' is still to be removed with asset 'a'"):
            world.assets.register(asset(id), store_id=STORE, path="files/a")
    assert world.ids() == []
    world.assets.register(asset("b"), store_id=OTHER, path="files/a")
    world.tombstones.drop([stone.id])
    world.add("a")
    assert world.ids() == ["a", "b"]


def test_an_artifact_may_be_there_again_while_its_tombstone_is(world: World) -> None:
    """Its directory is looked at once more before it goes."""
    world.add("a")
    world.tombstones.delete("a", now=1000)
    with world.database.writing() as transaction:
        insert(transaction, asset("a"))
        locate(transaction, "a", STORE, "files/a")
    assert world.ids() == ["a"]
    assert len(pending(world.tombstones)) == 1


def test_more_than_a_batch_is_condemned_at_once(world: World) -> None:
    every = [f"a{number:04}" for number in range(BATCH + 150)]
    world.add_many(every)
    assert candidates(world.tombstones) == every
    assert ids(world.tombstones.condemn(every, reason="", now=1000)) == every
    assert rows(world) == 0
    world.tombstones.drop([stone.id for stone in pending(world.tombstones)])
    assert pending(world.tombstones) == ()


def test_nothing_at_all_is_no_fault(world: World) -> None:
    assert world.tombstones.condemn([], reason="", now=1) == ()
    world.tombstones.drop([])
    assert world.tombstones.uses([], now=1) == ({}, {})
    assert candidates(world.tombstones) == []


# ── deleting one ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_held_is_not_deleted_and_the_error_says_by_whom(world: World) -> None:
    world.add("a")
    for number in range(12):
        world.leases.acquire(["a"], f"vm-{number:02}", now=1000, ttl=10 if number == 0 else None)
    with pytest.raises(AssetInUse) as caught:
        world.tombstones.delete("a", now=1010)
    assert (caught.value.leases, len(caught.value.holders)) == (11, 10)
    assert "vm-01" in str(caught.value)
    assert "vm-00" not in str(caught.value)


def test_force_deletes_what_is_held_and_its_leases_end(world: World) -> None:
    world.add("a")
    lease = world.leases.acquire(["a"], "vm-1", now=1000, store_id=STORE)
    assert ids(world.tombstones.delete("a", now=1000, force=True)) == ["a"]
    assert rows(world) == 0
    with pytest.raises(LeaseNotFound):
        world.leases.renew(lease.id, now=1000)


@pytest.mark.parametrize("force", [False, True])
def test_deleting_what_is_not_there_does_nothing(world: World, force: bool) -> None:
    assert world.tombstones.delete("nothing", now=1, force=force) == ()


def test_an_asset_without_bytes_anywhere_goes_at_once(world: World) -> None:
    world.assets.register(asset("a", labels={"x": "y"}))
    world.leases.acquire(["a"], "vm-1", now=1000)
    with pytest.raises(AssetInUse):
        world.tombstones.delete("a", now=1000)
    assert world.tombstones.delete("a", now=1000, force=True) == ()
    assert rows(world) == 0


# ── several stores ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_store_condemns_its_own_copy_only(shared: tuple[World, Tombstones]) -> None:
    world, theirs = shared
    assert candidates(world.tombstones) == ["both", "mine"]
    (stone,) = world.tombstones.condemn(["both", "theirs"], reason="", now=1000)
    assert (stone.asset_id, stone.path) == ("both", "files/both")
    assert world.ids() == ["both", "mine", "theirs"]
    assert world.assets.get("both", now=1).labels == {"a": "b"}
    assert pending(theirs) == ()
    assert candidates(theirs) == ["both", "theirs"]
    (stone,) = theirs.condemn(["both"], reason="", now=1000)
    assert stone.path == "elsewhere/both"
    assert world.ids() == ["mine", "theirs"]


def test_one_store_drops_its_own_tombstones_only(shared: tuple[World, Tombstones]) -> None:
    world, theirs = shared
    stones = theirs.condemn(["both", "theirs"], reason="", now=1000)
    world.tombstones.drop([stone.id for stone in stones])
    assert {*pending(theirs)} == {*stones}


def test_a_lease_on_one_stores_copy_holds_that_one_only(shared: tuple[World, Tombstones]) -> None:
    world, theirs = shared
    lease = world.leases.acquire(["both"], "vm-1", now=1000, store_id=OTHER)
    assert candidates(world.tombstones) == ["both", "mine"]
    assert theirs.uses(["both"], now=1000)[0] == {"both": ("vm-1",)}
    assert world.tombstones.uses(["both"], now=1000)[0] == {}
    assert ids(theirs.condemn(["both"], reason="", now=1000)) == []
    assert ids(world.tombstones.condemn(["both"], reason="", now=1000)) == ["both"]
    assert world.leases.renew(lease.id, now=1001, ttl=5).asset_ids == ("both",)


def test_a_lease_on_every_copy_holds_every_copy(shared: tuple[World, Tombstones]) -> None:
    world, theirs = shared
    world.leases.acquire(["both"], "vm-1", now=1000)
    for tombstones in (world.tombstones, theirs):
        assert "both" not in candidates(tombstones)
        assert tombstones.condemn(["both"], reason="", now=1000) == ()
        assert tombstones.uses(["both"], now=1000)[0] == {"both": ("vm-1",)}


def test_force_in_one_store_ends_no_lease_of_another(shared: tuple[World, Tombstones]) -> None:
    world, theirs = shared
    every = world.leases.acquire(["both"], "vm-every", now=1000)
    there = world.leases.acquire(["both"], "vm-there", now=1000, store_id=OTHER)
    here = world.leases.acquire(["both"], "vm-here", now=1000, store_id=STORE)
    assert ids(world.tombstones.delete("both", now=1000, force=True)) == ["both"]
    assert {lease.id for lease in world.leases.list(now=1000)} == {every.id, there.id}
    assert theirs.condemn(["both"], reason="", now=1000) == ()
    with pytest.raises(LeaseNotFound):
        world.leases.renew(here.id, now=1000)


def test_what_only_another_store_has_is_not_deleted_here(shared: tuple[World, Tombstones]) -> None:
    world, theirs = shared
    assert world.tombstones.delete("theirs", now=1000, force=True) == ()
    assert world.assets.get("theirs", now=1000).id == "theirs"
    assert candidates(theirs) == ["both", "theirs"]


# ── candidates and uses ──────────────────────────────────────────────────────────────────────────────────────────────


def test_candidates_are_what_nobody_holds_the_longest_unused_first(world: World) -> None:
    for id, at in (("c", 1000), ("a", 1002), ("b", 1001), ("d", 1003)):
        world.add(id, at=at)
    world.leases.acquire(["b"], "vm-1", now=500, ttl=100)
    assert candidates(world.tombstones, now=599, unused_since=1002) == ["c", "a"]
    assert candidates(world.tombstones, now=600, unused_since=1002) == ["c", "b", "a"]


def test_candidates_go_on_while_those_before_are_condemned(world: World) -> None:
    every = [f"a{number:03}" for number in range(7)]
    world.add(*every)
    small = Tombstones(world.database, STORE)
    seen: list[str] = []
    for batch in small.candidates(now=1000, unused_since=1000):
        seen += [found.id for found in batch]
        small.condemn([found.id for found in batch], reason="", now=1000)
    assert seen == every


def test_uses_say_who_holds_what_and_when_it_was_used(world: World) -> None:
    world.add("a", "b")
    world.leases.acquire(["a"], "vm-2", now=2000)
    world.leases.acquire(["a"], "vm-1", now=1000)
    world.leases.acquire(["b"], "vm-3", now=1000, ttl=1)
    assert world.tombstones.uses(["a", "b", "c"], now=1001) == ({"a": ("vm-1", "vm-2")}, {"a": 2000, "b": 1001})


def test_a_lease_that_was_released_was_a_use_until_then(world: World) -> None:
    world.add("a", "b")
    lease = world.leases.acquire(["a"], "vm-1", now=1000)
    world.leases.release(lease.id, now=2000.9)
    assert world.tombstones.uses(["a"], now=2000) == ({}, {"a": 2000})
    assert candidates(world.tombstones, now=9999, unused_since=1999) == ["b"]
    assert world.tombstones.condemn(["a"], reason="", now=9999, unused_since=1999) == ()
    assert len(world.tombstones.condemn(["a"], reason="", now=9999, unused_since=2000)) == 1


def test_a_lease_that_ended_by_itself_was_a_use_until_its_end(world: World) -> None:
    world.add("a", "b")
    world.leases.acquire(["a"], "vm-1", now=1000, ttl=500)
    assert candidates(world.tombstones, now=9999, unused_since=1499) == ["b"]
    assert world.tombstones.condemn(["a"], reason="", now=9999, unused_since=1499) == ()
    assert candidates(world.tombstones, now=9999, unused_since=1500) == ["a", "b"]
    assert len(world.tombstones.condemn(["a"], reason="", now=9999, unused_since=1500)) == 1


def test_an_end_that_is_yet_to_come_is_no_use_in_the_future(world: World) -> None:
    world.add("a")
    world.leases.acquire(["a"], "vm-1", now=1000, ttl=500)
    assert world.tombstones.uses(["a"], now=1200) == ({"a": ("vm-1",)}, {"a": 1000})


def test_a_release_by_a_clock_that_was_set_back_takes_no_use_away(world: World) -> None:
    world.add("a", at=5000)
    lease = world.leases.acquire(["a"], "vm-1", now=1000)
    world.leases.release(lease.id, now=1001)
    assert world.tombstones.uses(["a"], now=1001) == ({}, {"a": 5000})


def test_those_that_are_pending_are_given_in_batches_to_the_last_that_there_was(world: World) -> None:
    world.add_many(f"a{number:03}" for number in range(BATCH + 1))
    stones = world.tombstones.condemn(world.ids(), reason="", now=1000)
    batches = world.tombstones.pending()
    assert len(next(batches)) == BATCH
    world.add("later")
    world.tombstones.condemn(["later"], reason="", now=2000)
    ((last,),) = batches
    assert last == max(stones, key=lambda stone: stone.id)
    assert len(pending(world.tombstones)) == BATCH + 2
