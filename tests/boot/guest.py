"""A guest's three disks, as the head of the init script describes them: small ext4s, made without privilege."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path

APPLETS = ("cat", "echo", "env", "grep", "kill", "printf", "readlink", "sh", "sleep", "true")


def write_rootfs(path: Path, busybox: bytes) -> Path:
    """A root file system with nothing but a static busybox and links for some of its applets."""
    tree = _tree(path)
    (tree / "bin").mkdir()
    program = tree / "bin" / "busybox"
    program.write_bytes(busybox)
    program.chmod(0o755)
    for applet in APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    return _mkfs(path, tree, size="8M")


def write_overlay(path: Path) -> Path:
    """An empty disk for what the guest writes."""
    return _mkfs(path, _tree(path), size="8M")


def write_config(path: Path, text: str) -> Path:
    """A disk with `text` for its config.sh."""
    tree = _tree(path)
    (tree / "config.sh").write_text(text, encoding="utf-8")
    return _mkfs(path, tree, size="1M")


def command(*words: str, environment: Iterable[str] = ("PATH=/bin",)) -> str:
    """A config.sh that runs `words`: each is quoted as a word of a list, and the list as an assignment's value."""
    lists = {"ENTRYPOINT": words[:1], "CMD": words[1:], "ENVIRONMENT": tuple(environment)}
    return "".join(f"{name}={shlex.quote(shlex.join(words))}\n" for name, words in lists.items())


def _tree(path: Path) -> Path:
    tree = path.with_name(f"{path.name}.tree")
    tree.mkdir()
    return tree


def _mkfs(path: Path, tree: Path, *, size: str) -> Path:
    options = ["-q", "-F", "-E", "root_owner=0:0", "-d", str(tree)]
    subprocess.run(["mkfs.ext4", *options, str(path), size], check=True, capture_output=True)
    return path
