"""Advisory locks between threads and processes: flock(2) on a file under locks/, which dies with its holder.

The file is never deleted (two holders could lock two inodes of one name); it holds who has it, for error messages::

    {"pid": 4711, "command": "systemfiles provision", "since": "2026-11-20T09:41:37Z"}
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from systemfiles.foundation.errors import LockTimeout
from systemfiles.foundation.files import make_dirs, storing

_FIRST_WAIT = 0.005
_LONGEST_WAIT = 0.25


@contextlib.contextmanager
def locked(path: Path, *, timeout: float | None = None) -> Iterator[None]:
    """Holds the exclusive lock at `path`; waits for it at most `timeout` seconds (None: for ever).

    Not reentrant: a thread that asks twice waits for itself. Raises LockTimeout, StoreError.
    """
    make_dirs(path.parent)
    with storing(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    owner = os.getpid()
    try:
        _share(fd, path.parent)
        _acquire(fd, path, timeout)
        _sign(fd)
        yield
    finally:
        # closing alone would not do when a child that was forked meanwhile has the file open too, nor may such a
        # child, when it leaves this block, free what is its parent's
        if os.getpid() == owner:
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _share(fd: int, directory: Path) -> None:
    """Lets a group that may write to the directory take the lock too, whatever the umask."""
    mode = 0o644 | stat.S_IMODE(directory.stat().st_mode) & stat.S_IWGRP
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        with contextlib.suppress(PermissionError):  # another user's file, who did it already
            os.fchmod(fd, mode)


def _acquire(fd: int, path: Path, timeout: float | None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    wait = _FIRST_WAIT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if deadline is not None and time.monotonic() >= deadline:
                raise LockTimeout(path, seconds=timeout or 0, holder=_holder(path)) from None
        else:
            return
        time.sleep(wait)
        wait = min(wait * 2, _LONGEST_WAIT)


def _sign(fd: int) -> None:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200] if sys.argv else "python"
    with contextlib.suppress(OSError):  # a full disk keeps nobody from locking
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "command": command, "since": since}).encode(), 0)


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        return f"process {facts['pid']} ({facts['command']}) since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
