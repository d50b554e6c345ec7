"""The harness itself: it strikes where it says, and its checker sees every kind of damage."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.crash import checker
from tests.crash.conftest import Campaign
from tests.crash.inject import Injection, Outcome, run
from tests.crash.scenarios import SCENARIOS
from tests.crash.world import copy_data_dir, overwrite

Damage = Callable[[Path], object]


# --- striking ---


def _body(root: Path) -> int:
    """Writes in the main thread, in another, and in a program; reads; lets errors end it."""
    (root / "one").write_bytes(b"x" * 100)
    thread = threading.Thread(target=(root / "two").write_bytes, args=(b"y" * 100,))
    thread.start()
    thread.join()
    subprocess.run(["sh", "-c", f"echo z > {root}/three"], check=True)
    (root / "one").rename(root / "four")
    return 0


def _struck(injection: Injection | None) -> tuple[Outcome, dict[str, int]]:
    """How the body ended and what is there: names and sizes."""
    with tempfile.TemporaryDirectory() as directory:
        root, scratch = Path(directory, "root"), Path(directory, "scratch")
        root.mkdir()
        scratch.mkdir()
        outcome = run(partial(_body, root), root, scratch, injection)
        return outcome, {path.name: path.stat().st_size for path in root.iterdir()}


def test_calls_of_all_threads_and_programs_are_seen_in_order(campaigning: Campaign) -> None:
    outcome, _ = campaigning.call(_struck, None)
    seen = [(call.verb, call.paths[-1], call.actor) for call in outcome.calls]
    assert [entry for entry in seen if entry[0] in ("create", "write", "rename")] == [
        ("create", "one", "main"),
        ("write", "one", "main"),
        ("create", "two", "thread"),
        ("write", "two", "thread"),
        ("create", "three", "program"),
        ("write", "three", "program"),
        ("rename", "four", "main"),
    ]


@pytest.mark.parametrize(
    ("point", "status", "left"),
    [
        (Injection("kill", 1), -signal.SIGKILL, {}),
        (Injection("kill", 2), -signal.SIGKILL, {"one": 0}),
        (Injection("kill", 4), -signal.SIGKILL, {"one": 100, "two": 0}),
        (Injection("kill-program", 2), -signal.SIGKILL, {"one": 100, "two": 100, "three": 0}),
        (Injection("kill", 5), -signal.SIGKILL, {"one": 100, "two": 100, "three": 2}),
        (Injection("ENOSPC", 1), 1, {}),
        (Injection("EIO", 2), 1, {"one": 0}),
        (Injection("kill", 6), 0, {"four": 100, "two": 100, "three": 2}),
    ],
    ids=str,
)
def test_the_call_that_is_struck_is_not_carried_out(
    campaigning: Campaign, point: Injection, status: int, left: dict[str, int]
) -> None:
    outcome, found = campaigning.call(_struck, point)
    assert (outcome.status, found) == (status, left)


def test_ctrl_c_comes_at_the_call_which_may_still_be_carried_out(campaigning: Campaign) -> None:
    outcome, found = campaigning.call(_struck, Injection("SIGINT", 2))
    assert outcome.status == 1
    assert found in ({"one": 0}, {"one": 100})


def test_a_point_behind_the_last_call_is_not_reached(campaigning: Campaign) -> None:
    outcome, _ = campaigning.call(_struck, Injection("kill", 100))
    assert (outcome.status, outcome.struck) == (0, [])


def test_a_write_that_is_cut_short_is_done_by_half_and_says_so(campaigning: Campaign) -> None:
    outcome, found = campaigning.call(_struck, Injection("short", 1))
    writes = [call.args[2] for call in outcome.calls if call.verb == "write" and call.paths == ("one",)]
    assert writes == [100, 50]
    assert found["four"] == 100


def test_a_full_disk_takes_half_of_a_write_and_then_nothing(campaigning: Campaign) -> None:
    outcome, found = campaigning.call(_struck, Injection("full", 2))
    assert found["two"] == 50
    assert [call.verb for call in outcome.struck] == ["write", "write", "rename"]


def _database(root: Path) -> int:
    """Commits to a database that is new, and writes a part of a file at a place in it."""
    with contextlib.closing(sqlite3.connect(root / "base", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE one (two TEXT)")
    fd = os.open(root / "file", os.O_WRONLY | os.O_CREAT)
    written = os.pwrite(fd, b"x" * 100, 10)
    os.close(fd)
    return 0 if written == 100 else 3


def _struck_database(injection: Injection | None) -> tuple[Outcome, int]:
    with tempfile.TemporaryDirectory() as directory:
        root, scratch = Path(directory, "root"), Path(directory, "scratch")
        root.mkdir()
        scratch.mkdir()
        outcome = run(partial(_database, root), root, scratch, injection)
        return outcome, (root / "file").stat().st_size if (root / "file").exists() else 0


def test_what_sqlite_does_is_seen(campaigning: Campaign) -> None:
    outcome, _ = campaigning.call(_struck_database, None)
    seen = {(call.name, call.paths[-1]) for call in outcome.calls}
    assert outcome.status == 0
    assert {("pwrite64", "base-wal"), ("fdatasync", "base-wal"), ("pwrite64", "base"), ("unlink", "base-wal")} <= seen
    assert {("fcntl", "base"), ("fcntl", "base-shm"), ("ftruncate", "base-shm"), ("pwrite64", "base-shm")} <= seen


def test_a_write_at_a_place_that_is_cut_short_is_done_there(campaigning: Campaign) -> None:
    undisturbed, _ = campaigning.call(_struck_database, None)
    outcome, size = campaigning.call(_struck_database, Injection("short", undisturbed.count("short")))
    assert (outcome.status, size) == (3, 60)


# --- checking ---


def _index(change: Callable[[dict[str, list[dict[str, object]]]], object]) -> Damage:
    def damage(data: Path) -> None:
        path = data / "system" / "oci-cache" / "index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return damage


def _kernel(data: Path) -> Path:
    return data / "system" / "kernel" / "pinned-1" / "x86_64" / "vmlinux"


def _blob(data: Path) -> Path:
    """One that is reached from index.json."""
    index = json.loads((data / "system" / "oci-cache" / "index.json").read_text())
    return data / "system" / "oci-cache" / "blobs" / "sha256" / str(index["manifests"][-1]["digest"])[7:]


def _rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _pop_pins(data: Path) -> None:
    path = data / "system" / "versions.lock"
    lock = json.loads(path.read_text())
    lock["kernel"].clear()
    path.write_text(json.dumps(lock))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a changed kernel": (lambda data: overwrite(_kernel(data)), "has sha256"),
    "a cut kernel": (lambda data: _rewrite(_kernel(data), b"\x7fELF"), "has sha256"),
    "a lost kernel": (lambda data: _kernel(data).unlink(), "cannot be read"),
    "a lost artifact": (lambda data: (_kernel(data).parent / "artifact.json").unlink(), "was there with"),
    "half a record": (lambda data: _rewrite(_kernel(data).parent / "artifact.json", b'{"schema": 1'), "is no record"),
    "a writable kernel": (lambda data: _kernel(data).chmod(0o644), "has mode"),
    "a stranger beside it": (lambda data: (_kernel(data).parent / "Image").touch(), "on no record"),
    "a cut blob": (lambda data: _rewrite(_blob(data), b"{"), "has 1 bytes"),
    "a lost blob": (lambda data: _blob(data).unlink(), "reached from index.json and not there"),
    "half an index": (lambda data: _rewrite(_blob(data).parents[2] / "index.json", b'{"schema'), "is no OCI index"),
    "a lost foreign entry": (_index(lambda index: index["manifests"].pop(0)), "entries of others"),
    "a changed foreign entry": (_index(lambda index: index["manifests"][1].pop("x-unknown")), "entries of others"),
    "a lost foreign field": (_index(lambda index: index.pop("x-of-others")), "entries of others"),
    "a lost oci-layout": (lambda data: (_blob(data).parents[2] / "oci-layout").unlink(), "without oci-layout"),
    "half a lock": (lambda data: _rewrite(data / "system" / "versions.lock", b"{"), "is not versions.lock"),
    "a lost pin": (_pop_pins, "which is not pinned"),
    "a wrong sum": (
        lambda data: _rewrite(data / "system" / "SHA256SUMS", b"0" * 64 + b"  no\n"),
        "listed and not there",
    ),
    "a temporary file": (lambda data: (data / "system" / "kernel" / "new-1").touch(), "outside of tmp/"),
    "a temporary directory": (lambda data: (data / "system" / "work-1").mkdir(), "outside of tmp/"),
}


def _pin(data: Path) -> Path:
    return data / "system" / "pins" / "snapshot-1.json"


def _sql(*statements: str) -> Damage:
    def damage(data: Path) -> None:
        with contextlib.closing(sqlite3.connect(data / "registry.sqlite", isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)

    return damage


def _cut_database(data: Path) -> None:
    for path in data.glob("registry.sqlite-*"):
        path.unlink()
    os.truncate(data / "registry.sqlite", 8192)


HELD: dict[str, tuple[Damage, str]] = {
    "a row without its kernel": (lambda data: shutil.rmtree(data / "system/kernel/k-gone"), "has a row, and no file"),
    "a row without its file": (lambda data: (data / "disks/disk-gone.img").unlink(), "and it is not there"),
    "a leased kernel gone": (lambda data: shutil.rmtree(data / "system/kernel/k-leased"), "held by vm-1 and gone"),
    "a leased file gone": (lambda data: (data / "disks/disk-held.img").unlink(), "held by vm-1 and gone"),
    "a leased file changed": (lambda data: (data / "disks/disk-held.img").write_text("x"), "was there with sha256"),
    "a pinned kernel gone": (lambda data: shutil.rmtree(data / "system/kernel/k-pinned"), "pinned by snapshot-1"),
    "half an artifact": (lambda data: (data / "system/kernel/k-gone/x86_64/artifact.json").unlink(), "a part of it"),
    "a lost lease": (_sql("DELETE FROM asset_leases WHERE acquired_by = 'vm-1'"), "of vm-1 was on"),
    "half a lease": (_sql("DELETE FROM asset_leases WHERE asset_id = 'kernel-k-leased-x86_64'"), "has 1 assets of 2"),
    "an asset without a place": (_sql("DELETE FROM asset_locations WHERE asset_id = 'disk-gone'"), "and no place"),
    "a lost table": (_sql("DROP TABLE content_use"), "has the tables"),
    "a table too many": (_sql("CREATE TABLE later (x)"), "has the tables"),
    "a lost version": (_sql("DELETE FROM alembic_version"), "at version []"),
    "a lost store": (_sql("DELETE FROM stores"), "among []"),
    "a lease on nothing": (
        _sql("DELETE FROM assets WHERE id = 'disk-held'"),
        "is not sound",
    ),
    "half a database": (_cut_database, "registry.sqlite"),
    "a lost database": (lambda data: (data / "registry.sqlite").unlink(), "of vm-1 was on"),
    "another store": (lambda data: _rewrite(data / "system/store.json", b'{"schema": 1, "store": "x"}'), "was 0"),
    "half a store": (lambda data: _rewrite(data / "system/store.json", b'{"sch'), "which store this is"),
    "half a pin": (lambda data: _rewrite(_pin(data), _pin(data).read_bytes()[:500]), "is no pin"),
    "a pin that is lost": (lambda data: _pin(data).unlink(), "was another"),
    "a changed pin": (lambda data: _rewrite(_pin(data), _pin(data).read_bytes() + b"\n"), "was another"),
    "half a line": (lambda data: (data / "collected.jsonl").write_text('{"at": "2026'), "a line that is not whole"),
}


@pytest.mark.parametrize(
    ("base", "name"), [*(("full", name) for name in DAMAGES), *(("held", name) for name in HELD)], ids=str
)
def test_the_checker_sees(campaigning: Campaign, tmp_path: Path, base: str, name: str) -> None:
    damage, told = (DAMAGES | HELD)[name]
    disk = tmp_path / "disk"
    copy_data_dir(campaigning.world.base(base), disk)
    before = checker.read(disk / "data")
    assert before.problems == ()
    damage(disk / "data")
    after = checker.read(disk / "data")
    problems = [str(problem) for problem in (*after.problems, *checker.losses(before, after))]
    assert any(told in problem for problem in problems), problems


def test_the_checker_changes_nothing(campaigning: Campaign, tmp_path: Path) -> None:
    copy_data_dir(campaigning.world.base("messy"), disk := tmp_path / "disk")
    facts = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(disk.rglob("*"))]
    checker.read(disk / "data")
    assert [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(disk.rglob("*"))] == facts


@pytest.mark.parametrize("name", ["collect", "collect-lost"])
def test_a_collection_that_nothing_disturbs_takes_all_that_it_may_and_only_that(
    campaigning: Campaign, name: str
) -> None:
    before, after = campaigning.measures[name].before, campaigning.measures[name].after
    goes = SCENARIOS[name].goes
    gone = {*before.needs, *before.ledger.files} - {*after.needs, *after.ledger.files}
    assert gone == {what for what in (*before.needs, *before.ledger.files) if goes.may(what)}
    assert len(gone) > 5
    assert after.blobs == {digest for digests in after.needs.values() for digest in digests}


def test_the_checker_takes_a_directory_for_whole_after_a_rewrite_with_the_same_bytes(
    campaigning: Campaign, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    copy_data_dir(campaigning.world.base("full"), disk)
    before = checker.read(disk / "data")
    kernel = _kernel(disk / "data")
    _rewrite(kernel, kernel.read_bytes())
    kernel.chmod(0o444)
    os.utime(kernel)
    after = checker.read(disk / "data")
    assert [*after.problems, *checker.losses(before, after)] == []
    assert before.answers == after.answers
