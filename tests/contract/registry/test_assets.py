"""Assets: what goes in comes out, in every database."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest

from systemfiles.foundation.errors import AssetExists, AssetNotFound, StoreError, UsageError
from systemfiles.registry.assets import AssetStatus, AssetType, Backend
from systemfiles.registry.query import list_assets
from systemfiles.registry.tombstones import Tombstones
from tests.contract.registry.support import STORE, World, asset

FULL = asset(
    "full",
    status=AssetStatus.UPLOADING,
    backend=Backend.S3,
    created_by="ci",
    build_id="b1",
    source_image="docker.io/library/debian:12",
    version="1.0",
    tag="stable",
    tags=("one", "two"),
    metadata={"a": {"b": [1, 2.5, None, True, "x"]}},
    public_url="http://assets.test/full",
    file_info={"size": 10, "media_type": "application/x-elf"},
    assets_db_id="db-1",
    labels={"arch": "x86_64", "team": "a=b, c"},
)


def test_what_is_registered_is_what_is_read(world: World) -> None:
    world.assets.register(FULL)
    assert world.assets.get("full", now=1000) == FULL


def test_an_id_that_is_taken_stays_with_the_one_who_has_it(world: World) -> None:
    world.assets.register(FULL)
    with pytest.raises(AssetExists) as caught:
        world.assets.register(asset("full", name="another", labels={"x": "y"}))
    assert caught.value.asset_id == "full"
    assert world.assets.get("full", now=1000) == FULL


def test_an_asset_that_is_not_there_is_not_found(world: World) -> None:
    for call in (world.assets.get, world.assets.update):
        with pytest.raises(AssetNotFound) as caught:
            call("nothing", now=1)
        assert caught.value.asset_id == "nothing"


def test_getting_is_an_access_and_listing_is_none(world: World) -> None:
    world.add("a", at=1000)
    assert world.assets.get("a", now=2000).last_accessed_at == 2000
    list_assets(world.database, now=3000)
    assert world.assets.get("a", now=4000, access=False).last_accessed_at == 2000


def test_a_clock_that_goes_back_makes_no_access_earlier(world: World) -> None:
    world.add("a", at=1000)
    world.assets.get("a", now=2000)
    assert world.assets.get("a", now=500).last_accessed_at == 2000


def test_an_update_changes_what_it_names_and_nothing_else(world: World) -> None:
    world.assets.register(FULL)
    changes = {"status": AssetStatus.AVAILABLE, "tags": ("three",), "metadata": {}, "size_bytes": 11}
    changed = world.assets.update("full", now=1000, **changes)
    assert changed == replace(FULL, status=AssetStatus.AVAILABLE, tags=("three",), metadata={}, size_bytes=11)
    assert world.assets.get("full", now=1000) == changed


def test_an_update_replaces_all_labels(world: World) -> None:
    world.assets.register(FULL)
    world.assets.update("full", now=1000, labels={"only": "this"})
    assert world.assets.get("full", now=1000).labels == {"only": "this"}
    assert not list_assets(world.database, now=1000, labels={"arch": "x86_64"}).assets
    assert [found.id for found in list_assets(world.database, now=1000, labels={"only": "this"}).assets] == ["full"]


@pytest.mark.parametrize("name", ["id", "created_at", "reference_count", "last_held_by", "nonsense"])
def test_what_cannot_be_updated_is_refused_by_name(world: World, name: str) -> None:
    world.assets.register(FULL)
    with pytest.raises(UsageError, match=name):
        world.assets.update("full", now=1000, **{name: 1})
    assert world.assets.get("full", now=1000) == FULL


def test_an_update_that_is_refused_changes_nothing(world: World) -> None:
    world.assets.register(FULL)
    with pytest.raises(UsageError):
        world.assets.update("full", now=1000, name="other", labels={"x": "\0"})
    assert world.assets.get("full", now=1000) == FULL


def test_the_number_of_references_is_that_of_live_leases(world: World) -> None:
    world.add("a", "b")
    world.leases.acquire(["a", "b"], "vm-1", now=1000)
    world.leases.acquire(["a"], "vm-2", now=1000, ttl=10)

    def count(id: str, now: int) -> int:
        return world.assets.get(id, now=now, access=False).reference_count

    assert (count("a", 1009), count("b", 1009)) == (2, 1)
    assert (count("a", 1010), count("b", 1010)) == (1, 1)
    assert [found.reference_count for found in list_assets(world.database, now=1010).assets] == [1, 1]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE assets SET type = 'potato'",
        "UPDATE assets SET status = ''",
        "UPDATE assets SET metadata = '{'",
        "UPDATE assets SET tags = '1'",
        "UPDATE assets SET file_info = '" + "[" * 100_000 + "'",
    ],
)
def test_a_row_that_another_program_spoilt_is_one_typed_error(world: World, change: str) -> None:
    world.add("a")
    world.base.sql(change)
    for call in (lambda: world.assets.get("a", now=1), lambda: list_assets(world.database, now=1)):
        with pytest.raises(StoreError, match="'a'"):
            call()


def test_where_the_bytes_are_is_kept_for_each_store(world: World) -> None:
    world.add("a")
    world.add("b", store="store-b")
    assert world.base.sql("SELECT asset_id, store_id, path, state FROM asset_locations ORDER BY asset_id") == [
        ("a", STORE, "files/a", "present"),
        ("b", "store-b", "files/b", "present"),
    ]


def test_a_registration_that_fails_leaves_nothing(world: World) -> None:
    with pytest.raises(UsageError):
        world.assets.register(asset("a", labels={"x": "y", "z": "\0"}), store_id=STORE, path="p")
    for table in ("assets", "asset_labels", "asset_locations"):
        assert world.base.sql(f"SELECT * FROM {table}") == []


def test_types_are_kept_as_what_they_are(world: World) -> None:
    for number, kind in enumerate(AssetType):
        world.assets.register(asset(f"a{number}", type=kind))
        assert world.assets.get(f"a{number}", now=1).type is kind


PATHS = (
    *("", "/", "/etc/passwd", "..", "../outside", "a/../../outside", "a/..", ".", "./a", "a//b", "a/", "a/./b"),
    *("system", "system/store.json", "system/kernel/k/x86_64", "tmp/x", "locks/x"),
    *("registry.sqlite", "registry.sqlite-wal", "collected.jsonl"),
)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_not_the_assets_own_is_refused(world: World, path: str) -> None:
    with pytest.raises(UsageError, match="is no path of an asset"):
        world.assets.register(asset("a"), store_id=STORE, path=path)
    assert world.ids() == []


def test_a_file_is_one_assets_alone(world: World) -> None:
    world.add("a")
    with pytest.raises(UsageError, match="'files/a' is the file of asset 'a'"):
        world.assets.register(asset("b"), store_id=STORE, path="files/a")
    assert world.ids() == ["a"]
    world.assets.register(asset("b"), store_id="store-b", path="files/a")


def test_the_longest_path_is_kept_and_a_longer_one_refused(world: World) -> None:
    longest = "/".join(secrets.token_hex(60) for _ in range(9))[:1024]
    world.assets.register(asset("a"), store_id="s" * 64, path=longest)
    with pytest.raises(UsageError, match="up to 1024 bytes"):
        world.assets.register(asset("b"), store_id="s" * 64, path=f"{longest}x")
    world.tombstones = Tombstones(world.database, "s" * 64)
    assert [stone.path for stone in world.tombstones.delete("a", now=1000)] == [longest]


@pytest.mark.parametrize("path", ["a", "files/a", ".a", "a..b", "...", "systems/a", "a\\b", "é/ü"])
def test_any_other_path_below_the_data_directory_is_fine(world: World, path: str) -> None:
    world.assets.register(asset("a"), store_id=STORE, path=path)
    assert world.base.sql("SELECT path FROM asset_locations") == [(path,)]
