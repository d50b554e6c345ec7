"""What holds something: each reason to keep it, the limits, and work that is going on."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from systemfiles import BootFiles, Collection
from systemfiles.content.layout import Layout
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    NotProvisioned,
    UsageError,
)
from systemfiles.foundation.lock import locked
from systemfiles.foundation.lockfile import read_lock
from systemfiles.provision.site import despite_collections
from systemfiles.retention.outcome import Outcome
from systemfiles.retention.reasons import current
from tests.retention.conftest import Host
from tests.retention.plain import REF_NAME
from tests.retention.support import DEFAULTS, INITRD, KERNEL, PAIR, gone, names, things
from tests.retention.world import (
    ARM,
    DAY,
    OCI_LAYER,
    RELEASES,
    forget_name,
    name_as_others,
    put_blob,
)


def test_what_nothing_holds_goes_with_its_blobs_its_names_and_its_rows(host: Host) -> None:
    host.provide()
    assert host.reasons("k-1") == [""]
    collected = host.collect()
    assert gone(collected) == PAIR
    assert {each.why for each in collected.gone} == {"held by nothing", "no initrd here is built on it"}
    assert things(host) == set()
    assert host.plain.located() == {}
    assert names(host) == set()
    assert [*host.plain.blobs.iterdir()] == []
    assert [*(host.data / "system" / "kernel").iterdir()] == []
    assert host.collect().gone == ()


def lease(host: Host, files: BootFiles) -> Callable[[], object]:
    return host.system.acquire(files, holder="vm-7").release


def lease_with_an_end(host: Host, files: BootFiles) -> Callable[[], object]:
    host.system.acquire(files, holder="vm-7", ttl=30 * DAY)
    return lambda: host.clock.advance(30 * DAY)


def ensured_lease(host: Host, files: BootFiles) -> Callable[[], object]:
    host.system.ensure(files.kernel.version, files.initrd.version, holder="vm-7")
    return lambda: host.system.release_all("vm-7")


def pin(host: Host, files: BootFiles) -> Callable[[], object]:
    host.system.pin("snapshot-42", files, hypervisor="v49.0")
    return lambda: host.system.unpin("snapshot-42")


def pin_alone(host: Host, files: BootFiles) -> Callable[[], object]:
    """A pin that the registry knows nothing of."""
    release = pin(host, files)
    host.system.holdings.registry.leases.release(host.system.holdings.registrar._lease_of("snapshot-42"), now=0)
    return release


def named_by_another_tool(host: Host, files: BootFiles) -> Callable[[], object]:
    for name in PAIR:
        (entry,) = (entry for entry in host.plain.entries() if entry["annotations"][REF_NAME] == name)
        name_as_others(host.data, "theirs", entry["digest"].removeprefix("sha256:"), entry["size"])
    return lambda: forget_name(host.data, "theirs")


HOLDS = {
    "a lease": (lease, "leased by vm-7"),
    "a lease that has an end": (lease_with_an_end, "leased by vm-7"),
    "the lease of ensure": (ensured_lease, "leased by vm-7"),
    "a pin": (pin, "pinned by snapshot-42 since 20"),
    "a pin that the registry does not know": (pin_alone, "pinned by snapshot-42 since 20"),
    "another tool's name": (named_by_another_tool, "named theirs by another tool in the content store"),
}


@pytest.mark.parametrize("name", HOLDS)
def test_what_is_held_stays_until_it_is_not(host: Host, name: str) -> None:
    hold, why = HOLDS[name]
    release = hold(host, host.provide())
    host.clock.advance(10 * DAY)
    assert [told[: len(why)] for told in (*host.reasons("k-1"), *host.reasons("i-1"))] == [why, why]
    collected = host.collect()
    assert collected.gone == ()
    assert collected.problems == ()
    assert things(host) == PAIR
    assert [*host.plain.damage(host.plain.things()[KERNEL]), *host.plain.damage(host.plain.things()[INITRD])] == []
    release()
    host.clock.advance(1)
    assert host.reasons("k-1") == [""]
    assert gone(host.collect()) == PAIR
    assert things(host) == set()


def test_a_pin_says_which_hypervisor_it_was_made_with(host: Host) -> None:
    host.system.pin("snapshot-42", host.provide(), hypervisor="v49.0")
    assert host.reasons("snapshot-42")[0].endswith(" (hypervisor v49.0)")


def test_many_holders_are_told_as_three_and_how_many_more(host: Host) -> None:
    files = host.provide()
    for number in range(5):
        host.system.acquire(files, holder=f"vm-{number}")
    assert host.reasons("k-1") == ["leased by vm-0, vm-1, vm-2 and 2 more"]


def test_a_lease_without_an_end_is_made_although_one_with_an_end_is_there(host: Host) -> None:
    files = host.provide()
    host.system.acquire(files, holder="vm-7", ttl=100)
    for _ in range(2):
        host.system.ensure("k-1", "i-1", holder="vm-7")
    assert [each.expires_at is None for each in host.system.leases("vm-7")] == [False, True]
    host.clock.advance(DAY)
    assert gone(host.collect()) == set()


def test_nobody_can_take_a_lease_that_would_look_like_a_pin(host: Host) -> None:
    with pytest.raises(UsageError, match="cannot be the holder"):
        host.system.acquire(host.provide(), holder="pin:snapshot-42")


def test_the_current_versions_of_a_profile_stay(host: Host) -> None:
    host.provide(*("steady", "plain"))
    assert host.reasons("steady") == ["the current version of profile pinned"]
    host.clock.advance(100 * DAY)
    assert host.collect().gone == ()
    assert things(host) == DEFAULTS


def test_an_update_frees_what_was_current_and_the_initrd_that_was_built_for_it(host: Host) -> None:
    before, after = host.update(RELEASES[0]), host.update(RELEASES[1])
    modules = f"initrd {after.initrd.version} carries its modules"
    assert host.reasons(after.kernel.version) == [f"the current version of profile packaged; {modules}"]
    assert host.reasons(after.initrd.version) == ["the current version of modular"]
    collected = host.collect()
    assert gone(collected) == {f"kernel-{before.kernel.version}-x86_64", f"initrd-{before.initrd.version}-x86_64"}
    assert {each.what for each in collected.gone} - gone(collected) == {f"busybox-static-{RELEASES[0]}-x86_64"}
    assert host.system.resolve(after.kernel.version, after.initrd.version)


def test_what_a_rolling_name_stands_for_stays_although_the_catalog_has_that_profile_no_more(
    host: Host, tmp_path: Path
) -> None:
    files = host.update(RELEASES[0])
    text = host.world.catalog.read_text()
    start, end = text.index("[profile.packaged]"), text.index("[kernel.steady")
    (tmp_path / "other.toml").write_text(text[:start] + text[end:])
    system = host.system.__class__(host.data, catalog=tmp_path / "other.toml", arch="x86_64")
    system.holdings = host.system.holdings
    assert [each.why for each in system.explain(files.kernel.version, grace=0, keep_last=0)[:1]] == [
        f"the current version of packaged; initrd {files.initrd.version} carries its modules"
    ]
    assert system.collect(grace=0, keep_last=0).gone == ()
    assert system.resolve(files.kernel.version, files.initrd.version)


def test_a_concrete_version_goes_once_its_profile_is_provided_with_another(host: Host, tmp_path: Path) -> None:
    """Not before: the catalog that a collection is told of may be another than the one it was provided by."""
    host.provide(*("steady", "plain"))
    text = host.world.catalog.read_text()
    (tmp_path / "other.toml").write_text(text.replace('kernel = "steady"', 'kernel = "k-1"'))
    system = host.system.__class__(host.data, catalog=tmp_path / "other.toml", arch="x86_64")
    system.holdings = host.system.holdings
    assert gone(system.collect(grace=0, keep_last=0)) == set()
    system.ensure()
    assert gone(system.collect(grace=0, keep_last=0)) == {"kernel-steady-x86_64"}


def test_the_pair_of_a_profile_that_this_catalog_does_not_have_stays(host: Host, tmp_path: Path) -> None:
    """As for a command under sudo, which drops $SYSTEMFILES_CATALOG."""
    host.system.ensure()
    text = host.world.catalog.read_text()
    for before, after in (
        ("profile.pinned]", "profile.another]"),
        ('"pinned"', '"another"'),
        ('kernel = "steady"', 'kernel = "k-1"'),
        ('initrd = "plain"', 'initrd = "i-1"'),
    ):
        text = text.replace(before, after)
    (tmp_path / "other.toml").write_text(text)
    system = host.system.__class__(host.data, catalog=tmp_path / "other.toml", arch="x86_64")
    system.holdings = host.system.holdings
    assert [each.why for each in system.explain("steady", grace=0, keep_last=0)[:1]] == [
        "the current version of profile pinned"
    ]
    assert gone(system.collect(grace=0, keep_last=0)) == set()


def test_an_initrd_that_is_kept_keeps_the_kernel_whose_modules_it_carries(host: Host) -> None:
    before = host.update(RELEASES[0])
    host.update(RELEASES[1])
    name_as_others(host.data, "theirs", before.initrd.sha256, before.initrd.size, OCI_LAYER)
    assert host.reasons(before.kernel.version) == [f"initrd {before.initrd.version} carries its modules"]
    collected = host.collect()
    assert gone(collected) == set()
    assert host.system.resolve(before.kernel.version, before.initrd.version)
    forget_name(host.data, "theirs")
    assert len(gone(host.collect())) == 2


def test_a_kernel_that_is_kept_keeps_no_initrd(host: Host) -> None:
    files = host.provide()
    name_as_others(host.data, "theirs", files.kernel.sha256, files.kernel.size, OCI_LAYER)
    assert gone(host.collect()) == {INITRD}


# --- limits ---


def test_the_newest_of_each_kind_and_architecture_stay(host: Host) -> None:
    for version in ("k-1", "k-2", "k-3"):
        host.provide(version, "i-1")
        host.provide(version, "i-1", arch=ARM)
    # made within one second, the greater name counts as the newer
    assert gone(host.collect(keep_last=2)) <= {"kernel-k-1-x86_64", "kernel-k-1-aarch64"}
    told = host.system.explain("k-3", grace=0, keep_last=2)
    assert {each.why for each in told if each.what == "kernel-k-3-x86_64"} == {"one of the 2 newest kernels for x86_64"}
    told = host.system.explain("k-3", grace=0, keep_last=1)
    assert {each.why for each in told if each.what == "kernel-k-3-x86_64"} == {"the newest kernel for x86_64"}
    assert {each for each in things(host) if "k-" in each} >= {"kernel-k-3-x86_64", "kernel-k-3-aarch64"}
    host.collect(keep_last=1)
    assert things(host) == {f"{what}-{arch}" for what in ("kernel-k-3", "initrd-i-1") for arch in ("x86_64", "aarch64")}


def test_what_was_made_within_the_grace_period_stays(host: Host) -> None:
    host.provide()
    told = host.system.explain("k-1", grace=DAY, keep_last=0)
    assert [each.why for each in told if each.what == KERNEL] == ["used within the grace period"]
    assert host.collect(grace=DAY).gone == ()
    host.clock.advance(DAY)
    assert gone(host.collect(grace=DAY)) == PAIR


def test_what_was_leased_within_the_grace_period_stays(host: Host) -> None:
    files = host.provide()
    host.clock.advance(30 * DAY)
    host.system.acquire(files, holder="vm-7").release()
    host.clock.advance(DAY - 10)
    assert host.collect(grace=DAY).gone == ()
    host.clock.advance(20)
    assert gone(host.collect(grace=DAY)) == PAIR


@pytest.mark.parametrize("hold", [lease, lease_with_an_end, ensured_lease, pin], ids=lambda hold: hold.__name__)
def test_the_grace_period_begins_when_the_last_hold_ends(
    host: Host, hold: Callable[[Host, BootFiles], Callable[[], object]]
) -> None:
    end = hold(host, host.provide())
    host.clock.advance(0 if hold is lease_with_an_end else 25 * DAY)  # which ends by itself after 30
    end()
    host.clock.advance(DAY - 10)
    assert host.reasons("k-1", grace=DAY) == ["used within the grace period"]
    foretold = host.collect(dry_run=True, grace=DAY)
    assert foretold == host.collect(grace=DAY)
    assert things(host) == PAIR
    host.clock.advance(20)
    assert gone(host.collect(grace=DAY)) == PAIR


def test_a_collection_leaves_nothing_of_a_lease_that_has_ended_on_what_stays(host: Host) -> None:
    host.system.acquire(host.provide("steady", "plain"), holder="vm-7", ttl=5)
    host.clock.advance(60)
    host.collect()
    assert host.plain.rows("SELECT * FROM asset_leases") == []
    assert things(host) == DEFAULTS


def test_what_was_made_again_is_as_young_as_that(host: Host) -> None:
    """Its row may be older: somebody removed the directory, and the registry was not told."""
    host.provide()
    row = {"last_accessed_at": 1}
    host.system.holdings.registry.assets.update(KERNEL, now=1, **row)
    shutil.rmtree(host.data / "system" / "kernel" / "k-1")
    host.provide()
    assert host.collect(grace=DAY).gone == ()


def test_a_limit_that_is_no_number_of_anything_is_refused(host: Host) -> None:
    for limits in ({"grace": -1}, {"keep_last": -1}, {"max_cache_bytes": -1}):
        with pytest.raises(UsageError, match="greater than or equal to 0"):
            host.collect(**limits)  # type: ignore[arg-type]


# --- work in progress ---


def test_an_artifact_that_is_being_worked_on_goes_the_next_time_and_is_told_of_once(host: Host) -> None:
    host.provide()
    with locked(host.system.paths.lock(KERNEL)):
        assert gone(host.collect()) == {INITRD}
        assert things(host) == {KERNEL}
    assert gone(host.collect()) == {KERNEL}
    told = [json.loads(line)["what"] for line in (host.data / "collected.jsonl").read_text().splitlines()]
    assert told.count(KERNEL) == 1
    assert host.plain.rows("SELECT * FROM tombstones") == []


def test_blobs_that_somebody_is_about_to_rely_on_stay_and_so_does_their_name(host: Host) -> None:
    files = host.provide()
    layout = Layout(host.system.paths)
    base = next(entry for entry in host.plain.entries() if "busybox" in entry["annotations"][REF_NAME])
    parts = host.plain.reached(base)
    with layout.ingesting():
        for part in (*parts, files.kernel.sha256):
            layout.note(Digest.from_hex(part))
        host.collect()
        assert {path.name for path in host.plain.blobs.iterdir()} == {*parts, files.kernel.sha256}
        assert names(host) == {base["annotations"][REF_NAME]}
    host.collect()
    assert [*host.plain.blobs.iterdir()] == []


def test_what_is_looked_for_while_ingesting_is_noted(host: Host) -> None:
    blob = put_blob(host.data, b"an orphan that is found again")
    host.clock.advance(60)
    layout = Layout(host.system.paths)
    with layout.ingesting():
        assert layout.intact(Digest.from_hex(blob))
        host.collect()
        assert (host.plain.blobs / blob).exists()
    host.collect()
    assert not (host.plain.blobs / blob).exists()


def test_an_artifact_that_is_leased_after_it_was_condemned_stays(host: Host) -> None:
    files = host.provide()
    registry = host.system.holdings.registry
    registry.tombstones.condemn(PAIR, reason="held by nothing", now=host.clock())
    with host.system.lease(files, holder="vm-7"):
        assert gone(host.collect()) == set()
        assert host.plain.rows("SELECT * FROM tombstones") == []
        assert host.plain.located().keys() == PAIR


def test_an_artifact_that_is_pinned_after_it_was_condemned_stays(host: Host) -> None:
    files = host.provide()
    host.system.holdings.registry.tombstones.condemn(PAIR, reason="held by nothing", now=host.clock())
    host.system.pin("snapshot-42", files)
    assert gone(host.collect()) == set()
    assert host.plain.located().keys() == PAIR
    assert host.system.restore("snapshot-42", full=True).kernel.path.exists()


def make_anew(host: Host, files: BootFiles) -> None:
    for kind in ("kernel", "initrd"):
        shutil.rmtree(host.data / "system" / kind)
    host.provide()


MEANWHILE: dict[str, Callable[[Host, BootFiles], object]] = {
    "is leased": lease,
    "is pinned": pin,
    "is named by another tool": named_by_another_tool,
    "is made anew": make_anew,
}


@pytest.mark.parametrize("name", MEANWHILE)
def test_what_comes_between_the_decision_and_the_removal_keeps_what_was_condemned(host: Host, name: str) -> None:
    """A collection that was decided while nothing held anything, and goes on once something does."""
    files = host.provide()
    collector, registry = host.system.keeper.collector, host.system.holdings.registry
    seen = collector.look()
    registry.tombstones.condemn(PAIR, reason="held by nothing", now=host.clock())
    MEANWHILE[name](host, files)
    collector.collect({}, seen, young=int(host.clock()), outcome=(outcome := Outcome()))
    assert things(host) == PAIR
    assert outcome == Outcome()
    assert host.plain.rows("SELECT * FROM tombstones") == []


def test_what_becomes_current_between_the_decision_and_the_removal_stays(host: Host) -> None:
    """An update that found its kernel here, and wrote it into versions.lock after the collection had read that."""
    files = host.update(RELEASES[0])
    assets = {f"kernel-{files.kernel.version}-x86_64", f"initrd-{files.initrd.version}-x86_64"}
    collector, lock = host.system.keeper.collector, host.system.paths.versions_lock
    settled = lock.read_bytes()
    lock.unlink()
    seen, later = collector.look(), int(host.clock())

    def settle() -> dict[str, str]:
        lock.write_bytes(settled)
        return current(host.system.catalog, read_lock(lock))

    collector.collect({}, seen, young=later, outcome=Outcome(), current=settle)
    assert things(host) == assets
    assert host.plain.rows("SELECT * FROM tombstones") == []
    assert gone(host.collect()) == set()
    assert host.plain.located().keys() == assets


def test_two_collections_at_once_come_one_after_the_other(host: Host) -> None:
    for version in ("k-1", "k-2", "k-3"):
        host.provide(version)
    collected: list[Collection] = []
    threads = [threading.Thread(target=lambda: collected.append(host.collect())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [each.what for every in collected for each in every.gone]
    assert sorted(told) == sorted({*told})
    assert things(host) == set()


def test_what_is_collected_at_that_moment_is_provided_again(host: Host) -> None:
    """Whoever asks while a collection goes on gets files that are there."""
    files = host.provide()
    host.system.holdings.registry.tombstones.condemn(PAIR, reason="held by nothing", now=host.clock())
    shutil.rmtree(host.data / "system" / "kernel")
    with pytest.raises(NotProvisioned):
        host.system.acquire(files, holder="vm-7")
    assert host.system.ensure("k-1", "i-1", holder="vm-7").kernel.path.exists()
    assert gone(host.collect()) == set()


def taking_kernels(host: Host) -> Callable[[str, int, int | None], None]:
    """Takes the kernels that are here away as soon as something else is fetched, once."""
    left = [1]

    def progress(subject: str, done: int, total: int | None) -> None:
        kernels = [asset for asset in things(host) if asset.startswith("kernel-")]
        if left[0] and kernels and not subject.startswith("kernel"):
            left[0] = 0
            registrar = host.system.holdings.registrar
            registrar.sync()
            for asset in kernels:
                host.system.keeper.collector.delete(asset)
            assert not {*kernels} & things(host)

    return progress


def test_a_kernel_that_is_collected_while_its_initrd_is_built_is_provided_again(host: Host) -> None:
    files = host.system.ensure("k-1", "i-1", progress=taking_kernels(host))
    assert things(host) == PAIR
    assert files.kernel.path.exists()


def test_an_update_beside_a_collection_comes_to_its_end(host: Host) -> None:
    files = host.world.update(host.system, RELEASES[0], progress=taking_kernels(host))
    assert host.system.resolve(files.kernel.version, files.initrd.version)


def test_what_collections_take_again_and_again_is_told_in_the_end(host: Host) -> None:
    asked = []

    def provide() -> None:
        asked.append("once more")
        host.system.kernel("k-1")

    with pytest.raises(NotProvisioned, match="collections took it 20 times") as caught:
        despite_collections(provide)
    assert len(asked) == 20
    assert caught.value.version == "k-1"
