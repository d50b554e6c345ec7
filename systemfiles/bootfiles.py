"""What a VM is started with: a kernel, an initrd, and the kernel command line that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import SystemFilesError, UsageError

# On a busy host QEMU's emulated timer may tick too seldom to be taken for one, and the kernel panics. Under KVM the
# kernel makes no such check anyway (arch/x86/kernel/kvm.c), with the argument or without.
_MACHINE = {
    ("cloud-hypervisor", Arch.X86_64): "console=ttyS0",
    ("cloud-hypervisor", Arch.AARCH64): "console=ttyAMA0",
    ("firecracker", Arch.X86_64): "console=ttyS0",
    ("firecracker", Arch.AARCH64): "console=ttyS0",
    ("qemu", Arch.X86_64): "console=ttyS0 no_timer_check",
    ("qemu", Arch.AARCH64): "console=ttyAMA0",
}
# A guest that panics is reset at once, so that its VMM sees it end. Firecracker has no ACPI power-off: its guests end
# by a reset through the keyboard controller, which `reboot=k` tells the kernel and our init.
_ENDING = {
    "cloud-hypervisor": "quiet panic=-1",
    "firecracker": "quiet reboot=k panic=-1 pci=off",
    "qemu": "quiet panic=-1",
}


VMMS = tuple(sorted(_ENDING))
"""Those whose guests we know how to start."""


class KernelFile(NamedTuple):
    """A kernel on disk: `sha256` in hex, `size` in bytes."""

    path: Path
    version: str
    arch: Arch
    sha256: str
    size: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _plain(self)


class InitrdFile(NamedTuple):
    """An initrd on disk. `content_sha256` is of the uncompressed cpio, its identity on any host."""

    path: Path
    version: str
    arch: Arch
    sha256: str
    size: int
    content_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _plain(self)


class BootFiles(NamedTuple):
    """A kernel and an initrd that go together, both intact when this was made."""

    kernel: KernelFile
    initrd: InitrdFile

    def cmdline(self, vmm: str) -> str:
        """The kernel command line for `vmm`: "cloud-hypervisor", "firecracker" or "qemu". Raises UsageError."""
        try:
            return f"{_MACHINE[vmm, self.kernel.arch]} {_ENDING[vmm]}"
        except KeyError:
            msg = f"{vmm!r} is not a known VMM"
            raise UsageError(msg, details=[("known", ", ".join(VMMS))]) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, to be kept with a VM's own records; `from_dict` reads it back."""
        return {"kernel": self.kernel.to_dict(), "initrd": self.initrd.to_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> BootFiles:
        """The opposite of `to_dict`; looks at no file. Raises UsageError when `value` is something else."""
        try:
            return cls(KernelFile(**_typed(value["kernel"])), InitrdFile(**_typed(value["initrd"])))
        except (KeyError, TypeError) as error:
            msg = f"not a record of boot files: {error}"
            raise UsageError(msg) from error

    def copy_to(self, directory: Path | str) -> BootFiles:
        """Independent copies in `directory` (a reflink where possible), for whoever must own or change its files.

        Raises DigestMismatch, NoSpace, and StoreError, also when a file of that name is there.
        """
        from systemfiles.foundation.files import copy_whole, make_dirs

        target = Path(directory).absolute()
        make_dirs(target)
        kernel, initrd = (target / part.path.name for part in self)
        copy_whole(self.kernel.path, kernel, sha256=self.kernel.sha256)
        try:
            copy_whole(self.initrd.path, initrd, sha256=self.initrd.sha256)
        except SystemFilesError:
            kernel.unlink()  # both, or none
            raise
        return BootFiles(self.kernel._replace(path=kernel), self.initrd._replace(path=initrd))


_PLAIN = {"path": str, "version": str, "arch": str, "sha256": str, "size": int, "content_sha256": str}


def _plain(part: KernelFile | InitrdFile) -> dict[str, Any]:
    return {**part._asdict(), "path": str(part.path), "arch": part.arch.value}


def _typed(part: Mapping[str, Any]) -> dict[str, Any]:
    for name, kind in _PLAIN.items():
        if name in part and type(part[name]) is not kind:
            msg = f"{name} is {part[name]!r:.100}"
            raise TypeError(msg)
    return {**part, "path": Path(part["path"]), "arch": Arch.parse(part["arch"])}
