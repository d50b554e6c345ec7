"""Boots a kernel and an initrd in QEMU, and tells how that ended.

The machine is emulated (`-accel tcg`), so either architecture runs on any host and without privilege. Its serial line
is all that it is heard by: what is written there, from the kernel's first line to the last, is the outcome's `console`.
QEMU ends by itself when the guest switches itself off and, by `-no-reboot`, when it resets itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from systemfiles.foundation.errors import ToolMissing

HOST = "10.0.2.2"
"""The address by which a guest with a network reaches the loopback interface of the host."""

TALKATIVE = "loglevel=7"
"""The argument with which the kernel tells all it does."""


class Artifact(Protocol):
    @property
    def path(self) -> Path: ...


class BootFiles(Protocol):
    """What a machine needs to start: the part of `systemfiles.BootFiles` that is used here."""

    @property
    def kernel(self) -> Artifact: ...

    @property
    def initrd(self) -> Artifact: ...

    def cmdline(self, vmm: str, /) -> str: ...


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


# On a busy host the kernel may find that the timer ticks too seldom to be one, and panic before it has begun.
Q35 = Machine("q35", "x86_64", ("-machine", "q35"), "pci", "no_timer_check")
# With hardware-reduced ACPI no timer interrupts before the TSC is calibrated. A busy host spoils that, and the kernel
# hangs at its start. Counting instructions (2 ns for each) makes all of the guest's clocks agree.
MICROVM = Machine("microvm", "x86_64", ("-machine", "microvm", "-icount", "shift=1"), "device")
# Debian's kernel cannot learn of this machine's devices: it is good for what happens without disks.
MICROVM_WITHOUT_ACPI = Machine(
    "microvm-without-acpi", "x86_64", ("-machine", "microvm,acpi=off"), "device", "no_timer_check"
)
VIRT = Machine("virt", "aarch64", ("-machine", "virt", "-cpu", "cortex-a72"), "pci")
# The kernel finds these disks in the reverse of the order in which QEMU attaches them.
VIRT_MMIO = Machine("virt-mmio", "aarch64", ("-machine", "virt", "-cpu", "cortex-a72"), "device")
MACHINES = (Q35, MICROVM, VIRT, VIRT_MMIO)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine ended. `status` is that of QEMU, None when it had to be killed; `seconds` passed on the host."""

    status: int | None
    console: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.console.splitlines()

    @property
    def exit(self) -> int | None:
        """The status of the entrypoint as init reports it, None without a report."""
        reports = re.findall(r"^systemfiles: exit (\d+)$", self.console, re.MULTILINE)
        return int(reports[-1]) if reports else None

    @property
    def errors(self) -> tuple[str, ...]:
        """The failures that init reports, as `what (why)`."""
        return tuple(re.findall(r"^systemfiles: error: (.+)$", self.console, re.MULTILINE))

    @property
    def init_seconds(self) -> float:
        """How long init ran, by the guest's clock. The kernel tells when that began and ended, to `TALKATIVE` ones."""
        times = re.findall(r"^\[ *(\d+\.\d+)\] (?:Run /init as init process|reboot: )", self.console, re.MULTILINE)
        return float(times[-1]) - float(times[0])

    @property
    def clean(self) -> bool:
        """Whether the guest ended the machine itself, by init, and the kernel had no reason to."""
        return self.status == 0 and self.exit is not None and "Kernel panic" not in self.console


def boot(
    machine: Machine,
    files: BootFiles,
    disks: Mapping[str, Path],
    *,
    serials: bool = True,
    locked: Sequence[str] = (),
    network: bool = False,
    arguments: str = "",
    typed: bytes = b"",
    limit: float = 120,
) -> Outcome:
    """Run `machine` until it ends, for at most `limit` seconds.

    `disks` are attached in their order, those in `locked` so that the guest cannot write to them, and with `serials`
    their keys are the virtio serials. `network` gives it one that leads to the host. `arguments` go to the end of the
    kernel's command line. `typed` is what its serial line receives. Raises ToolMissing.
    """
    command = [
        *(_emulator(machine.arch), *machine.options, "-accel", "tcg", "-m", "256", "-nodefaults", "-no-user-config"),
        *("-no-reboot", "-display", "none", "-monitor", "none", "-serial", "stdio"),
        *("-kernel", str(files.kernel.path), "-initrd", str(files.initrd.path)),
        *("-append", f"{files.cmdline('qemu')} {machine.arguments} {arguments}"),
    ]
    for name, path in disks.items():
        command += ["-drive", f"if=none,format=raw,id={name},file={path}" + ",readonly=on" * (name in locked)]
        command += ["-device", f"virtio-blk-{machine.bus},drive={name}" + f",serial={name}" * serials]
    if network:
        rom = ",romfile=" if machine.bus == "pci" else ""  # nothing is to be booted from it
        command += ["-netdev", "user,id=net,restrict=off", "-device", f"virtio-net-{machine.bus},netdev=net{rom}"]
    start = time.monotonic()
    try:
        # The time limit kills this process, by its id, and waits for it.
        ended = subprocess.run(command, input=typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit)
    except subprocess.TimeoutExpired as late:
        status, output = None, late.output or b""
    else:
        status, output = ended.returncode, ended.stdout
    console = output.decode(errors="backslashreplace").replace("\r\n", "\n")
    return Outcome(status, console, time.monotonic() - start)


def _emulator(arch: str) -> str:
    name = f"qemu-system-{arch}"
    if path := shutil.which(name):
        return path
    package = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}[arch]
    raise ToolMissing(name, hint=f"apt-get install {package}")
