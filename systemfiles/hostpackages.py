"""What this project needs from the host's apt, why, and how it is installed without starting anything."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from systemfiles.foundation.errors import ToolFailed, UsageError
from systemfiles.foundation.process import run

log = logging.getLogger(__name__)

PROVISIONING = {"libarchive13": "reads distribution packages and compressed kernels"}
TESTS = {
    "bc": "for compiling a kernel",
    "bison": "for compiling a kernel",
    "busybox-static": "what our list of applets is compared with",
    "cpio": "an independent reader of initrds",
    "curl": "what downloads are measured against",
    "debootstrap": "makes a Debian that nobody here has touched",
    "docker-registry": "a real registry to pull from and push to; not started by the installation",
    "e2fsprogs": "an independent reader of ext4 disks",
    "erofs-utils": "an independent reader of EROFS disks",
    "flex": "for compiling a kernel",
    "git": "what says which commit a release is of",
    "gcc": "compiles a kernel with everything built in, for machines that Debian's does not know",
    "libarchive-tools": "bsdtar, another independent reader",
    "libc6-dev": "for compiling a kernel",
    "libelf-dev": "for compiling a kernel",
    "linux-source": "that kernel, of which but a small part is compiled",
    "make": "for compiling a kernel",
    "postgresql": "a real server for the registry, run by the tests; not started by the installation",
    "qemu-system-arm": "boots aarch64 guests",
    "qemu-system-x86": "boots x86_64 guests",
    "shellcheck": "checks the init scripts",
    "skopeo": "an independent reader of the content store",
    "squashfs-tools": "makes squashfs disks of test guests",
    "strace": "kills processes and fails their system calls where a test wants it",
    "umoci": "another one",
}
if os.uname().machine != "x86_64":
    TESTS["gcc-x86-64-linux-gnu"] = "compiles that kernel on another host"
_NO_APT = "install these by the means of your distribution"
# invoke-rc.d(8) asks this file before it starts a daemon of a package that was just installed; 101 means no
_POLICY = Path("/usr/sbin/policy-rc.d")
_NO = "#!/bin/sh\n# written by `doit setup` of systemfiles while it installs packages\nexit 101\n"


def missing_packages(wanted: Mapping[str, str]) -> tuple[str, ...]:
    """Those of `wanted` that dpkg does not have installed, sorted. Raises ToolMissing without dpkg."""
    return tuple(name for name in sorted(wanted) if not _installed(name))


def install(names: Sequence[str]) -> Sequence[str]:
    """Installs these packages and starts no daemon; returns the names.

    Raises UsageError when that needs root, ToolFailed when apt fails.
    """
    command = ["apt-get", "install", "-y", "--no-install-recommends", *names]
    if not names:
        return names
    if os.geteuid() != 0:
        msg = f"{', '.join(names)} must be installed, which needs root"
        raise UsageError(msg, hint=f"sudo {shlex.join(command)}")
    with _no_daemons():
        run(["apt-get", "update", "-q"], missing=_NO_APT)
        run(["env", "DEBIAN_FRONTEND=noninteractive", *command], missing=_NO_APT, timeout=1800)
    return names


def _installed(name: str) -> bool:
    try:
        state = run(["dpkg-query", "-W", "-f", "${db:Status-Status}", name], missing=_NO_APT)
    except ToolFailed:
        return False
    return state == "installed"


@contextlib.contextmanager
def _no_daemons() -> Iterator[None]:
    if _POLICY.exists() and _POLICY.read_text() != _NO:
        yield  # the host has a policy of its own
        return
    _POLICY.write_text(_NO)  # should this be killed, the next run knows its own file and removes it
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink(missing_ok=True)
