"""A file system that is nearly full, for what is to happen on one: a tmpfs of one's own, which nobody else sees."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h
_MNT_DETACH = 2  # linux/fs.h
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18  # linux/mount.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def on_small_disk(place: Path, size: int, body: Callable[[], None]) -> None:
    """Runs `body` in a child for which `place` is a file system of `size` bytes. Fails as `body` does.

    Needs root, or a kernel that lets everybody have namespaces (user_namespaces(7)). Must be called where no other
    thread holds a lock, as it forks.
    """
    child = os.fork()
    if not child:
        status = 1
        try:
            _mount(place, size)
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if place.is_mount():
        _require(_LIBC.umount2(os.fsencode(place), _MNT_DETACH))
    assert os.waitstatus_to_exitcode(status) == 0, "what failed is on stderr"


def _mount(place: Path, size: int) -> None:
    user, group = os.geteuid(), os.getegid()
    _require(_LIBC.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    # in a chroot, / is no mount; others may see ours then, until it is taken away again
    private = _LIBC.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
    _require(0 if private or ctypes.get_errno() == errno.EINVAL else -1)
    _require(_LIBC.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"size=%d" % size))


def _require(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        why = (
            f"{os.strerror(code)}: no file system can be mounted here, neither as root nor in a namespace of one's own"
        )
        raise OSError(code, why)


def fill(file: Path) -> None:
    """Lets `file` grow until there is no space left."""
    try:
        with file.open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
    except OSError:
        return
