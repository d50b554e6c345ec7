"""Kernels: kept when they are intact, recovered from the content store, published, or made from an origin."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from systemfiles.content.artifacts import MODULES, Artifact, boot_file
from systemfiles.content.descriptors import BLOB
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import KernelFile
from systemfiles.foundation.digest import CHUNK, Digest
from systemfiles.foundation.errors import UnknownVersion, UsageError, blaming
from systemfiles.foundation.files import NewFile, scratch_dir, storing
from systemfiles.foundation.lockfile import PackagePin
from systemfiles.foundation.paths import KERNEL, check_version
from systemfiles.foundation.units import human_size
from systemfiles.provision.published import Published
from systemfiles.provision.site import FORGOTTEN, MIRRORS, RECOVERED, Made, Site, new_record
from systemfiles.recipes.kernel import KernelBuild, build_kernel


class Kernels:
    """Provides kernels. Safe to share among threads and processes."""

    def __init__(self, site: Site, published: Published) -> None:
        self._site = site
        self._published = published

    def kept(self, name: str, arch: Arch) -> Artifact | None:
        """The kernel called `name` when nothing is to do for it. Raises VersionConflict."""
        version = self._site.rolling.concrete_kernel(name, arch)
        if version is None:
            return None
        return self._site.store.kept(KERNEL, version, arch, _inputs(self.source(version, arch)))

    def provide(self, name: str, arch: Arch) -> Made:
        """The kernel called `name`, a concrete or a rolling one, intact on disk.

        Raises UnknownVersion, UnsupportedArch, VersionConflict, SourceError, IntegrityError, InvalidKernel, StoreError.
        """
        self._site.rolling.resolve([name], [], arch)
        if kept := self.kept(name, arch):
            return Made(kept, "")
        version = self._site.rolling.concrete_kernel(name, arch) or name
        source = self.source(version, arch)
        inputs = _inputs(source)
        with self._site.locked(KERNEL, version, arch):
            if kept := self._site.store.kept(KERNEL, version, arch, inputs):
                return Made(kept, "")
            if recovered := self._site.store.recover(KERNEL, version, arch, inputs):
                return Made(recovered, RECOVERED)
            if taken := self._published.take(KERNEL, version, arch, inputs):
                return taken
            if source is None:
                self._site.catalog.find_kernel(version, arch)
                raise UnknownVersion(KERNEL, version, known=self._site.catalog.kernel)
            return self._make(version, arch, source)

    def make(self, version: str, arch: Arch, source: KernelFile | PackagePin) -> None:
        """Makes this version from `source` again, whatever catalog and versions.lock say. Raises as `provide`."""
        with self._site.locked(KERNEL, version, arch):
            if not self._site.store.kept(KERNEL, version, arch, None):  # who waited here finds it made
                self._make(version, arch, source)

    def add(self, path: Path, version: str, arch: Arch) -> Made:
        """Takes the local kernel file at `path` in as `version`; the same file again is fine.

        Raises InvalidKernel, VersionConflict, UsageError for a name of the catalog, StoreError.
        """
        check_version(KERNEL, version)
        if version in self._site.catalog.kernel:
            msg = f"{version} is a name of the catalog already"
            raise UsageError(msg, hint="choose another --version")
        if not path.is_file():
            msg = f"{path} is not a file"
            raise UsageError(msg, hint="give the path of a kernel")
        with self._site.locked(KERNEL, version, arch), self._site.store.layout.new_file() as source:
            _read_into(source, path)
            inputs = {"sha256": source.digest().hex}
            if kept := self._site.store.kept(KERNEL, version, arch, inputs):
                return Made(kept, "")
            if recovered := self._site.store.recover(KERNEL, version, arch, inputs):
                return Made(recovered, RECOVERED)
            with scratch_dir(self._site.paths.tmp) as work:
                with blaming(path), storing(work):
                    build = build_kernel(source.path, work, arch)
                return self._put(version, arch, build, source, inputs, {"added_from": path.name})

    def source(self, version: str, arch: Arch) -> KernelFile | PackagePin | None:
        """Where a concrete kernel comes from; None when only the disk knows it. Raises CatalogError."""
        if version in self._site.catalog.kernel and not self._site.catalog.kernel[version].rolling:
            return self._site.catalog.kernel[version].files.get(arch)
        return self._site.rolling.read().kernel.get(version, {}).get(arch)

    def _make(self, version: str, arch: Arch, source: KernelFile | PackagePin) -> Made:
        from systemfiles.sources.apt import apt_proxies
        from systemfiles.sources.http import fetch  # 100 ms for `requests`, and most runs fetch nothing

        subject = f"kernel {version} ({arch})"
        started = time.monotonic()
        with self._site.store.layout.new_file() as new, scratch_dir(self._site.paths.tmp) as work:
            package = isinstance(source, PackagePin)
            url = fetch(
                source.url,
                new,
                subject=subject,
                digest=Digest.from_hex(source.sha256),
                size=source.size,
                mirrors=self._site.catalog.mirrors,
                proxies=apt_proxies() if package else None,
                hint=FORGOTTEN if package else MIRRORS,
                progress=self._site.progress,
            )
            fetched = f"{human_size(new.size)} fetched and verified in {time.monotonic() - started:.1f} s"
            with blaming(url), storing(work):
                build = build_kernel(new.path, work, arch)
            origin = source.model_dump(exclude_none=True)
            made = self._put(version, arch, build, new, _inputs(source) or {}, origin)
        return Made(made.artifact, f"{fetched} → {made.note}")

    def _put(
        self,
        version: str,
        arch: Arch,
        build: KernelBuild,
        source: NewFile,
        inputs: Mapping[str, Any],
        origin: Mapping[str, Any],
    ) -> Made:
        layout = self._site.store.layout
        boot = layout.add(source, BLOB) if build.path == source.path else layout.add_path(build.path, BLOB)
        files = {boot_file(KERNEL, arch): boot}
        if build.modules is not None:
            files[MODULES] = layout.add_path(build.modules, BLOB)
        record = {
            **new_record(KERNEL, version, arch, files, inputs),
            "source": dict(origin),
            "facts": {"format": build.image.format, **dict(build.image.facts)},
            **({"release": build.release} if build.release else {}),
        }
        artifact = self._site.store.put(record, files)
        checked = "PVH entry ok" if arch is Arch.X86_64 else "arm64 header ok"
        return Made(artifact, f"{artifact.file} {human_size(boot.size)}, {checked}")


def source_on_record(record: Mapping[str, Any]) -> KernelFile | PackagePin | None:
    """Where a kernel came from by its own record; None when that is a local file, or is not told."""
    origin = record.get("source")
    model = PackagePin if isinstance(origin, Mapping) and "package" in origin else KernelFile
    try:
        return model.model_validate(origin)
    except ValidationError:
        return None


def _read_into(new: NewFile, path: Path) -> None:
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                new.write(chunk)
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror})"
        raise UsageError(msg, hint="give the path of a kernel file") from error


def _inputs(source: KernelFile | PackagePin | None) -> dict[str, Any] | None:
    if isinstance(source, PackagePin):
        return source.inputs
    return {"sha256": source.sha256} if source else None
