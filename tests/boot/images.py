"""Images that others made: Debian as debootstrap makes it, the same with systemd, and a program with nothing beside it.

umoci packs them as Debian's packages leave them on a disk. They come into a content store by skopeo or from a registry,
and their disks are made by the command line.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from systemfiles.sources.apt import apt_proxies
from tests.conftest import CHECKOUT

from .qemu import Q35, VIRT, Machine

HERE: Machine = {"x86_64": Q35, "aarch64": VIRT}[os.uname().machine]
"""Runs what was made on this host."""

STATIC = Path("/sbin/ldconfig")
"""A program that needs nothing beside itself on any Debian, as it is what repairs the libraries of the others."""

# Prints what became of the boot, and ends it. It does not count as a part of the boot, for whose end it waits.
_REPORT = r"""[Unit]
Description=Report on this boot, and end it
[Service]
Type=exec
StandardOutput=tty
TTYPath=/dev/console
ExecStart=/bin/sh -c 'echo "state $(systemctl is-system-running --wait)"; \
    systemctl --failed --plain --no-legend | sed "s/^/failed /"; \
    findmnt -rno TARGET,FSTYPE,OPTIONS | sed "s/^/mounted /"; \
    journalctl -b -p err -o cat --no-pager | sed "s/^/journal /"; \
    cat /kept 2>/dev/null; echo "kept from $(hostname)" >/kept; echo "variable $GREETING"; \
    systemctl poweroff'
PassEnvironment=GREETING
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Images:
    """An OCI image layout with the images `debian`, `systemd` and `static`."""

    layout: Path
    mirror: str
    """Where Debian came from."""

    @property
    def mirror_host(self) -> str:
        return urlsplit(self.mirror).hostname or ""


@dataclass(frozen=True)
class Workspace:
    """A data directory into which images come, and the place of the disks that are made from them."""

    data_dir: Path
    directory: Path

    def systemfiles(self, *words: str | Path) -> str:
        return _run(sys.executable, "-m", "systemfiles.cli", *words, SYSTEMFILES_DATA_DIR=str(self.data_dir))

    def copy_in(self, images: Images, name: str) -> None:
        there = f"oci:{self.data_dir}/system/oci-cache:{name}"
        self.systemfiles("lock", "--", "skopeo", "copy", "--quiet", f"oci:{images.layout}:{name}", there)

    def disks(self, image: str, *config: str, format: str = "ext4") -> dict[str, Path]:
        """The three of a guest, with `config` for options and words of its config disk."""
        paths = {name: self.directory / name for name in ("rootfs", "overlay", "config")}
        paths["overlay"].unlink(missing_ok=True)
        self.systemfiles("disk", "rootfs", image, paths["rootfs"], "--format", format)
        self.systemfiles("disk", "overlay", paths["overlay"], "--size", "256M")
        self.systemfiles("disk", "config", paths["config"], "--image", image, *config)
        return paths


def make(directory: Path) -> Images:
    """Makes all of them, which takes root, Debian's archive, and 40 s or so."""
    images = Images(directory / "layout", _mirror())
    _run("umoci", "init", "--layout", images.layout)
    static = _Bundle(images.layout, directory / "static")
    static.add("ldconfig", STATIC.read_bytes(), mode=0o755)
    static.save("static", "--config.entrypoint=/ldconfig", "--config.cmd=--version")

    debian = _Bundle(images.layout, directory / "debian")
    suite = _os_release()["VERSION_CODENAME"]
    _run("debootstrap", "--variant=minbase", suite, debian.root, images.mirror, **_proxies())
    debian.chroot("apt-get", "clean")
    debian.save("debian", "--config.cmd=/bin/bash")

    debian.chroot("apt-get", "install", "-y", "-q", "--no-install-recommends", "systemd-sysv", "udev")
    debian.chroot("apt-get", "clean")
    debian.save("installed", "--config.cmd=/sbin/init")
    debian.add("etc/systemd/system/report.service", _REPORT.encode(), mode=0o644)
    debian.chroot("systemctl", "enable", "report.service")
    debian.save("systemd", "--config.cmd=/sbin/init", "--config.env=GREETING=hello from the image")
    for bundle in (static, debian):
        _run("rm", "-rf", "--one-file-system", bundle.directory)
    return images


class _Bundle:
    """A directory that becomes images: each `save` adds a layer with what is new since the last one."""

    def __init__(self, layout: Path, directory: Path) -> None:
        self._layout = layout
        self.directory = directory
        self.root = directory / "rootfs"
        empty = f"{layout}:{directory.name}-empty"
        _run("umoci", "new", "--image", empty)
        _run("umoci", "unpack", "--image", empty, directory)

    def add(self, name: str, content: bytes, *, mode: int) -> None:
        path = self.root / name
        path.write_bytes(content)
        path.chmod(mode)

    def chroot(self, *words: str) -> None:
        _run("chroot", self.root, *words, DEBIAN_FRONTEND="noninteractive", **_proxies())

    def save(self, name: str, *config: str) -> None:
        image = f"{self._layout}:{name}"
        _run("umoci", "repack", "--refresh-bundle", "--image", image, self.directory)
        _run("umoci", "config", "--image", image, *config)


def _mirror() -> str:
    """Where the host's apt gets its own suite from."""
    wanted = _os_release()["VERSION_CODENAME"]
    words = ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(SITE)", "Created-By: Packages"]
    found = [line.split() for line in _run(*words).splitlines()]
    return next(site for release, component, site in found if (release, component) == (wanted, "main"))


def _os_release() -> Mapping[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def _proxies() -> dict[str, str]:
    return {f"{scheme}_proxy": proxy for scheme, proxy in apt_proxies().items() if proxy}


def _run(*command: str | Path, **environ: str) -> str:
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env={**os.environ, "LC_ALL": "C.UTF-8", **environ},
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout[-3000:]}"
    return done.stdout
