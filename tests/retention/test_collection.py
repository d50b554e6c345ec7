"""Collections that are killed, on a full disk, and of hosts that share a registry."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from systemfiles.foundation.errors import StoreError
from tests.conftest import CHECKOUT
from tests.postgres import Server
from tests.retention.conftest import Host
from tests.retention.crash import killed_at
from tests.retention.plain import Plain
from tests.retention.support import KERNEL, PAIR, gone, things
from tests.retention.world import (
    DAY,
    World,
    put_blob,
)
from tests.smalldisk import fill, on_small_disk

FULL = bool(os.environ.get("SYSTEMFILES_TEST_FULL"))


def test_a_collection_that_is_killed_anywhere_is_finished_by_the_next(host: Host, tmp_path: Path) -> None:
    """The registry's file is copied with all that is in it, so each run begins with the same."""
    host.provide()
    host.system.acquire(host.provide("k-2", "i-2"), holder="vm-7")
    host.system.pin("snapshot-42", host.provide("k-3", "i-2"))
    host.system.image(host.world.images[0])
    host.clock.advance(10 * DAY)
    host.system.holdings.registry.close()
    kept = {"kernel-k-2-x86_64", "kernel-k-3-x86_64", "initrd-i-2-x86_64"}
    number, killed = 0, True
    while killed:
        number += 1 if FULL else 7
        data = tmp_path / f"killed-{number}"
        subprocess.run(["cp", "-a", str(host.data), str(data)], check=True)
        other = Host(host.world, data, host.clock)
        killed = killed_at(number, partial(other.collect, max_cache_bytes=0))
        for path in [*(data / "tmp").glob("*"), *data.rglob(".systemfiles-new-*")]:
            os.utime(path, (0, 0))
        _assert_whole(other.plain, kept)
        other.collect(max_cache_bytes=0)
        _assert_whole(other.plain, kept)
        assert things(other) == kept
        assert other.plain.orphans() == set()
        assert other.plain.rows("SELECT * FROM tombstones") == []
        assert [*other.plain.idle_names()] == []
        assert [*(data / "tmp").iterdir()] == []
        told = {json.loads(line)["what"] for line in (data / "collected.jsonl").read_text().splitlines()}
        assert told >= PAIR
        other.system.holdings.registry.close()
        shutil.rmtree(data)
    assert number > 50


def _assert_whole(plain: Plain, kept: set[str]) -> None:
    found = plain.things()
    assert kept <= found.keys()
    assert [problem for asset in kept for problem in plain.damage(found[asset])] == []
    assert {asset for asset in plain.located() if asset not in found} == set()


def test_a_collection_without_assertions_opens_the_registry_all_the_same(host: Host) -> None:
    """As python -O leaves them out."""
    host.system.ensure("k-1", "i-1", holder="vm-7")
    host.system.holdings.registry.close()
    place = ["--data-dir", str(host.data), "--catalog-file", str(host.world.catalog)]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-O", "-m", "systemfiles.cli", *words, *place]
        return subprocess.run(command, cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=120)

    assert "vm-7" in run("lease", "list").stdout
    for path in host.data.glob("registry.sqlite*"):
        path.unlink()
    assert "the leases it had are lost" in run("gc").stderr
    assert (host.data / "registry.sqlite").exists()


# --- a full disk ---


def _on_a_full_disk(here: World, disk: Path) -> tuple[Host, str]:
    """A host whose disk is full since it has an orphan, and that blob's name."""
    host = Host(here, disk / "data")
    host.provide()
    orphan = put_blob(host.data, bytes(300_000))
    host.clock.advance(60)
    host.system.holdings.registry.close()
    fill(disk / "ballast")
    return host, orphan


def test_on_a_full_disk_what_takes_no_space_to_free_goes_first_and_then_the_rest(here: World, tmp_path: Path) -> None:
    on_small_disk(tmp_path, 3 << 20, partial(_collect_on_a_full_disk, here, tmp_path))


def _collect_on_a_full_disk(here: World, disk: Path) -> None:
    host, orphan = _on_a_full_disk(here, disk)
    first = host.collect()
    assert not (host.plain.blobs / orphan).exists()
    assert first.bytes_freed >= 300_000
    assert any("registry" in str(problem) for problem in first.problems)
    second = host.collect()
    assert gone(second) == PAIR
    assert second.problems == ()


def test_what_failed_on_a_full_disk_keeps_no_collection_from_freeing_it(here: World, tmp_path: Path) -> None:
    """A first use of the registry there leaves an empty -wal behind, and no -shm."""
    on_small_disk(tmp_path, 3 << 20, partial(_collect_after_a_failure, here, tmp_path))


def _collect_after_a_failure(here: World, disk: Path) -> None:
    host, orphan = _on_a_full_disk(here, disk)
    with pytest.raises(StoreError):
        host.system.leases()
    host.system.holdings.registry.close()
    assert (host.data / "registry.sqlite-wal").stat().st_size == 0
    assert host.collect().bytes_freed >= 300_000
    assert not (host.plain.blobs / orphan).exists()
    assert gone(host.collect()) == PAIR


def test_blobs_that_nothing_needs_go_although_a_full_disk_lets_nobody_read_the_registry(
    here: World, tmp_path: Path
) -> None:
    on_small_disk(tmp_path, 3 << 20, partial(_collect_blindly, here, tmp_path))


def _collect_blindly(here: World, disk: Path) -> None:
    host = Host(here, disk / "data")
    files = host.provide()
    host.system.holdings.registry.close()

    def die() -> None:
        host.system.acquire(files, holder="vm-7", ttl=30)
        os.kill(os.getpid(), signal.SIGKILL)

    assert killed_at(10**9, die)
    (host.data / "registry.sqlite-shm").unlink()
    orphan = put_blob(host.data, bytes(300_000))
    host.clock.advance(60)
    fill(disk / "ballast")
    first = host.collect()
    assert gone(first) == set()
    assert not (host.plain.blobs / orphan).exists()
    assert ["registry" in str(problem) for problem in first.problems] == [True]
    assert gone(host.collect()) == PAIR


# --- one registry for several hosts ---


def test_a_host_that_shares_its_registry_frees_only_what_is_its_own(
    here: World, tmp_path: Path, postgres: Server
) -> None:
    url = postgres.new_database()
    one, two = (Host(here, tmp_path / name, url=url) for name in ("one", "two"))
    for host in (one, two):
        host.provide()
    one.system.ensure("k-1", "i-1", holder="vm-7")
    two.system.pin("snapshot-42", two.provide("k-2", "i-2"))
    one.system.pin("snapshot-42", one.provide("k-3", "i-2"))
    assert [each.holder for each in two.system.leases()] == []
    assert two.system.release_all("vm-7") == 0
    assert gone(two.collect()) == PAIR
    assert things(one) == {*PAIR, "kernel-k-3-x86_64", "initrd-i-2-x86_64"}
    assert gone(one.collect()) == set()
    two.system.unpin("snapshot-42")
    assert [each.holder for each in one.system.holdings.registry.leases.list(now=0)] == ["vm-7", "pin:snapshot-42"]
    two.clock.advance(60)
    assert gone(two.collect()) == {"kernel-k-2-x86_64", "initrd-i-2-x86_64"}
    assert things(two) == set()
    assert [*one.plain.damage(one.plain.things()[KERNEL])] == []
    one.system.release_all("vm-7")
    assert gone(one.collect()) == PAIR


def test_the_lease_that_a_holder_has_on_another_host_is_no_reason_not_to_make_one_here(
    here: World, tmp_path: Path, postgres: Server
) -> None:
    url = postgres.new_database()
    for name in ("one", "two"):
        host = Host(here, tmp_path / name, url=url)
        host.system.ensure("k-1", "i-1", holder="the fleet's VM")
        host.clock.advance(60)
        assert gone(host.collect()) == set()
        assert len(host.system.leases("the fleet's VM")) == 1
