"""How a file comes to be: whole, verified and durable under its final name, or not at all.

One order for every write: a new file in the data directory's tmp/, bytes hashed as they are written, compared,
fsync, mode, rename, fsync of the directory. A kill at any instant leaves the old state or the new one.

Whoever works on something temporary holds a shared flock(2) on it for as long. So what a killed process left can be
told from what a live one works on, and `remove_abandoned` removes it. Where a file system has no locks, it stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from systemfiles.foundation.digest import CHUNK, Digest, Hasher, hash_file
from systemfiles.foundation.errors import DigestMismatch, NoSpace, SizeMismatch, StoreError

log = logging.getLogger(__name__)

READ_ONLY = 0o444
NEW, WORK, STAGED = "new-", "work-", ".systemfiles-new-"
_UNUSED = re.compile(r"[0-9a-f]{16}")
_COPIED = ".systemfiles-copy-"
_GRACE = 60.0  # seconds between making something temporary and holding it, at the very most
_FICLONE = 0x40049409  # linux/fs.h
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2  # linux/fcntl.h, linux/fs.h
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = "provisioning needs write permission on the data directory"
_IN_THE_WAY = "something else is in its place: move that away"
_HINTS = {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
}


@contextlib.contextmanager
def storing(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turns a full disk under `path` into NoSpace, and whatever else keeps it from being written into StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpace(path, needed=needed, free=free_bytes(path)) from error
        hint = _HINTS.get(error.errno or 0)
        msg = f"{error.filename2 or error.filename or path} cannot be written ({error.strerror})"
        raise StoreError(msg, hint=hint) from error


def free_bytes(path: Path) -> int:
    """Bytes an unprivileged process may still write to the file system of `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def fsync_path(path: Path) -> None:
    """Makes a file's bytes, or a directory's entries, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(path: Path) -> None:
    """Creates `path` and its parents, durably. Whatever the umask, what the parent grants its group is inherited."""
    tries = 10
    while not path.is_dir():
        make_dirs(path.parent)
        with storing(path):
            try:
                _make_in_parent(path)
            except FileNotFoundError:  # a collection may just have removed the parent, which was empty
                tries -= 1
                if not tries:
                    raise


def _make_in_parent(path: Path) -> None:
    inherited = stat.S_IMODE(path.parent.stat().st_mode) & (stat.S_ISGID | stat.S_IWGRP)
    staged = _unused(path.parent, STAGED)
    try:
        _make_dir(staged, told_as=path)
        with _held(staged):
            staged.chmod(0o755 | inherited)
            _rename_new(staged, path)  # nobody sees it with another mode
    except BaseException as error:
        with contextlib.suppress(OSError):
            staged.rmdir()
        if not isinstance(error, OSError) or not path.is_dir():
            raise
    fsync_path(path.parent)


def _unused(directory: Path, prefix: str) -> Path:
    """A name that nobody has. It is known before anything has it, so that Ctrl-C at any moment leaves nothing."""
    return directory / f"{prefix}{os.urandom(8).hex()}"


def _make_dir(path: Path, *, told_as: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(told_as)) from error


def replace_directory(path: Path, new: Path) -> None:
    """Lets `path` be the directory `new`, at once and durably; what it was before, if anything, is `new` then."""
    with storing(path):
        try:
            _rename(new, path, _RENAME_EXCHANGE)
        except FileNotFoundError:
            new.rename(path)
        fsync_path(path.parent)


def _rename_new(source: Path, target: Path) -> None:
    """Replaces nothing: rename(2) would take an empty directory from whoever just opens it."""
    try:
        _rename(source, target, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL):
            raise
        source.rename(target)  # a file system that knows no better


def _rename(source: Path, target: Path, flag: int) -> None:
    """renameat2(2)."""
    import ctypes  # 5 ms, and directories are seldom made

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Shows others that somebody works in `directory`."""
    with storing(directory):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _hold(fd)
        yield
    finally:
        os.close(fd)


def _hold(fd: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: nothing there is ever taken for abandoned
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def remove_abandoned(directory: Path, *prefixes: str) -> None:
    """Removes what killed processes left in `directory` under the names that are made here with these prefixes.

    What else is there is not ours, whatever directory somebody told us to work in.
    """
    if directory.is_symlink():
        return
    with contextlib.suppress(OSError):
        for path in [path for path in directory.iterdir() if _is_made_here(path.name, prefixes)]:
            with contextlib.suppress(OSError):  # another user's, or a live one's
                _remove_if_abandoned(path)


def _is_made_here(name: str, prefixes: Iterable[str]) -> bool:
    return any(name.startswith(prefix) and _UNUSED.fullmatch(name.removeprefix(prefix)) for prefix in prefixes)


def _remove_if_abandoned(path: Path) -> None:
    if time.time() - path.lstat().st_mtime < _GRACE:
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        log.info("%s was left by a process that is gone: removed", path)
    finally:
        os.close(fd)


def _open_private(path: str, flags: int) -> int:
    fd = os.open(path, flags, 0o600)
    if Path(path).parent.stat().st_mode & stat.S_IWGRP:
        os.fchmod(fd, 0o640)  # so that the others of the group can tell whether somebody holds it
    return fd


class NewFile:
    """A file in the making: hashes what is written, and disappears unless it is committed.

    ::

        with NewFile(paths.tmp) as out:
            out.write(data)
            out.commit(final, size=..., digest=...)
    """

    def __init__(self, scratch: Path) -> None:
        make_dirs(scratch)
        self.path = _unused(scratch, NEW)
        self._hasher = Hasher()
        try:
            with storing(scratch):
                self._file = io.FileIO(self.path, "x+", opener=_open_private)
            _hold(self._file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                self.path.unlink()
            raise

    @property
    def size(self) -> int:
        return self._hasher.size

    def digest(self) -> Digest:
        return self._hasher.digest()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        with storing(self.path, needed=len(data)):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        self._hasher.update(data)
        return len(data)

    def restart(self) -> None:
        """Forgets all that was written."""
        with storing(self.path):
            self._file.seek(0)
            self._file.truncate()
        self._hasher = Hasher()

    def check(self, subject: object, *, size: int | None = None, digest: Digest | None = None) -> None:
        """Compares what was written with what was promised. Raises SizeMismatch, DigestMismatch."""
        if size is not None and size != self.size:
            raise SizeMismatch(
                subject, expected=f"{size} bytes", got=f"{self.size} bytes", consequence="it was discarded"
            )
        if digest is not None and digest != (got := self.digest()):
            raise DigestMismatch(subject, expected=digest, got=got, consequence="it was discarded")

    def commit(self, final: Path, *, mode: int = READ_ONLY) -> None:
        """Gives the file its final name, durably, replacing what was there."""
        with storing(final, needed=self.size):
            os.fchmod(self._file.fileno(), mode)
            os.fsync(self._file.fileno())
            self.path.replace(final)
            self._file.close()
            fsync_path(final.parent)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what went wrong before is told; what stays here is abandoned
            self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def write_file(final: Path, data: bytes, *, scratch: Path, mode: int = READ_ONLY) -> None:
    """Replaces the file at `final` by `data`, atomically and durably."""
    make_dirs(final.parent)
    with NewFile(scratch) as out:
        out.write(data)
        out.commit(final, mode=mode)


def publish(source: Path, final: Path, *, mode: int = READ_ONLY) -> None:
    """Moves a finished file of the same file system to its final name, durably."""
    with storing(final, needed=_size(source)):
        source.chmod(mode)
        fsync_path(source)
        source.replace(final)
        fsync_path(final.parent)


def link_or_copy(source: Path, final: Path, *, scratch: Path) -> None:
    """Makes `final` the same inode as `source` where the file system can, else a reflink or a copy; atomically."""
    with scratch_dir(scratch) as work:
        staged = work / final.name
        with storing(final, needed=_size(source)):
            try:
                os.link(source, staged)
            except OSError as error:
                # another file system, too many links, or fs.protected_hardlinks
                if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
                    raise
                copy(source, staged)
                staged.chmod(READ_ONLY)
                fsync_path(staged)
            staged.replace(final)
            fsync_path(final.parent)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def copy(source: Path, destination: Path) -> None:
    """Makes `destination` a new, independent file with the bytes of `source`: a reflink where possible."""
    with source.open("rb") as src, destination.open("xb") as dst:
        try:
            fcntl.ioctl(dst.fileno(), _FICLONE, src.fileno())
        except OSError:
            try:
                shutil.copyfileobj(src, dst, CHUNK)
            except OSError:
                destination.unlink()
                raise


def copy_whole(source: Path, final: Path, *, sha256: str) -> None:
    """Makes `final` an independent, durable copy of `source`, verified; never over a file that is there."""
    remove_abandoned(final.parent, _COPIED)
    with storing(final), _work_in(final.parent, _COPIED) as work:
        staged = work / final.name
        copy(source, staged)
        if (got := hash_file(staged)[0]) != (expected := Digest.from_hex(sha256)):
            raise DigestMismatch(source, expected=expected, got=got, consequence="it was not copied")
        fsync_path(staged)
        os.link(staged, final)  # unlike a rename, it replaces nothing
        fsync_path(final.parent)


@contextlib.contextmanager
def scratch_dir(scratch: Path, *, prefix: str = WORK) -> Iterator[Path]:
    """A new directory, in tmp/ or elsewhere, removed with all it holds; `remove_abandoned` knows it by its prefix.

    Others may traverse it: apt drops its privileges.
    """
    make_dirs(scratch)
    with _work_in(scratch, prefix) as work:
        with storing(work):
            work.chmod(0o755 | stat.S_IMODE(work.stat().st_mode) & stat.S_ISGID)
        yield work


@contextlib.contextmanager
def _work_in(directory: Path, prefix: str) -> Iterator[Path]:
    work = _unused(directory, prefix)
    try:
        with storing(directory):
            _make_dir(work, told_as=directory)
        with _held(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
