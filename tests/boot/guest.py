"""What guests are made of: an image with little more than a static busybox in it, and disks.

The three disks, and those for volumes, are made by the package itself, but for a squashfs root, which it does not make.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from systemfiles.recipes.disks import DiskFormat, write_config_disk, write_overlay_disk, write_rootfs_disk
from systemfiles.recipes.guestconfig import GuestConfig
from systemfiles.recipes.probe import Entry as Entry
from systemfiles.recipes.probe import layer as layer

from . import qemu
from .qemu import MICROVM_WITHOUT_ACPI, BootFiles, Machine, Outcome

APPLETS = (
    *(
        "cat",
        "chmod",
        "cut",
        "dd",
        "echo",
        "env",
        "grep",
        "hostname",
        "ip",
        "kill",
        "ls",
        "mkdir",
        "mount",
        "od",
        "printf",
    ),
    *("readlink", "rm", "setsid", "sh", "sleep", "stat", "touch", "tr", "true", "unshare", "wget"),
)
PASSWD = b"""root:x:0:0:root:/root:/bin/sh
web:x:1000:1001:Web:/home/web:/bin/sh
"""
GROUP = b"""root:x:0:
staff:x:50:root,web
web:x:1001:
logs:x:2000:nobody,web
"""
OVERLAY_SIZE = 16 << 20
"""The least with which an overlay disk has a journal."""


class Provisioned(Protocol):
    """What the fixture `provisioned` gives."""

    def boot_files(self, arch: str) -> qemu.BootFiles: ...

    def busybox(self, arch: str) -> bytes: ...


def shell(script: str, *words: str, **said: object) -> GuestConfig:
    """To run `script` in the image's shell, with `words` for its arguments. `said` is the rest of the configuration."""
    config: dict[str, object] = {"environment": {"PATH": "/bin"}, **said}
    return GuestConfig(entrypoint=("sh", "-c", script, "sh", *words), **config)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Host:
    """A place where guests run: makes their disks in `directory`, and boots them with what was provisioned.

    A machine that describes its devices on the command line alone boots what `built_in` provides.
    """

    provisioned: Provisioned
    directory: Path
    built_in: Callable[[], BootFiles] | None = field(default=None, kw_only=True)
    root_format: DiskFormat | str = field(default="ext4", kw_only=True)

    def tree(self, machine: Machine) -> dict[str, Entry]:
        """An image with a shell and some users."""
        return {
            "bin/busybox": self.provisioned.busybox(machine.arch),
            **{f"bin/{applet}": "busybox" for applet in APPLETS},
            "etc/passwd": (PASSWD, 0o644),
            "etc/group": (GROUP, 0o644),
            **dict.fromkeys(("dev", "proc", "sys")),
        }

    def disks(
        self, machine: Machine, config: GuestConfig | str, tree: Mapping[str, Entry] | None = None
    ) -> dict[str, Path]:
        """The three, with `config` (a text for config.sh, if it is one) and `tree` for the image."""
        paths = {name: self.directory / name for name in ("rootfs", "overlay", "config")}
        self.write_root(paths["rootfs"], self.tree(machine) if tree is None else tree)
        paths["overlay"].unlink(missing_ok=True)
        write_overlay_disk(paths["overlay"], OVERLAY_SIZE)
        if isinstance(config, GuestConfig):
            write_config_disk(paths["config"], config)
        else:
            write_rootfs_disk(paths["config"], [layer({"config.sh": (config.encode(), 0o644)})])
        return paths

    def write_root(self, path: Path, tree: Mapping[str, Entry]) -> None:
        if self.root_format == "squashfs":
            subprocess.run(["sqfstar", path], input=layer(tree).read(), check=True, capture_output=True)
        else:
            write_rootfs_disk(path, [layer(tree)], format=self.root_format)  # type: ignore[arg-type]

    def volume(self, name: str, files: Mapping[str, Entry]) -> Path:
        """An ext4 disk with `files` on it."""
        path = self.directory / name
        write_rootfs_disk(path, [layer(files)], size=4 << 20)
        path.chmod(0o600)
        return path

    def files(self, machine: Machine) -> BootFiles:
        if machine.name != MICROVM_WITHOUT_ACPI.name:
            return self.provisioned.boot_files(machine.arch)
        assert self.built_in is not None
        return self.built_in()

    def boot(self, machine: Machine, disks: Mapping[str, Path], **options: object) -> Outcome:
        return qemu.boot(machine, self.files(machine), disks, **options)  # type: ignore[arg-type]

    def run(
        self,
        machine: Machine,
        config: GuestConfig | str,
        tree: Mapping[str, Entry] | None = None,
        **options: object,
    ) -> Outcome:
        return self.boot(machine, self.disks(machine, config, tree), **options)
