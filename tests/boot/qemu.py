"""Boots a kernel and an initrd in QEMU, and tells how that ended.

The machine is emulated (`-accel tcg`), so it needs no privilege and runs either architecture on any host. The guest's
serial console is its only way out: everything on it, from the kernel's first line to the reset, is the `console` of the
outcome. QEMU ends by itself when the guest switches off, and also when it resets (`-no-reboot`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from systemfiles.foundation.errors import ToolMissing


@dataclass(frozen=True, slots=True)
class Machine:
    """A kind of virtual machine. `disk` is its virtio block device: on PCI, or memory-mapped."""

    name: str
    arch: str
    type: tuple[str, ...]
    disk: str

    def __str__(self) -> str:
        return self.name


Q35 = Machine("q35", "x86_64", ("-machine", "q35"), "virtio-blk-pci")
MICROVM = Machine("microvm", "x86_64", ("-machine", "microvm"), "virtio-blk-device")
MICROVM_WITHOUT_ACPI = Machine("microvm-no-acpi", "x86_64", ("-machine", "microvm,acpi=off"), "virtio-blk-device")
VIRT = Machine("virt", "aarch64", ("-machine", "virt", "-cpu", "cortex-a72"), "virtio-blk-pci")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine ended. `status` is QEMU's own, None when its time was up; `seconds` are the host's."""

    status: int | None
    console: str
    seconds: float

    @property
    def exit(self) -> int | None:
        """The status that init reported for the entrypoint, None when it reported none."""
        marks = re.findall(r"^systemfiles: exit (\d+)$", self.console, re.MULTILINE)
        return int(marks[-1]) if marks else None

    @property
    def errors(self) -> tuple[str, ...]:
        """What init reported as errors, without the prefix."""
        return tuple(re.findall(r"^systemfiles: error: (.*)$", self.console, re.MULTILINE))

    @property
    def panicked(self) -> bool:
        return "Kernel panic" in self.console


def boot(
    machine: Machine, *, kernel: Path, initrd: Path, cmdline: str, disks: Mapping[str, Path], limit: float = 60
) -> Outcome:
    """Run `machine` until it ends, at most `limit` seconds.

    `disks` are attached in their order, each under its key as virtio serial; a key that begins with `#` gives none.
    Raises ToolMissing.
    """
    command = [
        *(_emulator(machine.arch), *machine.type, "-accel", "tcg", "-m", "256", "-no-user-config", "-nodefaults"),
        *("-no-reboot", "-display", "none", "-monitor", "none", "-serial", "stdio"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", cmdline),
    ]
    for number, (serial, path) in enumerate(disks.items()):
        command += ["-drive", f"if=none,id=disk{number},format=raw,file={path}"]
        named = "" if serial.startswith("#") else f",serial={serial}"
        command += ["-device", f"{machine.disk},drive=disk{number}{named}"]
    start = time.monotonic()
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit
        )
        status, output = ended.returncode, ended.stdout
    except subprocess.TimeoutExpired as late:  # `run` has killed it, and waited for it
        status, output = None, late.output or b""
    console = output.decode(errors="surrogateescape").replace("\r\n", "\n")
    return Outcome(status, console, time.monotonic() - start)


def _emulator(arch: str) -> str:
    name = f"qemu-system-{arch}"
    path = shutil.which(name)
    if path is None:
        package = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}[arch]
        raise ToolMissing(name, hint=f"apt-get install {package}")
    return path
