"""What a collection does when it cannot tell what is held, what an asset may not take with it, and deletion."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from systemfiles.content.layout import Layout
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    AssetInUse,
    CatalogError,
    IntegrityError,
    LeasesLost,
    StoreError,
    UsageError,
)
from systemfiles.registry.assets import Asset, AssetType
from systemfiles.sources.oci import Repository
from tests.retention.conftest import Host
from tests.retention.plain import REF_NAME, listing
from tests.retention.support import INITRD, KERNEL, PAIR, gone, things
from tests.retention.world import (
    DAY,
    name_as_others,
    put_foreign_image,
)


def damaged_pin(host: Host) -> None:
    host.system.paths.pins.mkdir(exist_ok=True)
    (host.system.paths.pins / "snapshot-42.json").write_text("{")


CONTRADICTIONS = {
    "another digest": ("kernel", "sha256", "0" * 64),
    "a digest of another initrd": ("initrd", "sha256", "0" * 64),
    "another content": ("initrd", "content_sha256", "0" * 64),
    "another size": ("kernel", "size", 5),
    "a size that is no number": ("initrd", "size", "many"),
    "another version": ("kernel", "version", "k-2"),
    "another architecture": ("initrd", "arch", "aarch64"),
    "no architecture": ("kernel", "arch", "pdp-11"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_pin_that_contradicts_its_own_record_is_damaged(host: Host, name: str) -> None:
    host.system.pin("snapshot-42", host.provide())
    kind, what, value = CONTRADICTIONS[name]
    path = host.system.paths.pins / "snapshot-42.json"
    pin = json.loads(path.read_text())
    pin[kind][what] = value
    path.write_text(json.dumps(pin))
    for call in (host.system.pins, host.collect, lambda: host.system.restore("snapshot-42")):
        with pytest.raises(StoreError, match="is damaged"):
            call()
    assert things(host) == PAIR


NO_TEXTS: dict[str, dict[str, Any]] = {
    "a label that is a number": {"labels": {"n": 1}},
    "a label that is nothing": {"labels": {"a": None}},
    "a label whose name is a number": {"labels": {1: "x"}},
    "a label that JSON has no word for": {"labels": {"a": {1}}},
    "a hypervisor that is a number": {"hypervisor": 49},
    "a hypervisor that is half a character": {"hypervisor": "v\udcff"},
    "a hypervisor that does something to a terminal": {"hypervisor": "\x1b[31mv49.0"},
}


@pytest.mark.parametrize("name", NO_TEXTS)
def test_a_pin_that_could_not_be_read_again_is_never_written(host: Host, name: str) -> None:
    files = host.provide()
    with pytest.raises(UsageError, match="of a pin"):
        host.system.pin("snapshot-42", files, **NO_TEXTS[name])
    assert host.system.pins() == ()
    assert gone(host.collect()) == PAIR


def test_a_pin_is_read_as_it_was_written_whatever_texts_its_labels_are(host: Host) -> None:
    labels = {"": "", "ä \N{SNOWMAN}": "\ud800 \0\n", "a=b": "c"}
    pin = host.system.pin("snapshot-42", host.provide(), hypervisor="", labels=labels)
    assert host.system.pins() == (pin,)
    assert host.system.pin("snapshot-42", host.system.resolve("k-1", "i-1"), hypervisor="", labels=labels) == pin


def pin_of_a_strange_name(host: Host) -> None:
    host.system.paths.pins.mkdir(exist_ok=True)
    (host.system.paths.pins / "snapshot 42.json").write_text("{}")


def pins_that_cannot_be_listed(host: Host) -> None:
    host.system.paths.pins.write_text("a file")


def damaged_versions_lock(host: Host) -> None:
    host.system.paths.versions_lock.write_text("{")


def damaged_index(host: Host) -> None:
    (host.plain.layout / "index.json").write_text('{"manifests": [')


def index_with_a_strange_entry(host: Host) -> None:
    name_as_others(host.data, "theirs", "not hex", 5)


def damaged_foreign_manifest(host: Host) -> None:
    manifest, *_ = put_foreign_image(host.data, "theirs", b"a layer")
    (host.plain.blobs / manifest).write_bytes(b"{}")
    host.clock.advance(60)


BLIND = {
    "a damaged pin": (damaged_pin, StoreError, "is damaged"),
    "a pin of a strange name": (pin_of_a_strange_name, StoreError, "is no pin"),
    "pins that cannot be listed": (pins_that_cannot_be_listed, StoreError, "cannot be listed"),
    "a damaged versions.lock": (damaged_versions_lock, CatalogError, "versions.lock has 1 fault"),
    "a damaged index.json": (damaged_index, StoreError, "index.json is not JSON"),
    "an entry in index.json that says nothing": (index_with_a_strange_entry, StoreError, "is not an OCI descriptor"),
    "a damaged manifest of another tool": (damaged_foreign_manifest, IntegrityError, "is not what it should be"),
}


@pytest.mark.parametrize("name", BLIND)
def test_nothing_goes_as_long_as_it_cannot_be_told_what_is_held(host: Host, name: str) -> None:
    prepare, kind, words = BLIND[name]
    host.provide()
    prepare(host)
    before = {path for path in host.data.rglob("*") if "locks" not in path.parts and "tmp" not in path.parts}
    for dry_run in (True, False):
        with pytest.raises(kind, match=words):
            host.collect(dry_run=dry_run)
    after = {path for path in host.data.rglob("*") if "locks" not in path.parts and "tmp" not in path.parts}
    assert after == before


def test_nothing_goes_when_the_catalog_cannot_be_read(host: Host, tmp_path: Path) -> None:
    host.provide()
    (tmp_path / "bad.toml").write_text("schema = 2")
    system = host.system.__class__(host.data, catalog=tmp_path / "bad.toml", arch="x86_64")
    with pytest.raises(CatalogError, match=r"bad\.toml has"):
        system.collect(grace=0)
    assert things(host) == PAIR


def test_an_index_that_breaks_in_the_middle_is_a_problem_and_nobody_waits_for_ever(host: Host) -> None:
    """Whoever has the content store's lock reads it again without waiting for that lock."""
    layout = Layout(host.system.paths)
    host.provide()
    with layout.exclusively():
        damaged_index(host)
        with pytest.raises(StoreError, match="not JSON"):
            layout.entries()


def test_a_lost_registry_loses_the_leases_and_is_refused_until_that_is_accepted(host: Host) -> None:
    held, pinned = host.provide(), host.provide("k-2", "i-2")
    host.system.acquire(held, holder="vm-7")
    host.system.pin("snapshot-42", pinned)
    host.system.holdings.registry.close()
    for path in host.data.glob("registry.sqlite*"):
        path.unlink()
    before = listing(host.data)
    with pytest.raises(LeasesLost, match="the leases it had are lost"):
        host.collect(dry_run=True)
    assert listing(host.data) == before
    for _ in range(2):
        with pytest.raises(LeasesLost) as caught:
            host.collect()
        assert "--accept-lost-leases" in str(caught.value)
    assert things(host) == {*PAIR, "kernel-k-2-x86_64", "initrd-i-2-x86_64"}
    host.system.acquire(held, holder="vm-7")
    assert gone(host.collect(accept_lost_leases=True)) == set()
    host.system.release_all("vm-7")
    assert gone(host.collect()) == PAIR
    assert host.plain.located().keys() == {"kernel-k-2-x86_64", "initrd-i-2-x86_64"}
    assert [each.holder for each in host.system.holdings.registry.leases.list(now=0)] == ["pin:snapshot-42"]


# --- assets that are no artifacts ---


def register(host: Host, asset: str, path: str, data: bytes = b"x" * 5000) -> Path:
    """An asset as a service would add it; returns its file."""
    file = host.data / path
    if ".." not in path and not path.startswith("/"):
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_bytes(data)
    now = int(host.clock())
    host.system.holdings.registry.assets.register(
        Asset(asset, asset, AssetType.ROOTFS, path, len(data), Digest.of(data).hex, now, now),
        store_id=host.system.holdings.registry.store_id,
        path=path,
    )
    return file


def test_an_asset_that_is_leased_stays_and_goes_with_its_file_when_it_is_not(host: Host) -> None:
    registry = host.system.holdings.registry
    files = [register(host, f"rootfs-{number}", f"assets/{number}.img") for number in range(2)]
    lease = registry.leases.acquire(["rootfs-0"], "vm-7", now=host.clock(), store_id=registry.store_id)
    host.clock.advance(60)
    assert host.collect(grace=DAY).gone == ()
    host.clock.advance(2 * DAY)
    foretold = host.collect(dry_run=True, grace=DAY)
    collected = host.collect(grace=DAY)
    assert foretold == collected
    assert [(each.what, each.size) for each in collected.gone] == [("rootfs-1", 5000)]
    assert collected.bytes_freed == 8192 if files[0].stat().st_blocks == 16 else True
    assert [file.exists() for file in files] == [True, False]
    registry.leases.release(lease.id, now=host.clock())
    host.clock.advance(2 * DAY)
    (told,) = host.collect(grace=DAY).gone
    assert (told.what, told.last_held_by) == ("rootfs-0", "vm-7")


ESCAPES = (
    *("../outside", "/etc/passwd", "assets/../../outside", "system/store.json", "registry.sqlite", "tmp/x"),
    *("system/kernel/k-2/x86_64", "system/kernel/k-2/amd64", "system/kernel/k-2/x86_64/vmlinux"),
)


@pytest.mark.parametrize("path", ESCAPES)
def test_an_asset_whose_path_is_not_its_own_takes_no_file_with_it(host: Host, path: str) -> None:
    outside = host.data.parent / "outside"
    outside.write_text("somebody else's")
    host.provide()
    host.system.acquire(host.provide("k-2", "i-2"), holder="vm-7")
    register(host, "good", "assets/good.img")
    _register_in_spite_of_its_path(host, "bad", path)
    host.clock.advance(60)
    collected = host.collect()
    assert gone(collected) == {"good", *PAIR}
    (problem,) = collected.problems
    assert "asset 'bad' is forgotten, and no file removed" in str(problem)
    assert outside.read_text() == "somebody else's"
    assert (host.data / "registry.sqlite").exists()
    assert (host.data / "system" / "store.json").exists()
    assert host.collect().problems == ()
    assert things(host) == {"kernel-k-2-x86_64", "initrd-i-2-x86_64"}


def _register_in_spite_of_its_path(host: Host, asset: str, path: str) -> None:
    """As a fault of somebody else could leave it."""
    register(host, asset, "assets/bad.img")
    with host.system.holdings.registry.database.writing() as transaction:
        transaction.execute("DROP INDEX IF EXISTS asset_locations_at")
        transaction.execute("UPDATE asset_locations SET path = ? WHERE asset_id = ?", (path, asset))


def test_an_asset_that_cannot_be_removed_is_a_problem_that_keeps_nothing_else(host: Host) -> None:
    host.provide()
    (host.data / "assets" / "a directory" / "with something").mkdir(parents=True)
    _register_in_spite_of_its_path(host, "bad", "assets/a directory")
    host.clock.advance(60)
    for expected in ({*PAIR}, set()):
        collected = host.collect()
        assert gone(collected) == expected
        assert ["cannot be written" in str(problem) for problem in collected.problems] == [True]
    shutil.rmtree(host.data / "assets" / "a directory")
    assert gone(host.collect()) == {"bad"}


def test_of_two_assets_with_one_file_neither_takes_the_others(host: Host) -> None:
    """As a fault of somebody else could leave it."""
    file = register(host, "one", "assets/one.img")
    _register_in_spite_of_its_path(host, "two", "assets/one.img")
    assert [each.what for each in host.system.keeper.collector.delete("two").gone] == []
    assert file.exists()
    assert [each.what for each in host.system.keeper.collector.delete("one").gone] == ["one"]
    assert not file.exists()


def test_a_path_is_free_again_once_a_collection_has_removed_what_was_there(host: Host) -> None:
    register(host, "one", "assets/one.img")
    registry = host.system.holdings.registry
    registry.tombstones.delete("one", now=host.clock())
    with pytest.raises(UsageError, match="is still to be removed with asset 'one'"):
        register(host, "one", "assets/one.img")
    file = register(host, "one", "assets/another.img")
    host.clock.advance(60)
    foretold = host.collect(dry_run=True)
    collected = host.collect()
    assert foretold == collected
    assert [each.what for each in collected.gone] == ["one", "one"]
    assert not file.exists()
    assert register(host, "one", "assets/one.img").exists()


# --- deletion ---


def test_deleting_takes_an_asset_at_once_however_young(host: Host) -> None:
    host.provide(*("steady", "plain"))
    assert [each.what for each in host.system.keeper.collector.delete("kernel-steady-x86_64").gone] == [
        "kernel-steady-x86_64"
    ]
    assert things(host) == {"initrd-plain-x86_64"}
    assert host.system.ensure().kernel.path.exists()


def test_deleting_what_is_leased_is_refused_unless_by_force(host: Host) -> None:
    host.system.acquire(host.provide(), holder="vm-7")
    with pytest.raises(AssetInUse, match="is held by 1 lease"):
        host.system.keeper.collector.delete(KERNEL)
    assert things(host) == PAIR
    assert len(host.system.keeper.collector.delete(KERNEL, force=True).gone) == 1
    assert things(host) == {INITRD}


def test_not_even_by_force_goes_what_is_pinned(host: Host) -> None:
    host.system.pin("snapshot-42", host.provide())
    assert host.system.keeper.collector.delete(KERNEL, force=True).gone == []
    assert things(host) == PAIR
    host.collect()
    asset = host.system.holdings.registry.assets.get(KERNEL, now=int(host.clock()), access=False)
    assert asset.reference_count == 1


# --- what a registry gives ---


def test_what_a_registry_gives_and_is_refused_leaves_nothing_for_a_collection(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.system.pin("snapshot-42", host.provide())
    host.provide("k-2", "i-2")
    (wrong,) = (entry for entry in host.plain.entries() if entry["annotations"][REF_NAME] == "kernel-k-2-x86_64")
    repository = Repository(host.world.host, "wrong/kernel")
    for digest in host.plain.reached(wrong) - {wrong["digest"].removeprefix("sha256:")}:
        data = (host.plain.blobs / digest).read_bytes()
        repository.push_blob(Digest.of(data), len(data), BytesIO(data))
    manifest = (host.plain.blobs / wrong["digest"].removeprefix("sha256:")).read_bytes()
    repository.push_manifest(manifest, wrong["mediaType"], "k-1")
    monkeypatch.setenv("SYSTEMFILES_REGISTRY", f"{host.world.host}/wrong")
    elsewhere = Host(host.world, tmp_path / "elsewhere")
    elsewhere.system.paths.pins.mkdir(parents=True)
    shutil.copy(host.system.paths.pins / "snapshot-42.json", elsewhere.system.paths.pins)
    assert elsewhere.system.restore("snapshot-42").kernel.version == "k-1"  # from its origin, after all
    assert elsewhere.plain.orphans() == set()
    elsewhere.clock.advance(60)
    assert elsewhere.collect().problems == ()
    assert elsewhere.plain.orphans() == set()
    assert things(elsewhere) == PAIR
