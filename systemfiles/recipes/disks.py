"""The three disks of a guest, each one file for a VMM. Their labels are also the serials that the guest knows them by:

======== ==================== ================================================ =====
rootfs   `write_rootfs_disk`  the merged layers of an OCI image, only read     0444
overlay  `write_overlay_disk` what the guest will change: ext4 with a journal  0600
config   `write_config_disk`  config.sh, only read: see recipes/guestconfig    0600
======== ==================== ================================================ =====

Nothing is mounted and no program of the host takes part. So no privilege is needed, and equal arguments make equal
bytes, whoever does it where and when. The files are sparse. Each appears under its name whole, or not at all.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, BinaryIO, Literal, get_args

from systemfiles.foundation.diskimage import BLOCK, Image, Span, directory, file
from systemfiles.foundation.erofs import write_erofs
from systemfiles.foundation.errors import StoreError, UsageError
from systemfiles.foundation.ext4 import LEAST_JOURNAL, write_ext4
from systemfiles.foundation.files import READ_ONLY, fsync_path, publish, remove_abandoned, scratch_dir, storing
from systemfiles.foundation.progress import Progress, silent
from systemfiles.recipes.guestconfig import GuestConfig
from systemfiles.recipes.imagetree import Limits, merge

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DiskFormat = Literal["ext4", "erofs"]

LIMITS = Limits(entries=500_000, size=32 << 30)
"""What the layers of a root file system may hold, unless the caller says otherwise."""

_PRIVATE = 0o600
_PIECE = 1 << 16
_ABANDONED = ".systemfiles-disk-"
_MOST_JOURNAL = 16384  # blocks
_LEAST_WITH_JOURNAL = 4096


def write_config_disk(path: Path | str, config: GuestConfig) -> None:
    """Makes `path` a small ext4 disk that holds config.sh; replaces what was there.

    Raises UsageError, NoSpace, StoreError.
    """
    script = config.script()
    root = directory()
    root.children["config.sh"] = file(Span(0, len(script)), mode=0o400)
    with _new_disk(Path(path), mode=_PRIVATE) as (image, _):
        write_ext4(image, root, io.BytesIO(script), label="config")


def write_overlay_disk(path: Path | str, size: int) -> None:
    """Makes `path` an empty ext4 disk of `size` bytes; it takes next to no space until a guest writes to it.

    What is there is never replaced: it may be what a guest has written. Raises UsageError for that and for a size that
    is too small or too large, NoSpace, StoreError.
    """
    blocks = size // BLOCK
    journal = min(max(blocks // 64, LEAST_JOURNAL), _MOST_JOURNAL) if blocks >= _LEAST_WITH_JOURNAL else 0
    root = directory()
    root.children["lost+found"] = directory(mode=0o700)
    root.children |= {name: directory() for name in ("upper", "work")}  # what init would have to make
    with _new_disk(Path(path), mode=_PRIVATE, replacing=False) as (image, _):
        write_ext4(image, root, io.BytesIO(), label="overlay", size=size, journal=journal)


def write_rootfs_disk(
    path: Path | str,
    layers: Sequence[BinaryIO | Path],
    *,
    format: DiskFormat = "ext4",
    size: int | None = None,
    limits: Limits = LIMITS,
    progress: Progress = silent,
) -> None:
    """Makes `path` a disk with the tree that an image's `layers` (files, or their paths) make, lowest first.

    It replaces what was there. `size` in bytes is as small as can be by default. `progress` hears of it twice: how much
    of the layers is unpacked, and how much of what was in them is written. Raises InvalidArchive for layers that are
    none or exceed `limits`, UsageError for a size that is too small, ToolMissing for a zstd layer on a host without
    libarchive, NoSpace, StoreError.
    """
    if format not in get_args(DiskFormat):
        msg = f"there is no disk format {format!r}"
        raise UsageError(msg, hint=f"it is one of {', '.join(get_args(DiskFormat))}")
    write = write_ext4 if format == "ext4" else write_erofs
    path = Path(path)
    with ExitStack() as stack:
        unpacking, writing = (_Meter(f"{path.name}: {doing}", progress) for doing in ("unpacking", "writing"))
        streams = [stack.enter_context(_opened(layer, unpacking)) for layer in layers]
        image, work = stack.enter_context(_new_disk(path, mode=READ_ONLY))
        spool = stack.enter_context(_Spool(work / "contents"))
        root = merge(streams, spool.keep, limits=limits)
        with spool.reader() as contents:
            writing.total = spool.size
            write(image, root, writing.reader(contents), label="rootfs", size=size)
        writing.finish()


def needs_recovery(path: Path) -> bool:
    """Whether whoever mounts this ext4 disk has to replay its journal first (fs/ext4/ext4.h, s_feature_incompat)."""
    with path.open("rb") as disk:
        disk.seek(1024 + 0x60)  # of the superblock
        return bool(int.from_bytes(disk.read(4), "little") & 4)


@contextmanager
def _new_disk(path: Path, *, mode: int, replacing: bool = True) -> Iterator[tuple[Image, Path]]:
    """An image to write, and a directory to work in; what was written becomes `path` when all went well."""
    _refuse_existing(path, replacing=replacing)
    remove_abandoned(path.parent, _ABANDONED)
    with scratch_dir(path.parent, prefix=_ABANDONED) as work:
        staged = work / "disk"
        with Image(staged) as image:
            yield image, work
        if replacing:
            publish(staged, path, mode=mode)
            return
        with storing(path):
            staged.chmod(mode)
            fsync_path(staged)
            try:
                os.link(staged, path)  # unlike a rename, it replaces nothing
            except FileExistsError:
                _refuse_existing(path, replacing=False)
            fsync_path(path.parent)


def _refuse_existing(path: Path, *, replacing: bool) -> None:
    if not replacing and os.path.lexists(path):
        msg = f"{path} is there already, and may hold what a guest has written: it was kept"
        raise UsageError(msg, hint="remove it first, or name another file")


@contextmanager
def _opened(layer: BinaryIO | Path, meter: _Meter) -> Iterator[BinaryIO]:
    if not isinstance(layer, Path):
        meter.total = None  # nobody knows how long it is
        yield meter.reader(layer)
        return
    try:
        stream = layer.open("rb")
    except OSError as error:
        msg = f"the layer {layer} cannot be read ({error.strerror})"
        raise StoreError(msg) from error
    with stream:
        if meter.total is not None:
            meter.total += os.fstat(stream.fileno()).st_size
        yield meter.reader(stream)


class _Meter:
    """Reports how much is read of some files together, of `total` bytes or of nobody knows how many."""

    def __init__(self, subject: str, progress: Progress) -> None:
        self.total: int | None = 0
        self._subject = subject
        self._progress = progress
        self._done = 0

    def reader(self, stream: BinaryIO) -> BinaryIO:
        return io.BufferedReader(_Metered(stream, self._count), _PIECE)

    def finish(self) -> None:
        """Nothing more is read, as what an upper layer replaced is not."""
        self._progress(self._subject, self.total or self._done, self.total)

    def _count(self, size: int) -> None:
        self._done += size
        self._progress(self._subject, self._done, self.total)


class _Metered(io.RawIOBase):
    def __init__(self, stream: BinaryIO, count: Callable[[int], None]) -> None:
        self._stream = stream
        self._count = count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        view[: len(data)] = data
        if data:
            self._count(len(data))
        return len(data)


class _Spool:
    """A file that takes the contents of files, one behind the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._image = Image(path)
        self._end = 0

    def keep(self, content: IO[bytes]) -> Span:
        start = self._end
        while data := content.read(_PIECE):
            self._image.write(self._end, data)
            self._end += len(data)
        return Span(start, self._end - start)

    @property
    def size(self) -> int:
        return self._end

    def reader(self) -> BinaryIO:
        self._image.resize(self._end)
        return self._path.open("rb")

    def __enter__(self) -> _Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._image.close()
