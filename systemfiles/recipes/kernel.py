"""Kernels: any source a kernel comes in → the file a VMM boots, and the modules that initrds may take.

A modular kernel's modules.tar holds `lib/modules/<release>/…` as uncompressed POSIX tar, the same bytes for the same
package: depmod's text indexes first, made here because packages leave them to the host, then every module by name.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.bzimage import DEFAULT_LIMITS
from systemfiles.foundation.deb import DebFile, is_deb, read_deb
from systemfiles.foundation.errors import InvalidArchive, InvalidKernel
from systemfiles.foundation.kernelimage import KernelImage, bootable_form
from systemfiles.recipes.kmod import ModuleIndex, build_index
from systemfiles.recipes.modinfo import MODULE_MAX, Modinfo, read_modinfo, unpack_module
from systemfiles.recipes.tars import read_member

_MODULES = ("lib/modules/", "usr/lib/modules/")
_ORDINARY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+~@,=-]*")
_MODULE = re.compile(r"(?:usr/)?lib/modules/(?P<release>[^/]+)/(?P<path>kernel/.+\.ko(?:\.[a-z]+)?)")
_BUILTIN = re.compile(r"(?:usr/)?lib/modules/[^/]+/modules\.builtin")
_INDEX = re.compile(r"lib/modules/(?P<release>[^/]+)/(?P<name>[^/]+)")
_BUILTIN_MAX = 4 << 20  # bytes; distributions have some 20 KiB
_IMAGE = re.compile(r"boot/vmlinu[xz]-[^/]+")


@dataclass(frozen=True, slots=True)
class KernelBuild:
    """A finished kernel in a working directory: the boot file, what it is, and the modules of a modular one."""

    path: Path
    image: KernelImage
    modules: Path | None = None
    release: str | None = None


def build_kernel(source: Path, work: Path, arch: Arch) -> KernelBuild:
    """The kernel in `source`: a vmlinux, bzImage, Image, Image.gz, or a distribution's package with one.

    What had to be unpacked is in `work`. Raises InvalidKernel, InvalidArchive, ToolMissing.
    """
    return (_from_package if is_deb(source) else _from_image)(source, work, arch)


def _from_image(source: Path, work: Path, arch: Arch) -> KernelBuild:
    path, image = bootable_form(source, work / arch.kernel_file, arch)
    return KernelBuild(path, image)


def _from_package(package: Path, work: Path, arch: Arch) -> KernelBuild:
    image = work / "image"
    modules = _ModuleSpool(work / "modules.spool")
    builtin = ""
    for member in read_deb(package):
        if member.path.startswith(_MODULES) and not all(map(_ORDINARY.fullmatch, member.path.split("/"))):
            raise InvalidArchive(package, f"it has a module under the name {member.path!r:.200}")
        if match := _MODULE.fullmatch(member.path):
            modules.add(match["release"], match["path"], member)
        elif _BUILTIN.fullmatch(member.path):
            builtin = _text(member, package)
        elif _IMAGE.fullmatch(member.path):
            if member.size > (most := DEFAULT_LIMITS.max_size):
                raise InvalidArchive(package, f"its kernel has {member.size} bytes; at most {most} are read")
            _write(image, member.blocks())
    if not image.exists():
        raise InvalidKernel(package, expected="a kernel package", found="a package without /boot/vmlinuz-…")
    build = _from_image(image, work, arch)
    if modules.release is None:
        return build
    index = build_index(modules.release, modules.modinfos, builtin)
    modules.write_tar(work / "modules.tar", index)
    return KernelBuild(build.path, build.image, work / "modules.tar", modules.release)


def _text(member: DebFile, package: Path) -> str:
    if member.size > _BUILTIN_MAX:
        raise InvalidArchive(package, f"its modules.builtin has {member.size} bytes; at most {_BUILTIN_MAX} are read")
    try:
        return member.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidArchive(package, f"its modules.builtin is no text ({error.reason})") from error


class _ModuleSpool:
    """Modules in the order they come, kept in one file until all names are known and can be sorted."""

    def __init__(self, path: Path) -> None:
        self.release: str | None = None
        self.modinfos: dict[str, Modinfo] = {}
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0

    def add(self, release: str, path: str, member: DebFile) -> None:
        if self.release not in (None, release):
            raise InvalidKernel(path, expected=f"modules of {self.release}", found=f"modules of {release}")
        self.release = release
        if member.size > MODULE_MAX:
            raise InvalidArchive(path, f"a module of {member.size} bytes; at most {MODULE_MAX} are read")
        # stored plain: an initrd is compressed as a whole, and busybox's modprobe reads no .zst
        data = unpack_module(member.read(), name=path)
        path = path[: path.index(".ko")] + ".ko"
        self.modinfos[path] = read_modinfo(data, name=path)
        with self._path.open("ab") as spool:
            spool.write(data)
        self._places[path] = (self._end, len(data))
        self._end += len(data)

    def write_tar(self, target: Path, index: ModuleIndex) -> None:
        root = f"lib/modules/{self.release}"
        with self._path.open("rb") as spool, tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, text in sorted(index.files().items()):
                tar.addfile(_member(f"{root}/{name}", len(text.encode())), io.BytesIO(text.encode()))
            for path, (offset, size) in sorted(self._places.items()):
                spool.seek(offset)
                tar.addfile(_member(f"{root}/{path}", size), spool)


def read_index(tar: tarfile.TarFile) -> tuple[str, ModuleIndex]:
    """The release and the module index at the beginning of a modules.tar. Raises InvalidArchive, and as tarfile."""
    texts: dict[str, str] = {}
    release = ""
    while (member := tar.next()) and not member.name.endswith(".ko"):
        if not (match := _INDEX.fullmatch(member.name)):
            raise InvalidArchive(tar.name, f"it has {member.name!r:.200} where its index should be")
        release = match["release"]
        texts[match["name"]] = read_member(tar, member).decode()
    return release, ModuleIndex.parse(texts)


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info


def _write(path: Path, blocks: Iterator[bytes]) -> None:
    with path.open("wb") as out:
        for block in blocks:
            out.write(block)
