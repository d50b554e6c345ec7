"""Advisory locks between threads and processes: flock(2) on a file under locks/, which dies with its holder.

The file is never deleted (two holders could lock two inodes of one name); it holds who has it, for error messages::

    {"pid": 4711, "command": "systemfiles provision", "since": "2026-11-20T09:41:37Z"}

Whoever has to wait holds `<name>.next` meanwhile. Work that takes the lock for many short turns asks for that first, so
that between two turns others have theirs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from systemfiles.foundation.errors import LockTimeout, StoreError
from systemfiles.foundation.files import make_dirs, storing

log = logging.getLogger(__name__)

_FIRST_WAIT = 0.005
_LONGEST_WAIT = 0.25
_SILENT_WAIT = 2.0  # seconds after which whoever watches is told what we wait for
_HELD = (errno.EAGAIN, errno.EACCES)  # flock(2); the latter from NFS
_HELD_BY_PARENT = "SYSTEMFILES_HELD_LOCK"
_LOCAL = "keep the data directory on a file system with locks, such as a local one"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait: `seconds` at most (None: for ever), and until `check` raises, which is called now and then."""

    seconds: float | None = None
    check: Callable[[], None] = lambda: None


Timeout = float | Patience | None
"""Seconds, or more than that; None is for ever."""


def patience(timeout: Timeout) -> Patience:
    """What a timeout means."""
    return timeout if isinstance(timeout, Patience) else Patience(timeout)


@contextlib.contextmanager
def locked(path: Path, *, timeout: Timeout = None, behind: bool = False) -> Iterator[None]:
    """Holds the exclusive lock at `path`, and waits for it as long as `timeout` says; `behind` whoever waits already.

    Not reentrant: a thread that asks twice waits for itself. Raises LockTimeout, StoreError.
    """
    with _held(path, patience(timeout), behind=behind):
        yield


def run_locked(path: Path, command: Sequence[str]) -> int:
    """Runs a program while it, too, has the lock, and returns its exit status (128 and the signal that ended it).

    The lock is free as soon as the program has ended, whatever it leaves running; and it is not free before, should
    this process be killed. Raises OSError when the program cannot be run, StoreError.
    """
    import signal
    import subprocess

    with _held(path, Patience()) as fd:
        environ = {**os.environ, _HELD_BY_PARENT: str(path)}
        with subprocess.Popen(command, pass_fds=[fd], env=environ) as program:
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda received, _: program.send_signal(received))
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the program as well
            status = program.wait()
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _held(path: Path, wait: Patience, *, behind: bool = False) -> Iterator[int]:
    if os.environ.get(_HELD_BY_PARENT) == str(path):
        msg = f"this runs under `systemfiles lock` and would wait for itself: {path}"
        raise StoreError(msg, hint="run it beside the locked command, not inside")
    fd, owner = _open_and_acquire(path, wait, behind=behind), os.getpid()
    try:
        _sign(fd)
        yield fd
    finally:
        _free(fd, owner)


def _free(fd: int, owner: int) -> None:
    # closing alone would not do when a child that was forked meanwhile has the file open too, nor may such a
    # child, when it gets here, free what is its parent's
    if os.getpid() == owner:
        with contextlib.suppress(OSError):  # closing frees it then
            os.ftruncate(fd, 0)
            fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _open_and_acquire(path: Path, patience: Patience, *, behind: bool) -> int:
    """The open file of the lock, which is ours; opened again when somebody removed the file while we waited."""
    while True:
        make_dirs(path.parent)
        fd = _open(path)
        try:
            _acquire(fd, path, patience, behind=behind)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _open(path: Path) -> int:
    """The file of a lock. A group that may write to the directory may take it too, whatever the umask; nobody else."""
    with storing(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    mode = 0o660 if path.parent.stat().st_mode & stat.S_IWGRP else 0o600
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        with contextlib.suppress(PermissionError):  # another user's file, who did it already
            os.fchmod(fd, mode)
    return fd


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def _acquire(fd: int, path: Path, patience: Patience, *, behind: bool) -> None:
    if not behind and _try(fd, path):
        return
    wait, next_path = _Wait(path, patience), path.with_name(f"{path.name}.next")
    try:
        next_fd = _open(next_path)
    except StoreError:  # on a full disk there may be no such file: then nobody is the next
        wait.until(lambda: _try(fd, path))
        return
    owner = os.getpid()
    try:
        wait.until(lambda: _try(next_fd, next_path))
        wait.until(lambda: _try(fd, path))
    finally:
        _free(next_fd, owner)


class _Wait:
    """The wait for a lock, from now on."""

    def __init__(self, path: Path, patience: Patience) -> None:
        self._path = path
        self._patience = patience
        self._started = time.monotonic()
        self._told = False

    def until(self, done: Callable[[], bool]) -> None:
        """Waits until it is `done`. Raises LockTimeout."""
        pause = _FIRST_WAIT
        while not done():
            self._patience.check()
            waited = time.monotonic() - self._started
            if self._patience.seconds is not None and waited >= self._patience.seconds:
                raise LockTimeout(self._path, seconds=self._patience.seconds, holder=_holder(self._path))
            if waited > _SILENT_WAIT and not self._told:
                self._told = True
                log.warning("waiting for %s, held by %s", self._path.name, _holder(self._path))
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_WAIT)


def _try(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        msg = f"{path} cannot be locked ({error.strerror})"
        raise StoreError(msg, hint=_LOCAL) from error
    return True


def _sign(fd: int) -> None:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # no more than this: there may be passwords among what follows
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])[:200] if sys.argv else "python"
    with contextlib.suppress(OSError):  # a full disk keeps nobody from locking
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "command": command, "since": since}).encode(), 0)


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        return f"process {facts['pid']} ({facts['command']}) since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "unknown"
