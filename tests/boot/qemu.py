"""The machines that tests boot: those that the package knows, and odder ones."""

from __future__ import annotations

from systemfiles.bootfiles import BootFiles
from systemfiles.recipes.qemu import HOST, Q35, TALKATIVE, VIRT, Machine, Outcome, boot

__all__ = [
    "HOST",
    "MACHINES",
    "MICROVM",
    "MICROVM_WITHOUT_ACPI",
    "Q35",
    "TALKATIVE",
    "VIRT",
    "VIRT_MMIO",
    "BootFiles",
    "Machine",
    "Outcome",
    "boot",
]

# With hardware-reduced ACPI no timer interrupts before the TSC is calibrated. A busy host spoils that, and the kernel
# hangs at its start. Counting instructions (2 ns for each) makes all of the guest's clocks agree.
MICROVM = Machine("microvm", "x86_64", ("-machine", "microvm", "-icount", "shift=1"), "device")
# The command line alone tells of this machine's devices, and only a reset ends it. Debian's kernel cannot learn of
# them; kernel.py makes one that can, and that has no modules. It boots in a third of the time. Without reboot=t it
# would look for a keyboard controller first, and ask 655,360 times whether one is there.
_WITHOUT_ACPI = ("-machine", "microvm,acpi=off", "-global", "virtio-mmio.force-legacy=false")
MICROVM_WITHOUT_ACPI = Machine("microvm-without-acpi", "x86_64", _WITHOUT_ACPI, "device", "reboot=t")
# The kernel finds these disks in the reverse of the order in which QEMU attaches them.
VIRT_MMIO = Machine("virt-mmio", "aarch64", ("-machine", "virt", "-cpu", "cortex-a72"), "device")
MACHINES = (Q35, MICROVM, MICROVM_WITHOUT_ACPI, VIRT, VIRT_MMIO)
