"""The guests of one boot check: their disks, their serial log, and what is found of them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from systemfiles.bootfiles import BootFiles
from systemfiles.foundation.files import storing
from systemfiles.foundation.progress import Progress
from systemfiles.recipes import contract, probe, qemu
from systemfiles.recipes.bootreport import ENDING, Findings, Report, brief
from systemfiles.recipes.console import Outcome
from systemfiles.recipes.probe import Probe

_LONGEST_LINE = 1 << 16


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest that ran, what the probe in it told, and which of the patterns that its time depends on it wrote."""

    outcome: Outcome
    facts: Mapping[str, str]
    met: frozenset[re.Pattern[str]]

    @property
    def started(self) -> bool:
        return "started" in self.facts


class Guests:
    """Boots a pair again and again, in `directory`. `limit` and `start` are seconds, as of `check_boot`."""

    def __init__(
        self, files: BootFiles, directory: Path, *, accel: str, limit: float, start: float, progress: Progress
    ) -> None:
        self.directory = directory
        self.limit = limit
        self.probe = Probe.of(files.initrd.path)
        self.findings = Findings()
        self._files = files
        self._machine = qemu.machine_for(files.kernel.arch)
        self._accel = accel
        self._start = start
        self.progress = progress
        self._began = time.monotonic()
        self._boots = 0
        self._console = ""

    def disk(self, name: str) -> Path:
        return self.directory / name

    def disks(self, *names: str) -> dict[str, Path]:
        return {name: self.disk(name) for name in names}

    def boot(
        self,
        title: str,
        disks: Mapping[str, Path],
        *,
        times: Mapping[re.Pattern[str], float] | None = None,
        serials: bool = True,
        locked: Sequence[str] = (),
        network: bool = False,
        arguments: str = "",
        memory: int = 256,
    ) -> Guest:
        """One guest. `times` says how many seconds it has left once it has written something; by default, its
        entrypoint has `limit`. `network` leads to a server that answers with the probe's own word. The rest is as of
        `qemu.boot`."""
        self._boots += 1
        self.findings.guest = title if self._boots > 1 else ""
        log = self.disk("serial.log")
        with storing(log), log.open("ab") as file:
            file.write(f"{'' if self._boots == 1 else chr(10)}=== boot {self._boots}: {title} ===\n".encode())
        watch = Watch({self.probe.told("started"): self.limit} if times is None else times)
        with probe.serving(self.probe.nonce) as server:
            outcome = qemu.boot(
                *(self._machine, self._files, disks),
                serials=serials,
                locked=locked,
                server=server if network else None,
                arguments=f"printk.time=1 {arguments}",  # by which the kernel's lines are known
                memory=memory,
                accel=self._accel,
                limit=self._start,
                log=log,
                watch=watch,
                progress=self.progress,
            )
        return Guest(outcome, self.probe.facts(outcome.console), frozenset(watch.met))

    def has_started(self, guest: Guest, *, step: int | None = None) -> bool:
        """Whether its entrypoint did. If not, it is noted why; as of `step`, if that is all that this guest is for."""
        if guest.started:
            return True
        if not self.has_errors(guest, step=step):
            outcome = guest.outcome
            last = next((line for line in reversed(outcome.lines) if line.strip()), "")
            after = f"nothing of it after {outcome.seconds:.0f} s" if outcome.status is None else "the machine was off"
            expected = f"started within {self._start:g} s"
            self.findings.expect(
                step or ENDING, "the entrypoint", expected, f"{after}; the last line is: {brief(last)}"
            )
        return False

    def has_errors(self, guest: Guest, *, step: int | None = None) -> bool:
        """Whether init or the kernel says that something went wrong, which is noted."""
        for error in guest.outcome.errors:
            self.findings.expect(step or contract.step_of_error(error), "what init says", "no error", error)
        if guest.outcome.panic:
            self.findings.expect(step or ENDING, "the kernel", "no panic", guest.outcome.panic)
        return bool(guest.outcome.errors or guest.outcome.panic)

    def noted(self, guest: Guest) -> Guest:
        """To be called when all is found of it: the first with which something is wrong is whose console is shown."""
        if self.findings.problems and not self._console:
            self._console = guest.outcome.console
        return guest

    def report(self, init_seconds: float | None, notes: Sequence[str] = ()) -> Report:
        kernel, initrd = self._files
        subject = {
            "arch": str(kernel.arch),
            "kernel": kernel.version,
            "initrd": initrd.version,
            "machine": str(self._machine),
            "accel": self._accel,
        }
        took = time.monotonic() - self._began
        return Report(subject, self.findings, self._boots, took, init_seconds, self._console, tuple(notes))


class Watch:
    """Looks for patterns in each line as it is complete, however many there are: no image can write too much for that.

    Each sets once how many seconds are left.
    """

    def __init__(self, times: Mapping[re.Pattern[str], float]) -> None:
        self.met: set[re.Pattern[str]] = set()
        self._times = times
        self._line = b""

    def __call__(self, data: bytes) -> float | None:
        complete, newline, self._line = (self._line + data).rpartition(b"\n")
        self._line = self._line[:_LONGEST_LINE]
        text = (complete + newline).decode(errors="replace").replace("\r", "")
        found = {pattern for pattern in self._times.keys() - self.met if pattern.search(text)}
        self.met |= found
        return min((self._times[pattern] for pattern in found), default=None)
