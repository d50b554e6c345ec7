"""Advisory locks between threads and processes: flock(2) on a file under locks/, which dies with its holder.

The file is never deleted (two holders could lock two inodes of one name); it holds who has it, for error messages::

    {"pid": 4711, "command": "systemfiles provision", "since": "2026-11-20T09:41:37Z"}
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
from collections.abc import Callable, Iterator
from pathlib import Path

from systemfiles.foundation.errors import LockTimeout, StoreError
from systemfiles.foundation.files import make_dirs, storing

log = logging.getLogger(__name__)

_FIRST_WAIT = 0.005
_LONGEST_WAIT = 0.25
_SILENT_WAIT = 5.0  # seconds after which whoever watches is told what we wait for
_HELD = (errno.EAGAIN, errno.EACCES)  # flock(2); the latter from NFS
_LOCAL = "keep the data directory on a file system with locks, such as a local one"


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    timeout: float | None = None,
    inherited: bool = False,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Holds the exclusive lock at `path`; waits for it at most `timeout` seconds (None: for ever).

    `waiting` is called now and then meanwhile, and may raise to give up. Not reentrant: a thread that asks twice waits
    for itself. With `inherited`, a program that this process becomes (execve(2)) holds it on.
    Raises LockTimeout, StoreError.
    """
    make_dirs(path.parent)
    with storing(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    owner = os.getpid()
    try:
        _share(fd, path.parent)
        _acquire(fd, path, timeout, waiting)
        try:
            _sign(fd)
            os.set_inheritable(fd, inherited)
            yield
        finally:
            # closing alone would not do when a child that was forked meanwhile has the file open too, nor may such a
            # child, when it leaves this block, free what is its parent's
            if os.getpid() == owner:
                with contextlib.suppress(OSError):  # closing frees it then
                    fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _share(fd: int, directory: Path) -> None:
    """Lets a group that may write to the directory take the lock too, whatever the umask."""
    mode = 0o644 | stat.S_IMODE(directory.stat().st_mode) & stat.S_IWGRP
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        with contextlib.suppress(PermissionError):  # another user's file, who did it already
            os.fchmod(fd, mode)


def _acquire(fd: int, path: Path, timeout: float | None, waiting: Callable[[], None]) -> None:
    started, told, wait = time.monotonic(), False, _FIRST_WAIT
    while not _try(fd, path):
        waiting()
        waited = time.monotonic() - started
        if timeout is not None and waited >= timeout:
            raise LockTimeout(path, seconds=timeout, holder=_holder(path))
        if waited > _SILENT_WAIT and not told:
            told = True
            log.warning("waiting for %s, held by %s", path.name, _holder(path))
        time.sleep(wait)
        wait = min(wait * 2, _LONGEST_WAIT)


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
