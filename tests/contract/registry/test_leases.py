"""Leases: all or nothing, to the second, and never by halves."""

from __future__ import annotations

import math

import pytest

from systemfiles.foundation.errors import AssetInUse, AssetNotFound, LeaseNotFound, UsageError
from systemfiles.registry.assets import AssetStatus, locate
from systemfiles.registry.leases import LATEST
from systemfiles.registry.tombstones import Tombstones
from tests.contract.registry.support import STORE, World


@pytest.fixture
def leased(world: World) -> World:
    world.add("kernel", "initrd", "other")
    return world


def test_a_lease_is_listed_until_it_is_released(leased: World) -> None:
    lease = leased.leases.acquire(["kernel", "initrd"], "vm-1", now=1000.9, ttl=60, store_id=STORE)
    assert lease.asset_ids == ("initrd", "kernel")
    assert (lease.acquired_at, lease.store_id) == (1000, STORE)
    assert leased.leases.list(now=1000) == (lease,)
    leased.leases.release(lease.id, now=1001)
    assert leased.leases.list(now=1000) == ()
    assert leased.lease_rows() == 0


def test_the_same_asset_asked_for_twice_is_held_once(leased: World) -> None:
    assert leased.leases.acquire(["kernel", "kernel"], "vm-1", now=1).asset_ids == ("kernel",)
    assert leased.lease_rows() == 1


def test_a_second_release_finds_no_lease(leased: World) -> None:
    lease = leased.leases.acquire(["kernel"], "vm-1", now=1000)
    leased.leases.release(lease.id, now=1000)
    with pytest.raises(LeaseNotFound) as caught:
        leased.leases.release(lease.id, now=1000)
    assert caught.value.lease_id == lease.id


def test_a_lease_without_a_time_to_live_never_ends(leased: World) -> None:
    for ttl in (None, 0, 0.0):
        assert leased.leases.acquire(["kernel"], "vm-1", now=1000, ttl=ttl).expires_at is None
    assert len(leased.leases.list(now=LATEST)) == 3


def test_a_lease_ends_in_its_second_and_not_before(leased: World) -> None:
    lease = leased.leases.acquire(["kernel"], "vm-1", now=1000, ttl=60)
    assert lease.expires_at == 1060
    assert not lease.expired(1059)
    assert lease.expired(1060)
    assert leased.leases.list(now=1059.999) == (lease,)
    assert leased.leases.list(now=1060) == ()


def test_a_lease_that_has_ended_can_be_neither_renewed_nor_released(leased: World) -> None:
    lease = leased.leases.acquire(["kernel"], "vm-1", now=1000, ttl=60)
    for call in (leased.leases.renew, leased.leases.release):
        with pytest.raises(LeaseNotFound):
            call(lease.id, now=1060)
    leased.leases.release(lease.id, now=1059)


@pytest.mark.parametrize("ttl", [1, 1.0, 0.001, 1.5, 59.2])
@pytest.mark.parametrize("now", [1000, 1000.25, 1000.999])
def test_a_lease_is_never_shorter_than_asked_for_and_at_most_two_seconds_longer(
    leased: World, now: float, ttl: float
) -> None:
    ends = leased.leases.acquire(["kernel"], "vm-1", now=now, ttl=ttl).expires_at
    assert ends is not None
    assert now + ttl <= ends < now + ttl + 2


def test_the_longest_lease_is_kept_exactly(leased: World) -> None:
    assert leased.leases.acquire(["kernel"], "vm-1", now=1000, ttl=LATEST - 1001).expires_at == LATEST - 1
    assert leased.leases.list(now=LATEST - 2)[0].expires_at == LATEST - 1


@pytest.mark.parametrize("ttl", [-1, -0.5, LATEST, 1e300, 10**400, math.inf, -math.inf, math.nan])
def test_a_time_to_live_that_cannot_be_is_refused(leased: World, ttl: float) -> None:
    lease = leased.leases.acquire(["other"], "vm-0", now=1000, ttl=60)
    with pytest.raises(UsageError):
        leased.leases.acquire(["kernel"], "vm-1", now=1000, ttl=ttl)
    with pytest.raises(UsageError):
        leased.leases.renew(lease.id, now=1000, ttl=ttl)
    assert leased.leases.list(now=1000) == (lease,)


@pytest.mark.parametrize("ttl", [None, 0, 30, 0.5])
def test_renewing_counts_from_now(leased: World, ttl: float | None) -> None:
    lease = leased.leases.acquire(["kernel", "initrd"], "vm-1", now=1000, ttl=60)
    renewed = leased.leases.renew(lease.id, now=1050, ttl=ttl)
    assert renewed.expires_at == (math.ceil(1050 + ttl) if ttl else None)
    assert (renewed.id, renewed.asset_ids, renewed.acquired_at) == (lease.id, lease.asset_ids, 1000)
    assert leased.leases.list(now=1050) == (renewed,)


def test_a_lease_on_several_assets_is_all_or_nothing(leased: World) -> None:
    with pytest.raises(AssetNotFound) as caught:
        leased.leases.acquire(["initrd", "kernel", "missing"], "vm-1", now=5000)
    assert caught.value.asset_id == "missing"
    assert leased.lease_rows() == 0
    assert {leased.assets.get(id, now=1, access=False).last_accessed_at for id in ("initrd", "kernel")} == {1000}


def test_a_lease_on_thousands_of_assets_is_all_or_nothing(leased: World) -> None:
    ids = [f"a{number}" for number in range(1203)]
    leased.add_many(ids)
    with pytest.raises(AssetNotFound):
        leased.leases.acquire([*ids, "missing"], "vm-1", now=1)
    assert leased.lease_rows() == 0
    assert leased.leases.acquire(ids, "vm-1", now=1).asset_ids == tuple(sorted(ids))
    assert leased.lease_rows() == 1203


def test_only_what_is_available_can_be_held(leased: World) -> None:
    for status in AssetStatus:
        leased.assets.update("kernel", now=1, status=status)
        if status is AssetStatus.AVAILABLE:
            leased.leases.acquire(["kernel"], "vm-1", now=1)
            continue
        with pytest.raises(AssetNotFound):
            leased.leases.acquire(["kernel"], "vm-1", now=1)


def test_what_another_store_has_cannot_be_held_here(leased: World) -> None:
    leased.add("elsewhere", store="store-b")
    with pytest.raises(AssetNotFound) as caught:
        leased.leases.acquire(["kernel", "elsewhere"], "vm-1", now=1, store_id=STORE)
    assert caught.value.asset_id == "elsewhere"
    leased.leases.acquire(["kernel", "elsewhere"], "vm-1", now=1)


def test_holding_is_an_access_and_says_who(leased: World) -> None:
    leased.leases.acquire(["kernel"], "vm-1", now=2000)
    found = leased.assets.get("kernel", now=1, access=False)
    assert (found.last_accessed_at, found.last_held_by) == (2000, "vm-1")


@pytest.mark.parametrize("holder", ["", "x" * 256, "a\nb", "a\0b", "\ud800", "\x1b[31m"])
def test_a_holder_that_no_log_could_show_is_refused(leased: World, holder: str) -> None:
    with pytest.raises(UsageError):
        leased.leases.acquire(["kernel"], holder, now=1)
    with pytest.raises(UsageError):
        leased.leases.acquire(["kernel"], "vm-1", now=1, lease_id=holder)


def test_a_lease_on_nothing_is_refused(leased: World) -> None:
    with pytest.raises(UsageError):
        leased.leases.acquire([], "vm-1", now=1)


# ── leases with an id of the caller's ────────────────────────────────────────────────────────────────────────────────


def test_the_same_lease_asked_for_twice_is_one(leased: World) -> None:
    first = leased.leases.acquire(["kernel"], "pin:x", now=1000, lease_id="pin:x")
    assert leased.leases.acquire(["kernel"], "pin:x", now=2000, lease_id="pin:x") == first
    assert leased.lease_rows() == 1


@pytest.mark.parametrize(
    ("holder", "ids", "store"),
    [
        ("pin:x", ["initrd"], ""),
        ("pin:x", ["kernel", "initrd"], ""),
        ("vm", ["kernel"], ""),
        ("pin:x", ["kernel"], STORE),
    ],
)
def test_an_id_of_another_lease_is_refused(leased: World, holder: str, ids: list[str], store: str) -> None:
    first = leased.leases.acquire(["kernel"], "pin:x", now=1000, lease_id="pin:x")
    with pytest.raises(UsageError, match="pin:x"):
        leased.leases.acquire(ids, holder, now=2000, store_id=store, lease_id="pin:x")
    assert leased.leases.list(now=1000) == (first,)


def test_an_id_whose_lease_has_ended_is_free_again(leased: World) -> None:
    leased.leases.acquire(["kernel"], "x", now=1000, ttl=10, lease_id="x")
    assert leased.leases.acquire(["kernel"], "y", now=1010, lease_id="x").holder == "y"


# ── listing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_leases_are_listed_by_what_is_asked(leased: World) -> None:
    one = leased.leases.acquire(["kernel", "initrd"], "vm-1", now=1000, store_id=STORE)
    two = leased.leases.acquire(["kernel"], "vm-2", now=1001)
    leased.add("elsewhere", store="store-b")
    three = leased.leases.acquire(["elsewhere"], "pin:x", now=1002, store_id="store-b")
    leased.leases.acquire(["kernel"], "vm-3", now=1003, ttl=1)
    listed = leased.leases.list
    assert listed(now=1004) == (one, two, three)
    assert listed(now=1004, lease_id=two.id) == (two,)
    assert listed(now=1004, asset_id="initrd") == (one,)
    assert listed(now=1004, holder="vm-2") == (two,)
    assert listed(now=1004, prefix="vm-") == (one, two)
    assert listed(now=1004, prefix="vm-1") == (one,)
    assert listed(now=1004, store_id=STORE) == (one, two)
    assert listed(now=1004, store_id="store-b", prefix="pin:") == (three,)
    assert listed(now=1004, prefix="") == (one, two, three)
    for asked in ("nobody", ""):
        assert (
            listed(now=1004, holder=asked) == listed(now=1004, lease_id=asked) == listed(now=1004, asset_id=asked) == ()
        )


@pytest.mark.parametrize("prefix", ["pin:", "%", "_", "PIN:", "ä", "\ud7ff", "\U0010ffff"])
def test_a_prefix_means_its_characters(leased: World, prefix: str) -> None:
    for holder in ("pin:a", "pin:ä", "pin", "pinx", "PIN:a", "%", "_", "a", "ä", "äz", "z", "￼"):
        leased.leases.acquire(["kernel"], holder, now=1000)
    found = {lease.holder for lease in leased.leases.list(now=1000, prefix=prefix)}
    every = {lease.holder for lease in leased.leases.list(now=1000)}
    assert found == {holder for holder in every if holder.startswith(prefix)}


# ── ends that cannot be read, rows that nobody needs, leases by halves ───────────────────────────────────────────────


@pytest.mark.parametrize("ends", ["soon", "", b"\x00\x01", "2020-01-01"])
@pytest.mark.parametrize("base", ["sqlite"], indirect=True)
def test_an_end_that_cannot_be_read_keeps_the_lease(leased: World, ends: object) -> None:
    lease = leased.leases.acquire(["kernel"], "vm-1", now=1000, ttl=60, store_id=STORE)
    leased.base.sql("UPDATE asset_leases SET expires_at = ?", ends)
    assert [found.expires_at for found in leased.leases.list(now=LATEST)] == [None]
    assert leased.assets.get("kernel", now=LATEST, access=False).reference_count == 1
    assert leased.tombstones.condemn(["kernel"], reason="", now=LATEST) == ()
    assert [found.id for batch in leased.tombstones.candidates(now=9999, unused_since=9999) for found in batch] == [
        "initrd",
        "other",
    ]
    with pytest.raises(AssetInUse):
        leased.tombstones.delete("kernel", now=LATEST)
    assert leased.leases.renew(lease.id, now=2000, ttl=60).expires_at == 2060


def test_leases_that_have_ended_do_not_pile_up(leased: World) -> None:
    for number in range(50):
        leased.leases.acquire(["kernel"], "vm-1", now=1000 + 10 * number, ttl=10)
    assert leased.lease_rows() == 1


def test_a_host_whose_clock_is_ahead_ends_no_lease_of_another(leased: World) -> None:
    with leased.database.writing() as transaction:
        locate(transaction, "kernel", "store-b", "files/kernel")
    theirs = leased.leases.acquire(["kernel"], "vm-b", now=1000, ttl=100, store_id="store-b")
    every = leased.leases.acquire(["kernel"], "vm-c", now=1000, ttl=100)
    leased.leases.acquire(["kernel"], "vm-a", now=1200, store_id=STORE)
    for lease in (theirs, every):
        assert leased.leases.renew(lease.id, now=1050, ttl=100).expires_at == 1150
    with pytest.raises(AssetInUse):
        Tombstones(leased.database, "store-b").delete("kernel", now=1050)


def test_a_lease_that_lost_one_of_its_assets_is_over(leased: World) -> None:
    """Its holder must hear of it: what is left does not boot."""
    lease = leased.leases.acquire(["initrd", "kernel"], "vm-1", now=1000, ttl=60, store_id=STORE)
    leased.tombstones.delete("kernel", now=1000, force=True)
    with pytest.raises(LeaseNotFound):
        leased.leases.renew(lease.id, now=1001, ttl=60)
    assert [found.asset_ids for found in leased.leases.list(now=1001)] == [("initrd",)]
    leased.leases.release(lease.id, now=1001)


def test_a_renewal_that_comes_late_does_not_bring_half_a_lease_back(leased: World) -> None:
    """It waited for a collection that saw the lease ended and took one of its assets."""
    lease = leased.leases.acquire(["initrd", "kernel"], "vm-1", now=1000, ttl=60, store_id=STORE)
    assert leased.tombstones.condemn(["kernel"], reason="", now=1060)
    with pytest.raises(LeaseNotFound):
        leased.leases.renew(lease.id, now=1059, ttl=60)


def test_what_is_left_of_leases_that_have_ended_is_removed_and_until_when_they_held_stays_known(leased: World) -> None:
    leased.leases.acquire(["kernel", "initrd"], "vm-1", now=1000, ttl=500, store_id=STORE)
    leased.leases.acquire(["kernel"], "vm-2", now=1000, ttl=700, store_id=STORE)
    live = leased.leases.acquire(["other", "kernel"], "vm-3", now=1000, ttl=900, store_id=STORE)
    with leased.database.writing() as transaction:
        locate(transaction, "other", "store-b", "files/other")
    elsewhere = leased.leases.acquire(["other"], "vm-4", now=1000, ttl=10, store_id="store-b")
    uses = leased.tombstones.uses(["kernel", "initrd", "other"], now=1800)
    leased.leases.forget_ended(now=1800, store_id=STORE)
    assert leased.tombstones.uses(["kernel", "initrd", "other"], now=1800) == uses
    assert uses[1] == {"kernel": 1700, "initrd": 1500, "other": 1000}
    assert leased.leases.list(now=1800) == (live,)
    assert leased.leases.list(now=1000, lease_id=elsewhere.id) == (elsewhere,)
    assert leased.lease_rows() == 3


def test_leases_that_ended_are_removed_however_many_there_are(world: World) -> None:
    ids = [f"a{number:03}" for number in range(450)]
    world.add_many(ids)
    world.leases.acquire(ids, "vm-1", now=1000, ttl=5)
    world.leases.forget_ended(now=1005, store_id=STORE)
    assert world.lease_rows() == 0
    assert {*world.tombstones.uses(ids, now=1005)[1].values()} == {1005}


@pytest.mark.parametrize("base", ["sqlite"], indirect=True)
def test_what_it_takes_to_remove_leases_that_ended_grows_as_their_number_does(leased: World) -> None:
    """However many are live. Counted in thousands of steps of SQLite's virtual machine."""
    steps, taken = [0], []

    def count() -> int:
        steps[0] += 1
        return 0

    for number in (600, 2400):
        ids = [f"{number}-{each:05}" for each in range(4 * number)]
        leased.add_many(ids)
        leased.leases.acquire(ids[:-number], "vm-1", now=1000, store_id=STORE)
        leased.leases.acquire(ids[-number:], "vm-2", now=1000, ttl=5, store_id=STORE)
        steps[0] = 0
        leased.database._connections.get().set_progress_handler(count, 1000)
        leased.leases.forget_ended(now=1005, store_id=STORE)
        taken.append(steps[0])
        leased.leases.release(leased.leases.list(now=1005)[0].id, now=1005)
    assert taken[1] < 5 * taken[0]
    assert leased.lease_rows() == 0
