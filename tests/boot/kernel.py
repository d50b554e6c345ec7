"""A kernel with everything built in, and an initrd without modules for it: what other hosts give their guests.

No distribution has such a kernel, so this one is compiled from the source that Debian's package `linux-source` brings.
It knows the virtio devices of its command line alone: there is no PCI, no ACPI and no module in it. So it is small,
and made in 2 or 3 minutes on two processors.

Source: the kernel's Documentation/kbuild/kconfig (KCONFIG_ALLCONFIG).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from systemfiles import BootFiles, SystemFiles
from systemfiles.foundation.lock import locked

_ARCHIVES = Path("/usr/src")
"""Where Debian's packages put the kernel's source, as linux-source-<version>.tar.xz."""
_TREES = (
    *("arch/x86", "block", "certs", "crypto", "fs", "include", "init", "io_uring", "ipc", "kernel", "lib", "mm", "net"),
    *("scripts", "security", "usr", "virt"),
    *(f"drivers/{name}" for name in ("base", "block", "char", "clocksource", "net", "rtc", "tty", "virtio")),
    *(f"tools/{name}" for name in ("arch/x86", "build", "include", "lib", "objtool", "scripts")),
)
"""What of it is compiled; of all else, only what says how that would be configured and made is unpacked."""
_CONFIG = (
    # what machine it is for, and its console
    *("64BIT", "HYPERVISOR_GUEST", "PARAVIRT", "PVH", "HIGH_RES_TIMERS", "TTY", "UNIX98_PTYS"),
    *("SERIAL_8250", "SERIAL_8250_CONSOLE", "PRINTK", "PRINTK_TIME", "BUG"),
    # disks and network
    *("VIRTIO_MENU", "VIRTIO_MMIO", "VIRTIO_MMIO_CMDLINE_DEVICES", "BLOCK", "BLK_DEV", "VIRTIO_BLK"),
    *("NET", "UNIX", "INET", "NETDEVICES", "NET_CORE", "VIRTIO_NET"),
    # file systems
    *("BLK_DEV_INITRD", "RD_GZIP", "DEVTMPFS", "PROC_FS", "PROC_SYSCTL", "SYSFS", "SHMEM", "TMPFS", "FILE_LOCKING"),
    *("EXT4_FS", "MISC_FILESYSTEMS", "EROFS_FS", "SQUASHFS", "SQUASHFS_ZLIB", "OVERLAY_FS"),
    # what programs expect
    *("BINFMT_ELF", "BINFMT_SCRIPT", "MULTIUSER", "FUTEX", "EPOLL", "EVENTFD", "SIGNALFD", "TIMERFD", "POSIX_TIMERS"),
    *("CGROUPS", "NAMESPACES", "USER_NS"),
    # so that there is less to compile
    *("EXPERT", "EMBEDDED", "CC_OPTIMIZE_FOR_SIZE", "UNWINDER_GUESS"),
)
_OLD = frozenset({"EMBEDDED", "NET_CORE", "MISC_FILESYSTEMS", "VIRTIO_MENU"})
"""Of these, what only leads to others, and may be missing in another version."""
_CATALOG = """schema = 1
[initrd."v1.0.0-built-in"]
summary = "init v1.0.0 and Debian's busybox, for a kernel with everything built in"
init = "v1.0.0"
busybox = { apt = "busybox-static" }
"""


def provide(base: Path) -> BootFiles:
    """Both, made once below `base`: whoever comes while they are made waits for them."""
    place, record = base / "built-in", base / "built-in.json"
    with locked(base / "built-in.lock"):
        if not record.exists():
            shutil.rmtree(place, ignore_errors=True)  # what an attempt left that failed
            place.mkdir()
            (place / "versions.toml").write_text(_CATALOG)
            files = SystemFiles(place / "data", catalog=place / "versions.toml", arch="x86_64")
            kernel = files.add_kernel(compiled(place), "built-in")
            made = files.ensure(kernel=kernel.version, initrd="v1.0.0-built-in")
            record.write_text(json.dumps(made.to_dict()))
    return BootFiles.from_dict(json.loads(record.read_text()))


def compiled(directory: Path) -> Path:
    """A vmlinux in `directory`, where nothing is left of its source."""
    tree = directory / "linux"
    tree.mkdir()
    _unpack(_archive(), tree)
    options = directory / "options"
    options.write_text("".join(f"CONFIG_{name}=y\n" for name in _CONFIG))
    _make(tree, "allnoconfig", f"KCONFIG_ALLCONFIG={options}")
    has = set(re.findall(r"^CONFIG_(\w+)=y$", (tree / ".config").read_text(), re.MULTILINE))
    assert has >= set(_CONFIG) - _OLD, f"this kernel does not have {sorted(set(_CONFIG) - _OLD - has)}"
    assert not has & {"ACPI", "PCI", "MODULES"}
    _make(tree, "vmlinux")
    vmlinux = (tree / "vmlinux").rename(directory / "vmlinux")
    shutil.rmtree(tree)
    return vmlinux


def _archive() -> Path:
    """The newest there is."""
    found = {
        tuple(map(int, match[1].split("."))): path
        for path in _ARCHIVES.glob("linux-source-*.tar.xz")
        if (match := re.fullmatch(r"linux-source-(\d+(?:\.\d+)*)\.tar\.xz", path.name))
    }
    assert found, f"there is no source of a kernel in {_ARCHIVES}: apt-get install --no-install-recommends linux-source"
    return found[max(found)]


def _unpack(archive: Path, tree: Path) -> None:
    top = archive.name.removesuffix(".tar.xz")
    wanted = ["--wildcards", *(f"*/{name}*" for name in ("Kconfig", "Kbuild", "Makefile"))]
    wanted += ["--no-wildcards", *(f"{top}/{name}" for name in _TREES)]
    # the drivers of real network cards alone are 100 MB
    leave = ["--exclude=*/drivers/net/*/*.[ch]", "--exclude=*/drivers/block/*/*.[ch]"]
    _run("tar", "-xJf", archive, "-C", tree, "--strip-components=1", *leave, *wanted)


def _make(tree: Path, *words: str) -> None:
    # what Debian's native compiler and its cross compilers are called alike; other tests go first
    tools = ["ARCH=x86", "CROSS_COMPILE=x86_64-linux-gnu-"]
    _run("nice", "-n", "10", "make", "-s", f"-j{os.cpu_count()}", "-C", tree, *tools, *words)


def _run(*words: str | Path) -> None:
    # what is set for another kernel, or for a make around this one, is not for this one
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("KBUILD", "KCONFIG", "MAKE"))}
    done = subprocess.run(words, env=environ | {"LC_ALL": "C"}, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{words[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


if __name__ == "__main__":
    print(*(part.path for part in provide(Path(sys.argv[1]))), sep="\n")
