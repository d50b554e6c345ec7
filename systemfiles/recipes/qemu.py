"""Boots a kernel and an initrd in QEMU, and tells how that ended.

The machine is emulated (`-accel tcg`) unless KVM is asked for, so either architecture runs on any host and without
privilege. Its serial line is all that it is heard by: what is written there, from the kernel's first line to the last,
is the outcome's `console`, and goes to a file as it comes. QEMU ends by itself when the guest switches itself off and,
by `-no-reboot`, when it resets itself. Nothing that a guest does makes it run for longer, or makes that file larger,
than was agreed.

Source: qemu(1).
"""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypedDict, Unpack

from systemfiles.bootfiles import BootFiles
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import ToolFailed, ToolMissing, UsageError
from systemfiles.foundation.progress import Progress, silent
from systemfiles.recipes.console import TAIL, Console, shown
from systemfiles.recipes.console import Outcome as Outcome

HOST = "10.0.2.2"
"""The gateway of a guest's network; by this address it reaches the loopback interface of the host."""

SERVER = "10.0.2.100"
"""The address, port 80, of the one server that a guest with a closed network reaches."""

TALKATIVE = "loglevel=7"
"""The argument with which the kernel tells all it does."""

ACCELERATIONS = ("tcg", "kvm")
"""Emulation, and KVM: the host's own processor."""
Watch = Callable[[bytes], float | None]
"""Called with each piece of what the guest writes. May say in how many seconds, counted from now, the machine is to be
stopped; None leaves that as it is."""

_PACKAGES = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}
_USE_TCG = "accel=tcg emulates either architecture, on any host and without privilege"
_KVM = Path("/dev/kvm")
_TICK = 0.1  # seconds between two looks at the clock
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of virtual machine. Its virtio devices are on the `bus` pci, or are a `device` mapped into memory.

    `arguments` are for the kernel's command line.
    """

    name: str
    arch: str
    options: tuple[str, ...]
    bus: str
    arguments: str = ""

    def __str__(self) -> str:
        return self.name


# without "max" it would be a processor of 2003, which programs of today may refuse
Q35 = Machine("q35", "x86_64", ("-machine", "q35", "-cpu", "max"), "pci")
VIRT = Machine("virt", "aarch64", ("-machine", "virt", "-cpu", "cortex-a72"), "pci")


def machine_for(arch: Arch) -> Machine:
    """The usual one."""
    return {Arch.X86_64: Q35, Arch.AARCH64: VIRT}[arch]


def require_usable(machine: Machine, accel: str = "tcg") -> None:
    """Raises ToolMissing without the emulator, UsageError for an acceleration that cannot be used here."""
    if accel not in ACCELERATIONS:
        msg = f"there is no acceleration {accel!r}"
        raise UsageError(msg, hint=f"it is one of {', '.join(ACCELERATIONS)}")
    _emulator(machine)
    if accel != "kvm":
        return
    if machine.arch != (host := os.uname().machine):
        msg = f"KVM cannot run an {machine.arch} guest: this host is {host}"
        raise UsageError(msg, hint=_USE_TCG)
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        msg = f"KVM cannot be used: {_KVM} cannot be opened ({error.strerror})"
        raise UsageError(msg, hint=_USE_TCG) from error


class Attached(TypedDict, total=False):
    """What else a machine has, as of `command`."""

    serials: bool
    locked: Sequence[str]
    network: bool
    server: int | None
    arguments: str
    memory: int
    accel: str


def command(
    machine: Machine,
    files: BootFiles,
    disks: Mapping[str, Path],
    *,
    serials: bool = True,
    locked: Sequence[str] = (),
    network: bool = False,
    server: int | None = None,
    arguments: str = "",
    memory: int = 256,
    accel: str = "tcg",
) -> list[str]:
    """QEMU's command line. Raises ToolMissing.

    `disks` are attached in their order, those in `locked` so that the guest cannot write to them, and with `serials`
    their keys are the virtio serials. `network` gives it one that leads to the host and beyond; with `server` it leads
    nowhere but to that port of the host's loopback interface, for one connection. `arguments` go to the end of the
    kernel's command line. `memory` is in MiB.
    """
    words = [_emulator(machine), *machine.options, "-accel", accel, "-m", str(memory), "-nodefaults", "-no-user-config"]
    if accel == "kvm":  # of two such options the last one counts
        words += ["-cpu", "host"]
        # the host's kernel has that of the host alone
        words += ["-machine", "gic-version=max"] if machine.arch == "aarch64" else []
    append = " ".join(filter(None, (files.cmdline("qemu"), machine.arguments, arguments)))
    words += ["-no-reboot", "-display", "none", "-monitor", "none", "-serial", "stdio"]
    words += ["-kernel", str(files.kernel.path), "-initrd", str(files.initrd.path), "-append", append]
    for name, path in disks.items():
        file = str(path).replace(",", ",,")
        words += ["-drive", f"if=none,format=raw,id={name},file={file}" + ",readonly=on" * (name in locked)]
        words += ["-device", f"virtio-blk-{machine.bus},drive={name}" + f",serial={name}" * serials]
    if network or server is not None:
        rom = ",romfile=" if machine.bus == "pci" else ""  # nothing is to be booted from it
        reach = "restrict=off"
        if server is not None:
            reach = f"restrict=on,guestfwd=tcp:{SERVER}:80-tcp:127.0.0.1:{server}"
        words += ["-netdev", f"user,id=net,{reach}", "-device", f"virtio-net-{machine.bus},netdev=net{rom}"]
    return words


def boot(
    machine: Machine,
    files: BootFiles,
    disks: Mapping[str, Path],
    *,
    typed: bytes = b"",
    limit: float = 120,
    log: Path | None = None,
    watch: Watch = lambda _: None,
    progress: Progress = silent,
    **attached: Unpack[Attached],
) -> Outcome:
    """Run `machine` until it ends, for at most `limit` seconds or what `watch` makes of that.

    `attached` is as of `command`. `typed` is what its serial line receives; what it sends is appended to `log`.
    `progress` is called with the bytes written there, and may raise. Whatever happens, QEMU has ended when this
    returns. Raises ToolMissing, UsageError, NoSpace, StoreError, and ToolFailed when QEMU cannot do it.
    """
    accel = attached.get("accel", "tcg")
    require_usable(machine, accel)
    words = command(machine, files, disks, **attached)
    start = time.monotonic()
    with Console.to(log) as console, tempfile.TemporaryFile() as complaints:
        run = _Run(console, watch, lambda total: progress(f"boot {machine.arch}", console.size, total))
        status = run.until_it_ends(words, typed, limit, complaints)
        complaints.seek(0)
        complaint = complaints.read(TAIL).decode(errors="backslashreplace")
    text = console.text()
    if status:
        last = "\n".join(shown(complaint or text).splitlines()[-15:])
        raise ToolFailed(shlex.join(words), status=status, output=last, hint=_USE_TCG if accel == "kvm" else None)
    return Outcome(status, text, time.monotonic() - start)


def _emulator(machine: Machine) -> str:
    name = f"qemu-system-{machine.arch}"
    if path := shutil.which(name):
        return path
    raise ToolMissing(name, hint=f"apt-get install {_PACKAGES[machine.arch]}")


class _Run:
    """One process of QEMU, heard and watched."""

    def __init__(self, console: Console, watch: Watch, report: Callable[[int | None], None]) -> None:
        self._console = console
        self._watch = watch
        self._report = report

    def until_it_ends(self, words: Sequence[str], typed: bytes, limit: float, complaints: IO[bytes]) -> int | None:
        """The status of QEMU, None when it was stopped; what it says itself goes to `complaints`."""
        deadline = time.monotonic() + limit
        with _process(words, typed, complaints) as (process, output):
            poll = select.poll()
            poll.register(output, select.POLLIN)
            look = 0.0
            while (now := time.monotonic()) < deadline:
                if now >= look:
                    look = now + _TICK
                    self._report(None)
                if not poll.poll(1000 * _TICK):
                    continue
                if data := os.read(output, _PIECE):
                    self._console.add(data)
                    left = self._watch(data)
                    deadline = deadline if left is None else now + left
                    continue
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - now))
                break
            self._report(self._console.size)  # which may be how an interruption is learned of
            return process.poll()


@contextlib.contextmanager
def _process(
    words: Sequence[str], typed: bytes, complaints: IO[bytes]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """QEMU while it runs, and where its output is read; it has ended afterwards."""
    # with this even a SIGKILL to this process leaves none behind
    wrapper = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    with subprocess.Popen(
        [*wrapper, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(typed)
            process.stdin.close()
            yield process, process.stdout.fileno()
        finally:
            process.kill()
