"""Locks exclude threads and processes, say who has them, and die with their holder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from systemfiles.foundation.errors import LockTimeout, StoreError
from systemfiles.foundation.lock import locked, run_locked

fork = multiprocessing.get_context("fork")  # ten times as fast to start as a new interpreter


def _count(counter: Path, lock: Path, times: int) -> None:
    for _ in range(times):
        with locked(lock):
            value = int(counter.read_text())
            time.sleep(0.0005)  # invites the others to read the same value
            counter.write_text(str(value + 1))


def _hold(lock: Path, ready: Connection) -> None:
    with locked(lock):
        ready.send("held")
        signal.pause()


@contextlib.contextmanager
def held_by_another_process(lock: Path) -> Iterator[int]:
    """The process that holds the lock, which is killed in the end."""
    ours, theirs = fork.Pipe()
    holder = fork.Process(target=_hold, args=(lock, theirs))
    holder.start()
    assert ours.recv() == "held"
    assert holder.pid is not None
    try:
        yield holder.pid
    finally:
        holder.kill()
        holder.join()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "it.lock"


def test_one_thread_at_a_time_has_it(tmp_path: Path, lock: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    threads = [threading.Thread(target=_count, args=(counter, lock, 6)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "48"


def test_one_process_at_a_time_has_it(tmp_path: Path, lock: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [fork.Process(target=_count, args=(counter, lock, 6)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert counter.read_text() == "48"


def test_between_two_of_many_turns_others_have_theirs(lock: Path) -> None:
    turns, ended = 0, threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not ended.is_set():
            with locked(lock, behind=True):
                turns += 1
                time.sleep(0.005)

    worker = threading.Thread(target=take_turns)
    worker.start()
    try:
        for _ in range(5):
            before = turns
            with locked(lock, timeout=30):
                assert turns - before < 100
    finally:
        ended.set()
        worker.join()


def test_whoever_waits_in_vain_learns_who_has_it(lock: Path) -> None:
    with held_by_another_process(lock) as holder, pytest.raises(LockTimeout) as caught, locked(lock, timeout=0.05):
        pass
    assert caught.value.path == lock
    assert caught.value.holder.startswith(f"process {holder} (")
    assert caught.value.hint


def test_waiting_takes_about_as_long_as_it_should(lock: Path) -> None:
    with held_by_another_process(lock):
        began = time.monotonic()
        with pytest.raises(LockTimeout), locked(lock, timeout=0.2):
            pass
        assert 0.2 <= time.monotonic() - began < 2


def test_a_timeout_of_zero_asks_once(lock: Path) -> None:
    with locked(lock, timeout=0):
        pass
    with held_by_another_process(lock), pytest.raises(LockTimeout), locked(lock, timeout=0):
        pass


def test_whoever_waits_for_long_says_for_whom(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("systemfiles.foundation.lock._SILENT_WAIT", 0.02)
    with held_by_another_process(lock) as holder, pytest.raises(LockTimeout), locked(lock, timeout=0.3):
        pass
    (told,) = caplog.messages
    assert told.startswith(f"waiting for it.lock, held by process {holder} (")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(lock: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreError, match="cannot be locked") as caught, locked(lock):
        pass
    assert "file system with locks" in str(caught.value)


def run_beside(lock: Path, script: str) -> int:
    """Runs a shell's script under the lock in another process; returns that process once the script is at work."""
    child = os.fork()
    if child == 0:
        os._exit(run_locked(lock, ["sh", "-c", f"touch {lock}.works; {script}"]))
    until = time.monotonic() + 10
    while not lock.with_name(f"{lock.name}.works").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    return child


def is_free(lock: Path) -> bool:
    try:
        with locked(lock, timeout=0.2):
            return True
    except LockTimeout:
        return False


@pytest.mark.parametrize("closes", ["", "exec 3<&- 4<&- 5<&- 6<&- 7<&- 8<&- 9<&-; "], ids=["", "and closes files"])
def test_a_program_has_it_until_it_ends_whatever_it_leaves_running(lock: Path, closes: str) -> None:
    child = run_beside(lock, f"{closes}sleep 30 & sleep 1; exit 7")
    assert not is_free(lock)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert is_free(lock)


def test_a_program_has_it_on_when_whoever_runs_it_is_killed(lock: Path) -> None:
    child = run_beside(lock, "sleep 1.5; true")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not is_free(lock)
    with locked(lock, timeout=10):
        pass


def test_who_ends_whoever_runs_it_ends_the_program(lock: Path) -> None:
    child = run_beside(lock, "exec sleep 60")
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert is_free(lock)


def test_what_would_wait_for_itself_is_refused(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMFILES_HELD_LOCK", str(lock))
    with pytest.raises(StoreError, match="would wait for itself"), locked(lock):
        pass
    with locked(lock.with_name("other.lock")):
        pass


def test_no_password_of_a_command_line_is_written_down(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/systemfiles", "lock", "--", "skopeo", "--dest-creds=a:hunter2"])
    with locked(lock):
        assert json.loads(lock.read_text())["command"] == "systemfiles lock"
    assert lock.read_text() == ""


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(lock: Path) -> None:
    with held_by_another_process(lock):
        waiter = threading.Thread(target=lambda: locked(lock, timeout=20).__enter__())
        waiter.start()
        time.sleep(0.3)
        lock.unlink()
    waiter.join(10)
    assert not waiter.is_alive()
    assert lock.exists()


def test_nobody_but_its_owner_and_group_may_open_it(tmp_path: Path) -> None:
    for mode, expected in ((0o755, 0o600), (0o2775, 0o660)):
        directory = tmp_path / f"{mode:o}"
        directory.mkdir()
        directory.chmod(mode)
        with locked(directory / "it.lock"):
            assert stat.S_IMODE((directory / "it.lock").stat().st_mode) == expected


def test_a_killed_holder_no_longer_has_it(lock: Path) -> None:
    with held_by_another_process(lock) as holder:
        os.kill(holder, signal.SIGKILL)
        with locked(lock, timeout=5):
            pass


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interrupted_holder_no_longer_has_it(lock: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), locked(lock):
        raise interruption
    with locked(lock, timeout=0):
        pass


def test_it_is_free_again_though_a_child_that_was_forked_meanwhile_lives_on(lock: Path) -> None:
    child = fork.Process(target=signal.pause)
    try:
        with locked(lock):
            child.start()
        with locked(lock, timeout=0):
            pass
    finally:
        child.kill()
        child.join()


def test_another_name_is_another_lock(lock: Path) -> None:
    with locked(lock), locked(lock.with_name("other.lock"), timeout=0):
        pass


def test_the_file_says_who_has_it_and_stays(lock: Path) -> None:
    with locked(lock):
        facts = json.loads(lock.read_text())
    assert facts["pid"] == os.getpid()
    assert facts["command"]
    assert time.strptime(facts["since"], "%Y-%m-%dT%H:%M:%SZ")
    assert lock.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"pid": 1}', b"x" * 1_000_000])
def test_an_unreadable_holder_is_unknown(lock: Path, content: bytes) -> None:
    with held_by_another_process(lock):
        lock.write_bytes(content)
        with pytest.raises(LockTimeout) as caught, locked(lock, timeout=0):
            pass
    assert caught.value.holder == "unknown"


def test_a_longer_text_of_an_earlier_holder_is_gone(lock: Path) -> None:
    lock.parent.mkdir()
    lock.write_text("x" * 1000)
    with locked(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_full_disk_keeps_nobody_from_locking(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with locked(lock), pytest.raises(LockTimeout), locked(lock, timeout=0):
        pass


def test_a_lock_that_may_not_be_made_is_a_store_error() -> None:
    with pytest.raises(StoreError), locked(Path("/sys/systemfiles/it.lock")):
        pass
