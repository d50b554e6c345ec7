"""The harness itself: it strikes where it says, and its checker sees every kind of damage."""

from __future__ import annotations

import json
import os
import signal
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
from tests.crash.world import copy_data_dir, overwrite

Damage = Callable[[Path], None]


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
    "a wrong sum": (lambda data: _rewrite(data / "system" / "SHA256SUMS", b"0" * 64 + b"  none\n"), "is not accepted"),
    "a temporary file": (lambda data: (data / "system" / "kernel" / "new-1").touch(), "outside of tmp/"),
    "a temporary directory": (lambda data: (data / "system" / "work-1").mkdir(), "outside of tmp/"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_checker_sees(campaigning: Campaign, tmp_path: Path, name: str) -> None:
    damage, told = DAMAGES[name]
    disk = tmp_path / "disk"
    copy_data_dir(campaigning.world.base("full"), disk)
    before = checker.read(disk / "data")
    assert before.problems == ()
    damage(disk / "data")
    after = checker.read(disk / "data")
    problems = [str(problem) for problem in (*after.problems, *checker.losses(before, after))]
    assert any(told in problem for problem in problems), problems


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
