"""What goes from the content store, what stays there, and which images go when it is too large."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from systemfiles.content.layout import Layout
from systemfiles.content.packaging import without_host_facts
from systemfiles.content.sweep import sweep
from systemfiles.foundation.errors import StoreError
from systemfiles.retention.outcome import Outcome
from tests.contract.registry.support import Running
from tests.postgres import Server
from tests.retention.conftest import Host
from tests.retention.support import DEFAULTS, INITRD, KERNEL, PAIR, gone, names, things
from tests.retention.world import (
    DAY,
    World,
    forget_name,
    name_as_others,
    put_blob,
    put_foreign_image,
)


def test_a_blob_that_nothing_needs_goes_once_it_is_old(host: Host) -> None:
    blob = put_blob(host.data, b"whatever")
    host.clock.advance(DAY / 2)
    host.collect(grace=DAY)
    assert (host.plain.blobs / blob).exists()
    host.clock.advance(DAY)
    collected = host.collect(grace=DAY)
    assert collected.bytes_freed > 0
    assert not (host.plain.blobs / blob).exists()


def test_where_index_json_is_gone_nobody_knows_what_others_need(host: Host) -> None:
    host.provide()
    theirs = put_foreign_image(host.data, "theirs", b"layer")
    index = host.data / "system" / "oci-cache" / "index.json"
    kept = index.read_bytes()
    index.unlink()
    host.clock.advance(10 * DAY)
    for _ in range(2):
        problems = host.collect(grace=DAY).problems
        assert "no index.json" in problems[0].summary
        assert "restore it from a backup" in str(problems[0].hint)
        assert not index.exists()
    assert all((host.plain.blobs / digest).exists() for digest in theirs)
    with pytest.raises(StoreError, match=r"no index\.json"):
        host.collect(grace=DAY, dry_run=True)
    index.write_bytes(kept)
    assert not host.collect(grace=DAY).problems
    assert all((host.plain.blobs / digest).exists() for digest in theirs)


def test_a_blob_that_is_written_anew_or_needed_after_all_stays(host: Host) -> None:
    """Between the first look and the removal."""
    written, wanted, orphan = (put_blob(host.data, name) for name in (b"written anew", b"wanted", b"an orphan"))
    then = time.time() - DAY
    for name in (written, wanted, orphan):
        os.utime(host.plain.blobs / name, (then, then))
    looks = itertools.count()

    def also_needed() -> list[str]:
        if not next(looks):
            return []
        os.utime(host.plain.blobs / written)
        return [wanted]

    removed = [*sweep(Layout(host.system.paths), older_than=then + 1, also_needed=also_needed)]
    assert [each.digest.hex for each in removed] == [orphan]
    assert {path.name for path in host.plain.blobs.iterdir()} == {written, wanted}


def test_what_has_no_blobs_name_is_left_alone(host: Host) -> None:
    put_blob(host.data, b"whatever")
    for name in ("oci-put-blob123", ".umoci-x", "0" * 63):
        (host.plain.blobs / name).write_bytes(b"another tool is at it")
    (host.plain.blobs / ("0" * 64)).mkdir()
    host.clock.advance(60)
    assert host.collect().problems == ()
    assert len([*host.plain.blobs.iterdir()]) == 4


def test_what_another_tool_named_stays_with_all_it_refers_to(host: Host) -> None:
    theirs = put_foreign_image(host.data, "theirs", b"a layer")
    before = host.plain.entries()
    host.provide()
    host.clock.advance(100 * DAY)
    host.collect(max_cache_bytes=0)
    assert host.plain.entries() == before
    assert {path.name for path in host.plain.blobs.iterdir()} == {*theirs}


def test_what_another_tools_artifact_refers_to_stays(host: Host) -> None:
    blobs = {name: put_blob(host.data, name.encode()) for name in ("a blob", "a subject")}
    described = {
        name: {"mediaType": "text/plain", "digest": f"sha256:{blob}", "size": 9} for name, blob in blobs.items()
    }
    manifest = json.dumps({"blobs": [described["a blob"]], "subject": described["a subject"]}).encode()
    name_as_others(host.data, "theirs", put_blob(host.data, manifest), len(manifest))
    host.clock.advance(60)
    host.collect()
    assert len([*host.plain.blobs.iterdir()]) == 3


def test_the_image_that_an_initrd_was_built_on_stays_as_long_as_the_initrd(host: Host) -> None:
    host.provide("k-1", "i-1")
    host.system.pin("one", host.provide("k-1", "i-2"))
    base = {name for name in names(host) if "busybox-i-2" in name}
    assert {each.what for each in host.collect().gone if "busybox" in each.what}.isdisjoint(base)
    assert {name for name in names(host) if "busybox" in name} == base
    host.system.unpin("one")
    host.clock.advance(1)
    assert base <= {each.what for each in host.collect().gone}


def test_the_image_that_a_pinned_initrd_was_built_on_stays_although_the_initrd_is_lost(host: Host) -> None:
    host.system.pin("one", host.provide())
    shutil.rmtree(host.data / "system" / "initrd")
    assert gone(host.collect()) == set()
    assert {name for name in names(host) if "busybox-i-1" in name}
    assert host.system.restore("one").initrd.path.exists()


def test_the_blobs_of_what_is_pinned_stay_although_directories_and_names_are_lost(host: Host) -> None:
    files = host.provide()
    host.system.pin("one", files)
    for name in PAIR:
        forget_name(host.data, name)
    for kind in ("kernel", "initrd"):
        shutil.rmtree(host.data / "system" / kind)
    host.clock.advance(10 * DAY)
    assert gone(host.collect()) == set()
    assert {files.kernel.sha256, files.initrd.sha256} <= {path.name for path in host.plain.blobs.iterdir()}
    assert host.system.restore("one", full=True).to_dict() == files.to_dict()


def test_what_is_leased_can_be_brought_back_although_its_directory_was_removed(host: Host) -> None:
    files = host.provide()
    host.system.acquire(files, holder="vm-7")
    shutil.rmtree(host.data / "system" / "kernel")
    host.clock.advance(10 * DAY)
    assert host.collect().gone == ()
    assert host.system.restore(files.to_dict()).kernel.sha256 == files.kernel.sha256


def test_the_row_of_what_somebody_removed_by_hand_goes_and_so_do_its_blobs(host: Host) -> None:
    host.provide()
    shutil.rmtree(host.data / "system" / "kernel")
    assert KERNEL in gone(host.collect())
    assert host.plain.located() == {}
    assert [*host.plain.blobs.iterdir()] == []


def test_an_artifact_whose_record_is_damaged_is_left_alone_with_all_that_could_mend_it(host: Host) -> None:
    files = host.provide()
    record = host.data / "system" / "kernel" / "k-1" / "x86_64" / "artifact.json"
    record.unlink()
    record.write_text("{")
    host.clock.advance(10 * DAY)
    collected = host.collect()
    assert gone(collected) == {INITRD}
    assert KERNEL in names(host)
    assert (host.plain.blobs / files.kernel.sha256).exists()
    record.unlink()
    assert host.system.ensure("k-1", "i-1").kernel.sha256 == files.kernel.sha256


def test_what_a_run_that_was_killed_left_half_made_goes(host: Host) -> None:
    host.provide()
    (host.data / "system" / "kernel" / "k-1" / "x86_64" / "artifact.json").unlink()
    host.system.holdings.registry.tombstones.delete(KERNEL, now=host.clock())
    host.system.holdings.registry.tombstones.drop(
        [stone.id for batch in host.system.holdings.registry.tombstones.pending() for stone in batch]
    )
    assert host.collect(grace=DAY).gone == ()
    assert gone(host.collect()) == PAIR
    assert [*host.data.glob("system/*/*/*/vmlinux")] == []


# --- images: a cache with a limit ---


def test_the_longest_unused_images_go_when_the_content_store_is_too_large(host: Host) -> None:
    host.provide(*("steady", "plain"))
    for reference in host.world.images:
        host.system.image(reference)
    needed = sum(path.stat().st_size for path in host.plain.blobs.iterdir()) - 5 * 20_000
    for number in (2, 0, 3):
        host.clock.advance(60)
        host.system.image(host.world.images[number])
    host.clock.advance(60)
    left = []
    for most in (needed + 90_000, needed + 60_000, 0):
        foretold = host.collect(dry_run=True, max_cache_bytes=most)
        collected = host.collect(max_cache_bytes=most)
        assert foretold == collected
        left.append(sorted(int(name.partition("guest-")[2][0]) for name in names(host) if "guest-" in name))
    # each two that follow another share a layer, and so 1 alone takes nothing away
    assert left == [[0, 3], [3], []]
    assert things(host) == DEFAULTS
    assert host.system.resolve("steady", "plain")
    assert host.plain.orphans() == set()


def test_images_stay_when_there_is_no_limit(host: Host) -> None:
    host.system.image(host.world.images[0])
    host.clock.advance(100 * DAY)
    assert host.collect().gone == ()


def test_an_image_that_was_used_within_the_grace_period_stays(host: Host) -> None:
    host.provide(*("steady", "plain"))
    host.system.image(host.world.images[0])
    host.clock.advance(10 * DAY)
    host.system.image(host.world.images[0])
    host.clock.advance(60)
    assert host.collect(grace=DAY, max_cache_bytes=0).gone == ()
    assert len(host.collect(max_cache_bytes=0).gone) == 1


@pytest.mark.parametrize("by", ["its name", "its digest", "the digest that it came as"])
def test_an_image_in_dockers_terms_is_used_by_whatever_name_it_is_asked_for(host: Host, by: str) -> None:
    host.provide(*("steady", "plain"))
    reference = host.world.docker_image
    asked = {
        "its name": reference.partition("@")[0],
        "its digest": str(host.system.image(reference.partition("@")[0]).digest),
        "the digest that it came as": reference,
    }
    host.clock.advance(10 * DAY)
    host.system.image(asked[by])
    host.clock.advance(60)
    assert host.collect(grace=DAY, max_cache_bytes=0).gone == ()
    host.clock.advance(DAY)
    assert len(host.collect(grace=DAY, max_cache_bytes=0).gone) == 2


def test_an_image_that_is_used_while_others_have_the_content_store_stays(host: Host) -> None:
    """Between the first look and the removal; the one that was used after it goes in its place."""
    host.provide(*("steady", "plain"))
    for reference in host.world.images[::2]:
        host.system.image(reference)
        host.clock.advance(60)
    size = sum(path.stat().st_size for path in host.plain.blobs.iterdir())
    evictor, outcome = host.system.keeper.evictor, Outcome()
    layout = Layout(host.system.paths)
    with layout.exclusively():
        evicting = Running(lambda: evictor.evict(size - 1, young=int(host.clock()), outcome=outcome))
        assert evicting.waits()
        host.system.image(host.world.images[0])
    evicting.result()
    assert [name for name in names(host) if "guest" in name] == [f"{host.world.images[0]}-x86_64"]


def test_an_image_in_dockers_terms_goes_with_what_it_came_as(host: Host) -> None:
    host.system.image(host.world.images[0])
    host.system.image(host.world.docker_image)
    host.clock.advance(60)
    assert len([name for name in names(host) if "docker" in name]) == 2
    collected = host.collect(max_cache_bytes=0)
    assert len(collected.gone) == 3
    assert [*host.plain.blobs.iterdir()] == []


def test_an_image_that_another_tool_named_as_well_stays(host: Host) -> None:
    image = host.system.image(host.world.images[0])
    path = host.plain.blobs / image.digest.removeprefix("sha256:")
    name_as_others(host.data, "theirs", path.name, path.stat().st_size)
    host.clock.advance(60)
    host.collect(max_cache_bytes=0)
    assert all(layer.exists() for layer in image.layers)


@pytest.mark.parametrize("by", ["a collection", "hand"])
def test_when_an_image_was_used_is_forgotten_with_it(host: Host, by: str) -> None:
    host.provide(*("steady", "plain"))
    kept, lost = (host.system.image(reference) for reference in host.world.images[:2])
    host.clock.advance(60)
    if by == "hand":
        forget_name(host.data, f"{host.world.images[1]}-x86_64")
        host.collect()
    else:
        host.collect(max_cache_bytes=0, grace=DAY)
        assert len(host.plain.rows("SELECT * FROM content_use")) == 2
        host.system.image(host.world.images[0])
        host.clock.advance(DAY - 30)
        host.system.image(host.world.images[0])
        host.clock.advance(DAY - 30)
        host.collect(max_cache_bytes=0, grace=DAY)
    assert host.plain.rows("SELECT digest FROM content_use") == [(str(kept.digest),)]
    assert not any(path.name == lost.digest.hex for path in host.plain.blobs.iterdir())


# --- an initrd that was compressed anew ---


def compress_anew(host: Host) -> str:
    """Lets the pair's initrd be another file with the same content, as another release's zlib makes it; its digest."""
    provisioner, arch = host.system.provisioner(), host.system.arch
    artifact = host.system._artifacts.load("initrd", "i-1", arch)
    layout = provisioner.store.layout
    data = gzip.compress(gzip.decompress(artifact.path.read_bytes()), 1, mtime=0)
    with layout.ingesting():
        file = layout.add_bytes(data, "application/octet-stream")
        record = without_host_facts(artifact.record)
        files = {"initrd": {"sha256": file.digest.hex, "size": file.size}}
        provisioner.store.put({**record, "files": files}, {"initrd": file})
    return file.digest.hex


def test_the_registry_learns_of_an_initrd_that_was_compressed_anew(host: Host) -> None:
    files = host.provide()
    host.system.pin("snapshot-42", files)
    digest = compress_anew(host)
    assert digest != files.initrd.sha256
    host.collect()
    asset = host.system.holdings.registry.assets.get(INITRD, now=0, access=False)
    assert (asset.checksum, asset.size_bytes) == (digest, host.system.initrd("i-1").size)
    assert host.system.restore("snapshot-42", full=True).initrd.sha256 == digest


def test_whoever_makes_an_initrd_anew_tells_the_registry_at_once(host: Host) -> None:
    host.system.ensure("k-1", "i-1", holder="vm-7")
    digest = compress_anew(host)
    initrd = host.system._artifacts.load("initrd", "i-1", host.system.arch)
    host.system.holdings.provided([initrd], [initrd], "vm-7")
    assert host.system.holdings.registry.assets.get(INITRD, now=0, access=False).checksum == digest


def test_of_hosts_that_share_a_registry_none_takes_back_what_the_other_said(
    here: World, tmp_path: Path, postgres: Server
) -> None:
    one, two = (Host(here, tmp_path / name, url=url) for url in [postgres.new_database()] for name in ("one", "two"))
    files = one.provide()
    two.provide()
    compress_anew(two)
    two.system.holdings.learn()
    asset = one.system.holdings.registry.assets.get(INITRD, now=0, access=False)
    assert asset.checksum == files.initrd.sha256
