"""What a guest writes on its serial line: kept within bounds as it comes, and read when the guest has ended.

init's own lines are `systemfiles: error: <what> (<why>)` and, last of all, `systemfiles: exit <status>`; the kernel's
begin with a time in brackets (printk.time=1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from systemfiles.foundation.files import storing

HEAD, TAIL = 4 << 20, 64 << 10
"""How many of the first and of the last bytes are kept of what a guest writes."""

_KERNELS = re.compile(r"\[ *\d+\.\d+\] ")
_ERROR = "systemfiles: error: "


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine ended. `status` is that of QEMU, None when it had to be stopped; `seconds` passed on the host."""

    status: int | None
    console: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.console.splitlines()

    @property
    def last_words(self) -> list[str]:
        """What was written last, line by line, the last first; without empty lines and without the kernel's."""
        return [line for line in reversed(self.lines) if line.strip() and not _KERNELS.match(line)]

    @property
    def exit(self) -> int | None:
        """The status of the entrypoint as init reports it at the very end, None without a report."""
        report = re.fullmatch(r"systemfiles: exit (\d{1,3})", self.last_words[0]) if self.last_words else None
        return int(report[1]) if report else None

    @property
    def errors(self) -> tuple[str, ...]:
        """The failure that init reports right before the end, as `what (why)`; without an end, all that look like one.

        What is elsewhere on the console may be the entrypoint's.
        """
        lines = self.last_words[1:2] if self.exit is not None else self.last_words[::-1]
        return tuple(line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR))

    @property
    def panic(self) -> str | None:
        """Why the kernel gave up, if it did."""
        found = re.search(r"^(?:\[ *\d+\.\d+\] )?Kernel panic - not syncing(?:: )?(.*)", self.console, re.MULTILINE)
        return (found[1] or "no reason is given") if found else None

    @property
    def ending(self) -> str:
        """What became of the machine."""
        if self.status is None:
            return f"running after {self.seconds:.0f} s"
        told = re.findall(r"^\[ *\d+\.\d+\] reboot: (Power down|Restarting system)", self.console, re.MULTILINE)
        return {"Power down": "switched off", "Restarting system": "reset"}.get(told[-1] if told else "", "gone")

    @property
    def init_seconds(self) -> float:
        """How long init ran, by the guest's clock. The kernel tells when that began and ended, to `TALKATIVE` ones."""
        times = re.findall(r"^\[ *(\d+\.\d+)\] (?:Run /init as init process|reboot: )", self.console, re.MULTILINE)
        return float(times[-1]) - float(times[0])

    @property
    def clean(self) -> bool:
        """Whether the guest ended the machine itself, by init, and the kernel had no reason to."""
        return self.status == 0 and self.exit is not None and self.panic is None


def shown(text: str) -> str:
    """What a guest wrote, so that it can do a terminal no harm: of control characters only line ends are left."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text.replace("\t", "    ").replace("\r\n", "\n")
    )


class Console:
    """What a guest writes: the first and the last of it in memory, and both in a file, the first as it comes."""

    def __init__(self, file: BinaryIO | None, path: Path | None) -> None:
        self.size = 0
        """how many bytes were written, whether they are kept or not"""
        self._head = bytearray()
        self._tail = bytearray()
        self._file = file
        self._path = path

    @classmethod
    @contextmanager
    def to(cls, path: Path | None) -> Iterator[Console]:
        """One whose bytes are appended to the file at `path`, if that is given. Raises NoSpace, StoreError."""
        if path is None:
            yield cls(None, None)
            return
        with storing(path):
            file = path.open("ab", buffering=0)
        with file:
            console = cls(file, path)
            try:
                yield console
            finally:
                console._store(console._rest())

    def add(self, data: bytes) -> None:
        """Raises NoSpace, StoreError."""
        room = HEAD - len(self._head)
        self.size += len(data)
        self._head += data[:room]
        self._store(data[:room])
        self._tail += data[room:]
        del self._tail[:-TAIL]

    def text(self) -> str:
        """What is kept."""
        return (bytes(self._head) + self._rest()).decode(errors="backslashreplace").replace("\r\n", "\n")

    def _rest(self) -> bytes:
        left_out = self.size - len(self._head) - len(self._tail)
        return (b"\n[%d bytes are left out here]\n" % left_out if left_out else b"") + self._tail

    def _store(self, data: bytes) -> None:
        if self._file is not None and self._path is not None and data:
            with storing(self._path, needed=len(data)):
                self._file.write(data)
