"""The one place that joins catalog, sources, recipes and content store for one data directory."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from systemfiles.content.artifacts import Artifacts
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.store import Store
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import Catalog, Initrd, Kernel
from systemfiles.foundation.errors import IntegrityError, UnknownVersion
from systemfiles.foundation.files import write_file
from systemfiles.foundation.lock import Timeout, locked
from systemfiles.foundation.lockfile import PackagePin
from systemfiles.foundation.paths import INITRD, KERNEL, KINDS, Paths, check_version
from systemfiles.foundation.progress import Progress, silent
from systemfiles.provision.images import Images
from systemfiles.provision.initrds import Initrds
from systemfiles.provision.kernels import Kernels
from systemfiles.provision.published import Published
from systemfiles.provision.rolling import Move, Rolling
from systemfiles.provision.site import Made, Site, despite_collections

log = logging.getLogger(__name__)


class Provisioner:
    """Provides the artifacts of one catalog in one data directory. Safe to share among threads and processes."""

    def __init__(
        self,
        paths: Paths,
        catalog: Catalog,
        artifacts: Artifacts,
        *,
        progress: Progress = silent,
        timeout: Timeout = None,
    ) -> None:
        self.rolling = Rolling(paths, catalog, timeout=timeout)
        self.store = Store(paths, artifacts, timeout=timeout)
        self._site = site = Site(paths, catalog, self.store, self.rolling, progress, timeout)
        self.images = Images(site)
        self.published = Published(site, self.images)
        self.kernels = Kernels(site, self.published)
        self.initrds = Initrds(site, self.images, self.published)
        self._paths = paths
        self._catalog = catalog
        self._timeout = timeout

    def require_known(self, kernel: str, initrd: str | None, arch: Arch) -> None:
        """Refuses a name that neither catalog, nor lock, nor disk has, before any work is done for the other.

        Raises InvalidName, UnknownVersion, UnsupportedArch.
        """
        lock = self.rolling.read()
        self._require_known(KERNEL, kernel, arch, self._catalog.kernel, lock.kernel)
        if initrd is not None:
            self._require_known(INITRD, initrd, arch, self._catalog.initrd, lock.initrd)

    def _require_known(
        self,
        kind: str,
        name: str,
        arch: Arch,
        offered: Mapping[str, Kernel | Initrd],
        pinned: Mapping[str, Mapping[Arch, object]],
    ) -> None:
        check_version(kind, name)
        entry = offered.get(name)
        if entry is not None and (isinstance(entry, Initrd) or arch in entry.arches):
            return
        # what is here counts whatever the catalog says: a version that a newer one dropped is still provided
        if arch in pinned.get(name, {}) or self.store.holds(kind, name, arch):
            return
        if entry is None and (self._catalog.registries or not self.builds):
            return  # a registry may have it, or it is told that there is none
        if entry is not None:
            self._catalog.find_kernel(name, arch)
        there = [version for version, found in self.store.artifacts.versions(kind) if found is arch]
        raise UnknownVersion(kind, name, known=sorted({*offered, *pinned, *there}))

    def provide(
        self, kernel: str, initrds: Collection[str], arch: Arch, *, newer: Mapping[str, PackagePin] | None = None
    ) -> tuple[Made, ...]:
        """A kernel and initrds that go with it, whatever collections take meanwhile; in this order.

        `newer` as in `Initrds.provide`. Raises as that and `Kernels.provide`.
        """

        def provide_all() -> tuple[Made, ...]:
            booted = self.kernels.provide(kernel, arch)
            return booted, *(self.initrds.provide(name, booted.artifact, arch, newer=newer) for name in initrds)

        return despite_collections(provide_all)

    def update(self, kernel: str, initrd: str | None, arch: Arch) -> tuple[Move, ...]:
        """Moves the rolling names among these to what apt has now, once all of that is provisioned."""
        # from asking to settling, so that an older answer never follows a newer one
        with self.rolling.asking():
            return self._update(kernel, [initrd] if initrd else [], arch)

    def _update(self, kernel: str, wanted: Sequence[str], arch: Arch) -> tuple[Move, ...]:
        resolved = self.rolling.newest([kernel], wanted, arch)
        version = resolved.kernels[kernel][0] if kernel in resolved.kernels else kernel
        before = self.rolling.concrete_kernel(kernel, arch)
        initrds = dict.fromkeys([*wanted, *self._initrds_beside(kernel, before, arch)])
        self.provide(version, initrds, arch, newer=resolved.busyboxes)
        moves = self.rolling.settle(resolved, arch)
        with self.store.layout.exclusively():
            pass  # a collection that has looked into versions.lock before that has removed what it will
        self.provide(version, initrds, arch, newer=resolved.busyboxes)
        return moves

    def _initrds_beside(self, kernel: str, version: str | None, arch: Arch) -> Iterator[str]:
        """Initrds of other profiles that were provided here for a kernel that is about to move."""
        lock = self.rolling.read()
        for profile in self._catalog.profile.values():
            if version and profile.kernel == kernel and lock.current_initrd(profile.initrd, version, arch):
                yield profile.initrd

    def write_manifest(self) -> int:
        """Brings SHA256SUMS and our names in index.json up to date; returns how many files are listed."""
        self._site.sweep()
        self.store.reassert()
        with locked(self._paths.lock("SHA256SUMS"), timeout=self._timeout):
            data = self._manifest()
            write_file(self._paths.sha256sums, data, scratch=self._paths.tmp, mode=0o644)
        return data.count(b"\n")

    def recover(self, kind: str, version: str, arch: Arch) -> bool:
        """Whether this version is whole, perhaps because it was written again from the content store just now."""
        with self._site.locked(kind, version, arch):
            kept = self.store.kept(kind, version, arch, None) or self.store.recover(kind, version, arch, None)
            return kept is not None

    def put_together(self, record: Mapping[str, Any], files: Mapping[str, Descriptor]) -> None:
        """Writes an artifact from blobs that are in the content store. Raises VersionConflict, StoreError."""
        with self._site.locked(record["kind"], record["version"], Arch.parse(record["arch"])):
            self.store.put(record, files)

    @property
    def registries(self) -> tuple[str, ...]:
        """Where artifacts that were published may be had, best first."""
        return self._catalog.registries

    @property
    def builds(self) -> bool:
        """Whether what is neither here nor published may be fetched from its origin and built."""
        return self._catalog.build is not False

    def sweep(self) -> None:
        """Removes what killed processes left in the data directory."""
        self._site.sweep()

    def manifest_is_current(self) -> bool:
        """Whether `write_manifest` would change nothing."""
        try:
            return self._paths.sha256sums.read_bytes() == self._manifest() and self.store.is_asserted()
        except OSError:
            return False

    def _manifest(self) -> bytes:
        lines = []
        for kind in KINDS:
            for version, arch in self.store.artifacts.versions(kind):
                try:
                    artifact = self.store.artifacts.load(kind, version, arch)
                except IntegrityError as error:
                    log.warning("%s %s is left out of SHA256SUMS: %s", kind, version, error.summary)
                    continue
                lines += [f"{line}\n" for line in artifact.sums]
        return "".join(lines).encode()
