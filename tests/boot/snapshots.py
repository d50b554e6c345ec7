"""Guests that are saved to a file, restored from it, and reset while they run.

QEMU's own machine protocol (docs/interop/qmp-spec in its sources) comes over one end of a socket pair, and the serial
line over its standard output. `migrate` writes all of a stopped machine but its disks to a file; a process that was
started with `-incoming` reads it back, and has the machine stopped until `cont`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from systemfiles.bootfiles import BootFiles
from systemfiles.recipes.qemu import Machine, command

LIMIT = 120.0
"""Seconds that anything here may take, on a busy host too."""


class Guest:
    """A machine that runs until the block of `running` ends."""

    def __init__(self, process: subprocess.Popen[bytes], monitor: socket.socket) -> None:
        self._process = process
        self._monitor = monitor.makefile("rwb")
        self._written = bytearray()
        self._grown = threading.Condition()
        self._seen = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        json.loads(self._monitor.readline())  # its greeting
        self._ask("qmp_capabilities")

    @property
    def hypervisor(self) -> str:
        """What runs it, as a pin should have it on record."""
        version = self._ask("query-version")["qemu"]
        return f"qemu {version['major']}.{version['minor']}.{version['micro']}"

    @property
    def console(self) -> str:
        """All that it wrote so far."""
        with self._grown:
            return self._written.decode(errors="replace").replace("\r\n", "\n")

    def line(self, pattern: str) -> str:
        """The group of the next line that matches as a whole; lines before it are passed over."""
        deadline = time.monotonic() + LIMIT
        whole = re.compile(rf"^{pattern}\n", re.MULTILINE)
        while True:
            if found := whole.search(self.console, self._seen):
                self._seen = found.end()
                return found[1]
            with self._grown:
                left = deadline - time.monotonic()
                if self._process.poll() is not None or not left > 0:
                    break
                self._grown.wait(min(left, 1))
        msg = f"nothing like {pattern!r} came of it:\n{self.console[-3000:]}"
        raise AssertionError(msg)

    def skip(self) -> None:
        """Lets `line` find nothing that was written until now."""
        self._seen = len(self.console)

    def save(self, path: Path) -> None:
        """Stops it, and writes it to `path`."""
        self._ask("stop")
        self._ask("migrate", uri=f"exec:cat >{shlex.quote(str(path))}")
        self._until("query-migrate", "completed", {"setup", "active", "device", "pre-switchover"})

    def resume(self) -> None:
        """Lets it go on where it was saved."""
        self._until("query-status", "paused", {"inmigrate", "postmigrate"})
        self._ask("cont")

    def reset(self) -> None:
        """As by the button of a machine: what boots then is what this process was started with."""
        self.skip()
        self._ask("system_reset")

    def _until(self, question: str, state: str, before: set[str]) -> None:
        deadline = time.monotonic() + LIMIT
        while (answer := self._ask(question)).get("status") != state:
            assert answer.get("status", "setup") in before, answer
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)

    def _ask(self, what: str, **arguments: str) -> Any:
        self._monitor.write(json.dumps({"execute": what, "arguments": arguments}).encode() + b"\n")
        self._monitor.flush()
        while line := self._monitor.readline():
            answer = json.loads(line)
            if "event" not in answer:
                assert "return" in answer, f"{what}: {answer}"
                return answer["return"]
        msg = f"QEMU ended:\n{self.console[-3000:]}"
        raise AssertionError(msg)

    def _read(self) -> None:
        assert self._process.stdout
        while data := self._process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            with self._grown:
                self._written += data
                self._grown.notify_all()


@contextlib.contextmanager
def running(
    machine: Machine, files: BootFiles, disks: Mapping[str, Path], *, saved: Path | None = None
) -> Iterator[Guest]:
    """A machine that boots these files, or with `saved` one that has them and goes on from there at `resume`."""
    words = command(machine, files, disks)
    words.remove("-no-reboot")  # it is to boot again
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT)
    words += ["-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"]
    if saved is not None:
        words += ["-incoming", f"exec:cat {shlex.quote(str(saved))}"]
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[theirs.fileno()],
    ) as process:
        theirs.close()
        try:
            with ours:
                yield Guest(process, ours)
        finally:
            process.kill()
