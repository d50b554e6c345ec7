"""Boots a kernel and an initrd in QEMU, and tells how that ended.

The machine is emulated (`-accel tcg`), so either architecture runs on any host and without privilege. Its serial line
is its only way out: all that is written there, from the kernel's first line to the last, is the outcome's `console`.
QEMU ends by itself when the guest switches itself off and, by `-no-reboot`, when it resets itself.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from systemfiles.foundation.errors import ToolMissing


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
    """A kind of virtual machine. `disk` is its virtio block device: on PCI, or mapped into memory."""

    name: str
    arch: str
    options: tuple[str, ...]
    disk: str

    def __str__(self) -> str:
        return self.name


Q35 = Machine("q35", "x86_64", ("-machine", "q35"), "virtio-blk-pci")
# With hardware-reduced ACPI no timer interrupts before the TSC is calibrated. A busy host spoils that, and the kernel
# hangs at its start. Counting instructions (2 ns for each) makes all of the guest's clocks agree.
MICROVM = Machine("microvm", "x86_64", ("-machine", "microvm", "-icount", "shift=1"), "virtio-blk-device")
MICROVM_WITHOUT_ACPI = Machine("microvm-without-acpi", "x86_64", ("-machine", "microvm,acpi=off"), "virtio-blk-device")
VIRT = Machine("virt", "aarch64", ("-machine", "virt", "-cpu", "cortex-a72"), "virtio-blk-pci")


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
    def clean(self) -> bool:
        """Whether the guest ended the machine itself, by init, and the kernel had no reason to."""
        return self.status == 0 and self.exit is not None and "Kernel panic" not in self.console


def boot(
    machine: Machine, files: BootFiles, disks: Mapping[str, Path], *, serials: bool = True, limit: float = 120
) -> Outcome:
    """Run `machine` until it ends, for at most `limit` seconds.

    `disks` are attached in their order, and with `serials` their keys are the virtio serials. Raises ToolMissing.
    """
    command = [
        *(_emulator(machine.arch), *machine.options, "-accel", "tcg", "-m", "256", "-nodefaults", "-no-user-config"),
        *("-no-reboot", "-display", "none", "-monitor", "none", "-serial", "stdio"),
        *("-kernel", str(files.kernel.path), "-initrd", str(files.initrd.path), "-append", files.cmdline("qemu")),
    ]
    for name, path in disks.items():
        command += ["-drive", f"if=none,format=raw,id={name},file={path}"]
        command += ["-device", f"{machine.disk},drive={name}" + (f",serial={name}" if serials else "")]
    start = time.monotonic()
    try:
        # The time limit kills this process, by its id, and waits for it.
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit
        )
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
