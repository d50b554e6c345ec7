"""What is told of a collection, before and after it, and why something is kept."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from systemfiles.foundation.errors import StoreError, UsageError
from systemfiles.registry.assets import Asset, AssetType, insert, locate
from systemfiles.retention.outcome import MOST_TOLD, Outcome
from tests.conftest import CHECKOUT
from tests.retention.conftest import Host
from tests.retention.crash import killed_at
from tests.retention.plain import listing
from tests.retention.support import INITRD, KERNEL, PAIR, names
from tests.retention.world import (
    ARM,
    DAY,
    RELEASES,
    put_blob,
    put_foreign_image,
)


def test_the_audit_log_says_what_went_when_why_and_who_last_held_it(host: Host) -> None:
    host.system.acquire(host.provide(), holder="vm-7").release()
    host.clock.advance(10 * DAY)
    host.collect()
    lines = [json.loads(line) for line in (host.data / "collected.jsonl").read_text().splitlines()]
    (kernel,) = (line for line in lines if line["what"] == KERNEL)
    assert kernel.keys() == {"at", "what", "why", "last_held_by", "size"}
    assert (kernel["why"], kernel["last_held_by"]) == ("held by nothing", "vm-7")
    assert kernel["size"] == 9352
    assert kernel["at"].endswith("Z")
    host.provide("k-2", "i-2")
    host.collect()
    assert (host.data / "collected.jsonl").read_text().count("\n") > len(lines)


def test_the_bytes_that_are_told_are_what_the_disk_got_back(host: Host) -> None:
    for number, version in enumerate(("k-1", "k-2", "k-3")):
        host.provide(version, ("i-1", "twin", "i-2")[number])
    host.system.image(host.world.images[0])
    host.system.pin("snapshot-42", host.system.resolve("k-2", "twin"))  # whose initrd is the very blob of i-1's
    os.link(host.data / "system/kernel/k-3/x86_64/vmlinux", host.data / "in a jail")
    host.clock.advance(60)
    before = on_disk(host)
    foretold = host.collect(dry_run=True, max_cache_bytes=0)
    collected = host.collect(max_cache_bytes=0)
    assert foretold.bytes_freed == collected.bytes_freed == before - on_disk(host)
    assert collected.bytes_freed > 10_000


def on_disk(host: Host) -> int:
    """What du(1) finds: of directories of artifacts, and of blobs."""
    found = {}
    for top in ("system/kernel", "system/initrd", "system/oci-cache/blobs/sha256"):
        for path in (host.data / top).rglob("*"):
            facts = path.lstat()
            found[facts.st_ino] = facts.st_blocks * 512
    jailed = host.data / "in a jail"
    return sum(found.values()) + (jailed.stat().st_blocks * 512 if jailed.stat().st_ino not in found else 0)


def test_sha256sums_lists_what_is_left_even_after_a_collection_that_was_killed(host: Host) -> None:
    host.provide()
    host.provide(*("steady", "plain"))
    host.system.provisioner().write_manifest()
    host.system.keeper.collector.delete(KERNEL)  # which leaves the rest to the next collection
    host.collect(grace=10**6)
    sums = (host.data / "system" / "SHA256SUMS").read_text()
    assert "kernel/steady/x86_64/vmlinux" in sums
    assert "kernel/k-1" not in sums
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=host.data / "system", check=False)
    assert done.returncode == 0


def test_a_dry_run_tells_the_same_as_the_collection_that_follows(host: Host) -> None:
    for release in RELEASES:
        host.update(release)
    for version in ("k-1", "k-2"):
        host.provide(version, "twin")
        host.provide(version, "i-2", arch=ARM)
    host.system.acquire(host.system.resolve("k-1", "twin"), holder="vm-7").release()
    for reference in (*host.world.images, host.world.docker_image):
        host.system.image(reference)
    put_foreign_image(host.data, "theirs", b"a layer")
    put_blob(host.data, b"an orphan")
    shutil.rmtree(host.data / "system/kernel/k-2/aarch64")
    (host.data / "system/kernel/k-2/x86_64/artifact.json").unlink()
    host.clock.advance(10 * DAY)
    foretold = host.collect(dry_run=True, max_cache_bytes=60_000)
    collected = host.collect(max_cache_bytes=60_000)
    assert sorted(foretold.gone) == sorted(collected.gone)
    assert foretold.bytes_freed == collected.bytes_freed
    assert len(collected.gone) > 10


def at_rest(host: Host) -> None:
    """Nobody has it open."""


def killed(host: Host) -> None:
    killed_at(60, lambda: host.at(ARM).ensure(holder="vm-8"))


def without_registry(host: Host) -> None:
    for path in (*host.data.glob("registry.sqlite*"), host.data / "system" / "store.json"):
        path.unlink()


def in_use(host: Host) -> subprocess.Popen[str]:
    """By another process, which has written to it."""
    words = [sys.executable, "-c", _HOLDING, str(host.data), str(host.world.catalog)]
    process = subprocess.Popen(words, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "leased\n"
    return process


_HOLDING = """
import sys
from systemfiles import SystemFiles
system = SystemFiles(sys.argv[1], catalog=sys.argv[2], arch="x86_64")
system.acquire(system.resolve("k-3", "i-1"), holder="vm-9")
print("leased", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("prepare", [at_rest, without_registry, killed, in_use], ids=lambda each: each.__name__)
def test_a_dry_run_changes_nothing_at_all(host: Host, prepare: Callable[[Host], object]) -> None:
    host.provide()
    host.system.pin("snapshot-42", host.provide("k-2", "i-2"))
    host.system.acquire(host.provide("k-3"), holder="vm-7")
    host.system.holdings.registry.close()
    user = prepare(host)
    before = listing(host.data)
    done = gc(host, "--dry-run", "--grace", "0", "--keep-last", "0")
    assert done.returncode == 0, done.stderr
    assert "would go: kernel-k-1-x86_64" in done.stdout
    assert "kernel-k-2-x86_64" not in done.stdout
    assert listing(host.data) == before
    if isinstance(user, subprocess.Popen):
        user.communicate()


def test_a_dry_run_makes_nothing_where_nothing_is(host: Host) -> None:
    assert gc(host, "--dry-run").stdout == "nothing to collect\n"
    assert not host.data.exists()


def test_a_dry_run_does_not_take_the_registry_of_an_earlier_release_for_none(host: Host) -> None:
    host.system.acquire(host.provide(), holder="vm-7")
    with host.system.holdings.registry.database.writing() as transaction:
        transaction.execute("UPDATE alembic_version SET version_num = '0000'")
    host.system.holdings.registry.close()
    before = listing(host.data)
    with pytest.raises(StoreError, match="was written by an earlier release of systemfiles"):
        host.collect(dry_run=True)
    assert listing(host.data) == before


def gc(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    place = ["--data-dir", str(host.data), "--catalog-file", str(host.world.catalog)]
    command = [sys.executable, "-m", "systemfiles.cli", "gc", *place, *words]
    return subprocess.run(command, cwd=CHECKOUT, check=False, capture_output=True, text=True, timeout=120)


EXPLAINED = {
    "k-1": ("kernel-k-1-x86_64", False, "held by nothing"),
    "kernel-k-1-x86_64": ("kernel-k-1-x86_64", False, "held by nothing"),
    "snapshot-42": ("initrd-i-2-x86_64", True, "pinned by snapshot-42 since"),
    "theirs": ("theirs in the content store", True, "a name that another tool gave"),
}


@pytest.mark.parametrize("subject", EXPLAINED)
def test_why_something_is_kept_or_would_go_can_be_asked_by_any_of_its_names(host: Host, subject: str) -> None:
    host.provide()
    host.system.pin("snapshot-42", host.provide("k-2", "i-2"))
    put_foreign_image(host.data, "theirs", b"a layer")
    found = host.system.explain(subject, grace=0, keep_last=0)
    what, kept, why = EXPLAINED[subject]
    assert [(each.kept, each.why[: len(why)]) for each in found if each.what == what] == [(kept, why)]


def test_why_a_blob_is_kept_or_would_go_can_be_asked_by_its_digest(host: Host) -> None:
    files = host.provide()
    orphan = put_blob(host.data, b"an orphan")
    for digest in (files.kernel.sha256, f"sha256:{files.kernel.sha256}", files.kernel.sha256[:12]):
        (blob,) = (each for each in host.system.explain(digest) if each.what.startswith("blob"))
        assert blob == (f"blob sha256:{files.kernel.sha256}", True, f"needed by {KERNEL}, a name of ours")
    for grace, told in ((0, (False, "needed by nothing")), (DAY, (True, "written within the grace period"))):
        host.clock.advance(60)
        assert host.system.explain(orphan, grace=grace) == ((f"blob sha256:{orphan}", *told),)
        assert (host.collect(dry_run=True, grace=grace, keep_last=9).bytes_freed == 0) is told[0]
    with pytest.raises(UsageError, match="nothing here is called 'nobody'"):
        host.system.explain("nobody")


def test_what_takes_space_is_listed_with_the_reason_and_what_is_shared_counts_once(host: Host) -> None:
    host.provide("k-1", "i-1")
    host.provide("k-1", "twin")
    rows, total = host.system.usage()
    assert {row["what"] for row in rows} >= {*PAIR, "initrd-twin-x86_64"}
    assert total == sum(path.stat().st_size for path in host.plain.blobs.iterdir())
    why = "one of the 2 newest kernels for x86_64; used within the grace period"
    assert {row["why"] for row in rows if row["what"] == KERNEL} == {why}


def test_what_is_explained_is_what_a_collection_does(host: Host) -> None:
    """Of artifacts, of names that hold nothing, and of the blobs that only those need."""
    host.provide()
    host.system.pin("snapshot-42", host.provide("k-2", "i-2"))
    host.system.image(host.world.images[0])
    put_foreign_image(host.data, "theirs", b"a layer")
    shutil.rmtree(host.data / "system/initrd/i-1")
    host.clock.advance(10 * DAY)
    foretold = {each.what for each in host.collect(dry_run=True, grace=DAY).gone}
    subjects = {*names(host), *(path.name for path in host.plain.blobs.iterdir())}
    told = {each for subject in subjects for each in host.system.explain(subject, grace=DAY, keep_last=0)}
    rows, _ = host.system.usage()
    host.collect(grace=DAY)
    suffix = " in the content store"
    assert {each.what.removesuffix(suffix) for each in told if each.what.endswith(suffix) and each.kept} == names(host)
    blobs = {path.name for path in host.plain.blobs.iterdir()}
    assert {each.what.removeprefix("blob sha256:") for each in told if each.what[:4] == "blob" and each.kept} == blobs
    assert {each.what for each in told if not each.kept and ":" not in each.what and " " not in each.what} <= foretold
    assert {INITRD, KERNEL} < foretold
    (why,) = (row["why"] for row in rows if "busybox-i-1" in str(row["what"]))
    assert why == "no initrd here is built on it"


def test_all_that_holds_something_is_told(host: Host) -> None:
    files = host.provide(*("steady", "plain"))
    for number in range(5):
        host.system.pin(f"snapshot-{number}", files)
    host.system.acquire(files, holder="vm-7")
    day = host.system.pins()[0].created_at[:10]
    (told, *_) = host.system.explain("steady", grace=DAY, keep_last=1)
    assert told.why.split("; ") == [
        f"pinned by snapshot-0 since {day}, snapshot-1 since {day}, snapshot-2 since {day} and 2 more",
        "leased by vm-7",
        "the current version of profile pinned",
        "the newest kernel for x86_64",
        "used within the grace period",
    ]
    registry = host.system.holdings.registry
    register(host, "rootfs-1")
    registry.leases.acquire(["rootfs-1"], "vm-7", now=host.clock(), store_id=registry.store_id)
    assert host.system.explain("rootfs-1", grace=DAY)[0].why == "leased by vm-7; used within the grace period"


def no_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


def no_record(path: Path) -> None:
    (path.parent / "artifact.json").unlink()
    (path.parent / "artifact.json").write_text("{")


def changed(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes(len(data)))


def shorter(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"x")


LOST: dict[str, tuple[Callable[[Path], object], str]] = {
    "it is gone": (no_directory, "it is not there"),
    "its file is gone": (Path.unlink, "its file is not there"),
    "its record is damaged": (no_record, "its record is damaged"),
    "it is shorter": (shorter, "its file has 1 bytes instead of "),
    "it is changed": (changed, "its file is not as it was checked last"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_pinned_and_not_as_it_was_is_told_and_left_alone(host: Host, name: str) -> None:
    spoil, words = LOST[name]
    files = host.provide()
    host.system.pin("snapshot-42", files)
    assert [row["why"] for row in host.system.usage()[0] if "restore" in str(row["why"])] == []
    spoil(files.initrd.path)
    host.system.holdings.registry.close()
    before = listing(host.data)
    whys = {row["what"]: str(row["why"]) for row in host.system.usage()[0]}
    for subject in ("snapshot-42", "i-1", INITRD):
        (told,) = (each for each in host.system.explain(subject, grace=0, keep_last=0) if each.what == INITRD)
        assert told.kept
        assert f"; {words}" in told.why
        assert told.why.endswith(": see `systemfiles restore snapshot-42 --full`")
    assert f"; {words}" in whys[INITRD]
    assert [row["size"] for row in host.system.usage()[0] if row["what"] == INITRD] == [files.initrd.size]
    assert "restore" not in whys[KERNEL]
    host.system.holdings.registry.close()
    assert listing(host.data) == before


@pytest.mark.parametrize(("mode", "expected"), [(0o2775, 0o660), (0o755, 0o640)], ids=["a group's", "its owner's"])
def test_the_log_can_be_appended_to_by_the_group_that_shares_the_directory(
    host: Host, mode: int, expected: int
) -> None:
    host.data.mkdir()
    host.data.chmod(mode)
    host.provide()
    host.collect()
    assert stat.S_IMODE((host.data / "collected.jsonl").stat().st_mode) == expected


# --- assets that are no artifacts ---


def register(host: Host, *assets: str, size: int = 5000) -> None:
    """Assets of somebody else, whose files are nowhere: they are told of as the registry knows them."""
    now, registry = int(host.clock()), host.system.holdings.registry
    with registry.database.writing() as transaction:
        for number, asset in enumerate(assets):
            path = f"images/{asset}"
            found = Asset(asset, "an image", AssetType.ROOTFS, path, size + number, "ab" * 32, now, now, version="1.0")
            insert(transaction, found)
            locate(transaction, asset, registry.store_id, path)


def test_what_takes_space_is_told_of_assets_too(host: Host) -> None:
    host.provide()
    register(host, "held", "idle")
    registry = host.system.holdings.registry
    registry.leases.acquire(["held"], "vm-7", now=host.clock(), store_id=registry.store_id)
    assert {row["what"]: row["why"] for row in host.system.usage()[0]}["idle"] == "used within the grace period"
    host.clock.advance(30 * DAY)
    rows, total = host.system.usage()
    told = {row["what"]: (row["size"], row["why"]) for row in rows}
    assert (told["held"], told["idle"]) == ((5000, "leased by vm-7"), (5001, "held by nothing"))
    assert total == 10001 + sum(path.stat().st_size for path in host.plain.blobs.iterdir())


def test_of_very_many_assets_the_largest_are_listed_and_the_others_summed_up(host: Host) -> None:
    register(host, *(f"a{number:04}" for number in range(1002)), size=1)
    rows, total = host.system.usage()
    assert total == sum(range(1, 1003))
    assert rows[0]["what"] == "a1001"
    assert len(rows) == 1001
    assert rows[-1] == {"what": "2 smaller assets", "size": 1 + 2, "why": "gc --explain tells it of each"}


@pytest.mark.parametrize("subject", ["rootfs-1", "an image", "1.0", "ab" * 32, "sha256:" + "ab" * 32, "ababab"])
def test_why_an_asset_is_kept_or_would_go_can_be_asked_by_any_of_its_names(host: Host, subject: str) -> None:
    host.provide()
    register(host, "rootfs-1")
    assert host.system.explain(subject, grace=DAY) == (("rootfs-1", True, "used within the grace period"),)
    assert host.system.explain(subject, grace=0) == (("rootfs-1", False, "held by nothing"),)
    registry = host.system.holdings.registry
    registry.leases.acquire(["rootfs-1"], "vm-7", now=host.clock(), store_id=registry.store_id)
    assert host.system.explain(subject, grace=0) == (("rootfs-1", True, "leased by vm-7"),)


def test_of_very_much_that_goes_the_first_is_told_and_the_log_has_it_all(host: Host) -> None:
    register(host, *(f"a{number:05}" for number in range(MOST_TOLD + 5)))
    host.clock.advance(60)
    foretold = host.collect(dry_run=True)
    collected = host.collect()
    assert foretold == collected
    assert (len(collected.gone), collected.count) == (MOST_TOLD, MOST_TOLD + 5)
    assert foretold.told(dry_run=True).splitlines()[-2] == "would go: 5 more"
    assert collected.told().splitlines()[-2] == "removed: 5 more, see collected.jsonl"
    assert len((host.data / "collected.jsonl").read_text().splitlines()) == MOST_TOLD + 5


def test_of_very_many_problems_each_is_told_once_and_the_first_only() -> None:
    outcome = Outcome()
    for number in range(1000):
        outcome.failed(StoreError(f"nothing can be written: {number // 2}"))
    assert len({*map(str, outcome.problems)}) == len(outcome.problems) == 100


def test_what_a_deletion_did_not_get_to_is_told_as_that(host: Host) -> None:
    host.provide()
    host.system.holdings.registry.tombstones.delete(KERNEL, now=host.clock())
    foretold, collected = host.collect(dry_run=True), host.collect()
    assert sorted(foretold.gone) == sorted(collected.gone)
    assert {each.why for each in collected.gone if each.what == KERNEL} == {"deleted"}
