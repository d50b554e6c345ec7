"""How a file comes to be: whole, verified and durable under its final name, or not at all.

One order for every write: a new file in the data directory's tmp/, bytes hashed as they are written, compared,
fsync, mode, rename, fsync of the directory. A kill at any instant leaves the old state or the new one; what it
may leave in tmp/ is never looked at again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from systemfiles.foundation.digest import CHUNK, Digest, Hasher, hash_file
from systemfiles.foundation.errors import DigestMismatch, NoSpace, SizeMismatch, StoreError

READ_ONLY = 0o444
_FICLONE = 0x40049409  # linux/fs.h
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
    if path.is_dir():
        return
    make_dirs(path.parent)
    with storing(path):
        inherited = stat.S_IMODE(path.parent.stat().st_mode) & (stat.S_ISGID | stat.S_IWGRP)
        try:
            staged = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            staged.chmod(0o755 | inherited)
            staged.rename(path)  # nobody sees it with another mode
        except OSError:
            staged.rmdir()
            if not path.is_dir():
                raise
        fsync_path(path.parent)


class NewFile:
    """A file in the making: hashes what is written, and disappears unless it is committed.

    ::

        with NewFile(paths.tmp) as out:
            out.write(data)
            out.commit(final, size=..., digest=...)
    """

    def __init__(self, scratch: Path) -> None:
        make_dirs(scratch)
        with storing(scratch):
            fd, name = tempfile.mkstemp(prefix="new-", dir=scratch)
        self.path = Path(name)
        self._file = os.fdopen(fd, "wb", buffering=0)
        self._hasher = Hasher()

    @property
    def size(self) -> int:
        return self._hasher.size

    def digest(self) -> Digest:
        return self._hasher.digest()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        with storing(self.path):
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
            self._file.close()
            self.path.replace(final)
            fsync_path(final.parent)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def write_file(final: Path, data: bytes, *, scratch: Path, mode: int = READ_ONLY) -> None:
    """Replaces the file at `final` by `data`, atomically and durably."""
    make_dirs(final.parent)
    with NewFile(scratch) as out:
        out.write(data)
        out.commit(final, mode=mode)


def publish(source: Path, final: Path, *, mode: int = READ_ONLY) -> None:
    """Moves a finished file of the same file system to its final name, durably."""
    with storing(final):
        source.chmod(mode)
        fsync_path(source)
        source.replace(final)
        fsync_path(final.parent)


def link_or_copy(source: Path, final: Path, *, scratch: Path) -> None:
    """Makes `final` the same inode as `source` where the file system can, else a reflink or a copy; atomically."""
    with scratch_dir(scratch) as work:
        staged = work / final.name
        with storing(final):
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


def copy(source: Path, destination: Path) -> None:
    """Makes `destination` a new, independent file with the bytes of `source`: a reflink where possible."""
    import fcntl

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
    with storing(final):
        work = Path(tempfile.mkdtemp(prefix=".copy-", dir=final.parent))
        try:
            staged = work / final.name
            copy(source, staged)
            if (got := hash_file(staged)[0]) != (expected := Digest.from_hex(sha256)):
                raise DigestMismatch(source, expected=expected, got=got, consequence="it was not copied")
            fsync_path(staged)
            os.link(staged, final)  # unlike a rename, it replaces nothing
            fsync_path(final.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def scratch_dir(scratch: Path) -> Iterator[Path]:
    """A new directory in tmp/, removed with all it holds. Others may traverse it: apt drops its privileges."""
    make_dirs(scratch)
    with storing(scratch):
        work = Path(tempfile.mkdtemp(prefix="work-", dir=scratch))
    try:
        work.chmod(0o755 | stat.S_IMODE(work.stat().st_mode) & stat.S_ISGID)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
