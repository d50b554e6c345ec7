"""What has become of a collection: for whoever asked for it, and for the audit log.

::

    collected.jsonl
    {"at": "2026-11-20T09:41:37Z", "what": "kernel-…", "why": "held by nothing", "last_held_by": "vm-7", "size": 4096}
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from systemfiles.foundation.errors import SystemFilesError, unexpected
from systemfiles.foundation.files import fsync_path, storing
from systemfiles.foundation.lock import locked
from systemfiles.foundation.paths import Paths
from systemfiles.foundation.units import utc

UNHELD = "held by nothing"
UNFINISHED = "what was being made in it was never finished"
MOST_TOLD = 10_000
"""So many things that went are told of one by one; the audit log has all of them."""
_MOST_PROBLEMS = 100
_LONGEST_LINE = 1 << 16


class Gone(NamedTuple):
    """Something that went, or would go: what it is, why, who last held it ("": nobody known), its size in bytes.

    What of that size the disk gets back depends on who else has the bytes.
    """

    what: str
    why: str
    last_held_by: str
    size: int


@dataclass(slots=True)
class Outcome:
    """What has become of a collection so far, in little memory however much that is.

    `count` things are gone, the first of them in `gone`; `freed` is in bytes on the disk.
    """

    gone: list[Gone] = field(default_factory=list)
    count: int = 0
    freed: int = 0
    problems: list[SystemFilesError] = field(default_factory=list)

    def went(self, *gone: Gone) -> None:
        """Adds what is gone."""
        self.count += len(gone)
        self.gone += gone[: MOST_TOLD - len(self.gone)]

    def failed(self, error: SystemFilesError) -> None:
        """Adds a problem, unless it is told already."""
        if len(self.problems) < _MOST_PROBLEMS and str(error) not in map(str, self.problems):
            self.problems.append(error)

    @contextlib.contextmanager
    def going_on(self, *, but: tuple[type[SystemFilesError], ...] = ()) -> Iterator[None]:
        """Whatever goes wrong in the block is a problem among others, `but` for what is raised."""
        try:
            yield
        except but:
            raise
        except (SystemFilesError, OSError) as error:
            self.failed(unexpected(error) if isinstance(error, OSError) else error)


def tell(paths: Paths, gone: Collection[Gone], *, now: float) -> None:
    """Adds lines to the audit log, durably: what went, when, why, and who last held it."""
    if not gone:
        return
    at = utc(now)
    lines = "".join(json.dumps({"at": at, **each._asdict()}) + "\n" for each in gone).encode()
    with locked(paths.lock(paths.collected.name)), storing(paths.collected):
        mode = 0o660 if paths.data_dir.stat().st_mode & 0o020 else 0o640
        fd = os.open(paths.collected, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            with contextlib.suppress(PermissionError):  # another user's, who did it already
                os.fchmod(fd, mode)  # whatever the umask
            _append(fd, lines)
            fsync_path(paths.data_dir)  # it may be new
        finally:
            os.close(fd)


def _append(fd: int, lines: bytes) -> None:
    """Adds whole lines, behind the last whole one: a power cut or a full disk may have left a part of another."""
    size = os.fstat(fd).st_size
    tail = os.pread(fd, _LONGEST_LINE, max(0, size - _LONGEST_LINE))
    end = size - len(tail) + tail.rfind(b"\n") + 1
    if end < size:
        os.ftruncate(fd, end)
    try:
        while lines:
            lines = lines[os.write(fd, lines) :]
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):  # else whoever comes next does it
            os.ftruncate(fd, end)
        raise
