"""The three disks of a guest (see the head of the init script), each a small ext4 made without root or loop device."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

APPLETS = ("sh", "echo", "cat", "env", "grep", "id", "ls", "ps", "pwd", "readlink", "sleep", "stat", "touch")


def write_rootfs(path: Path, busybox: bytes, *, scratch: Path) -> Path:
    """A root file system that holds a static busybox, the links of some applets, and nothing else."""
    directory = scratch / "bin"
    directory.mkdir(parents=True)
    program = directory / "busybox"
    program.write_bytes(busybox)
    program.chmod(0o755)
    for applet in APPLETS:
        (directory / applet).symlink_to("busybox")
    return _mkfs(path, scratch, megabytes=8)


def write_overlay(path: Path) -> Path:
    """An empty disk for what the guest changes."""
    return _mkfs(path, None, megabytes=8)


def write_config(path: Path, text: str, *, scratch: Path) -> Path:
    """A disk whose config.sh says `text`."""
    scratch.mkdir(parents=True)
    (scratch / "config.sh").write_text(text)
    return _mkfs(path, scratch, megabytes=1)


def config(*command: str, environment: Iterable[str] = ("PATH=/bin",), **variables: str) -> str:
    """A config.sh that runs `command`: every value quoted twice, as a word of a list and as an assignment."""
    lists: Mapping[str, Iterable[str]] = {"ENTRYPOINT": command[:1], "CMD": command[1:], "ENVIRONMENT": environment}
    values = {name: shlex.join(words) for name, words in lists.items()} | variables
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def _mkfs(path: Path, content: Path | None, *, megabytes: int) -> Path:
    source = [] if content is None else ["-d", str(content)]
    options = ["-q", "-F", "-E", "root_owner=0:0", *source]
    subprocess.run(["mkfs.ext4", *options, str(path), f"{megabytes}M"], check=True, capture_output=True)
    return path
