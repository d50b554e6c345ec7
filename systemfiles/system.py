"""`SystemFiles`: the one object an instance manager holds.

Resolving reads two small records and two file stamps; everything heavier is imported by the method that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from systemfiles.bootfiles import BootFiles, InitrdFile, KernelFile
from systemfiles.content.artifacts import Artifact, Artifacts, fits
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    CatalogError,
    IncompatiblePair,
    IntegrityError,
    NotProvisioned,
    StoreError,
    SystemFilesError,
)
from systemfiles.foundation.paths import INITRD, KERNEL, KINDS, Paths, default_data_dir

if TYPE_CHECKING:
    from systemfiles.foundation.catalog import Catalog
    from systemfiles.foundation.lock import Timeout
    from systemfiles.foundation.progress import Progress
    from systemfiles.provision.provisioner import Provisioner


class DefaultVersions(NamedTuple):
    """The concrete versions that new VMs start with."""

    kernel: str
    initrd: str


class Verification(NamedTuple):
    """How many artifacts were read in full, all that is wrong with them or with the content store, and what was mended.

    After a repair that could not mend everything, `problems` says why as well.
    """

    artifacts: int
    problems: tuple[SystemFilesError, ...]
    repaired: tuple[SystemFilesError, ...] = ()


class SystemFiles:
    """The kernels and initrds of one data directory, for one architecture and profile.

    `data_dir` defaults to $SYSTEMFILES_DATA_DIR, else /var/lib/systemfiles for root, else the user's data directory;
    `catalog` is a file laid over the shipped versions.toml; `profile` and `arch` default to the catalog's and the
    host's.
    Constructing it does no I/O. Safe to share among threads.
    """

    def __init__(
        self,
        data_dir: Path | str | None = None,
        *,
        catalog: Path | str | None = None,
        profile: str | None = None,
        arch: Arch | str | None = None,
    ) -> None:
        self.paths = Paths(Path(data_dir) if data_dir else default_data_dir())
        self._place = f" --data-dir {data_dir}" if data_dir else ""
        self.arch = Arch.parse(str(arch)) if arch else Arch.host()
        self.profile = profile
        self._catalog_path = Path(catalog) if catalog else None
        self._catalog: Catalog | None = None
        self._artifacts = Artifacts(self.paths)

    def ensure(
        self,
        kernel: str | None = None,
        initrd: str | None = None,
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> BootFiles:
        """Provides a kernel and an initrd, the profile's unless named, and builds what is missing.

        `timeout` is how long, in seconds, to wait at most each time that another process is at it. `progress` is called
        as (subject, bytes done, bytes in all or None).
        Raises UnknownVersion, UnsupportedArch, VersionConflict, IncompatiblePair, SourceError, IntegrityError,
        InvalidKernel, StoreError.
        """
        kernel, initrd = self._names(kernel, initrd)
        provisioner = self.provisioner(progress=progress, timeout=timeout)
        provisioner.require_known(kernel, initrd, self.arch)
        provisioner.rolling.resolve([kernel], [initrd], self.arch)
        provided = provisioner.kernels.provide(kernel, self.arch).artifact
        return _boot_files(provided, provisioner.initrds.provide(initrd, provided, self.arch).artifact)

    def resolve(self, kernel: str | None = None, initrd: str | None = None) -> BootFiles:
        """Exactly these versions (default: `default_versions`) as they are on disk, intact.

        Offline, builds nothing, writes nothing that matters; with both names given it reads no catalog either.
        Raises NotProvisioned, IntegrityError, IncompatiblePair, InvalidName.
        """
        if kernel is None or initrd is None:
            defaults = self.default_versions()
            kernel = defaults.kernel if kernel is None else kernel
            initrd = defaults.initrd if initrd is None else initrd
        found = self._resolve(KERNEL, kernel)
        root = self._resolve(INITRD, initrd)
        if not fits(root.inputs, found):
            raise IncompatiblePair(kernel, initrd, requires=str(root.requires_kernel))
        return _boot_files(found, root)

    def kernel(self, version: str) -> KernelFile:
        """This kernel, intact. Raises as `resolve`."""
        return _kernel_file(self._resolve(KERNEL, version))

    def initrd(self, version: str) -> InitrdFile:
        """This initrd, intact. Raises as `resolve`."""
        return _initrd_file(self._resolve(INITRD, version))

    def kernel_path(self, version: str) -> Path:
        """Where this kernel is, intact. Raises as `resolve`."""
        return self.kernel(version).path

    def initrd_path(self, version: str) -> Path:
        """Where this initrd is, intact. Raises as `resolve`."""
        return self.initrd(version).path

    def default_versions(self) -> DefaultVersions:
        """What the profile's names stand for now, as concrete versions.

        Raises NotProvisioned for a rolling name that was never provisioned here.
        """
        kernel, initrd = self._names(None, None)
        provisioner = self.provisioner()
        version = provisioner.rolling.concrete_kernel(kernel, self.arch)
        if version is None:
            raise self._missing(KERNEL, kernel)
        concrete = provisioner.initrds.concrete(initrd, self._artifacts.load(KERNEL, version, self.arch), self.arch)
        if concrete is None:
            raise self._missing(INITRD, initrd)
        return DefaultVersions(version, concrete)

    def add_kernel(self, path: Path | str, version: str) -> KernelFile:
        """Takes a local kernel file in as `version`. Raises InvalidKernel, VersionConflict, UsageError, StoreError."""
        return _kernel_file(self.provisioner().kernels.add(Path(path), version, self.arch).artifact)

    def artifacts(self) -> Iterator[Artifact]:
        """Everything on disk, of every architecture, sorted; records only, files not looked at.

        A version whose record is damaged is left out, with a warning in the log.
        """
        for kind in KINDS:
            for version, arch in self._artifacts.versions(kind):
                try:
                    yield self._artifacts.load(kind, version, arch)
                except IntegrityError as error:
                    _warn(f"{kind} {version} ({arch}) is left out: {error.summary}")

    def verify(self, *, repair: bool = False, progress: Progress | None = None) -> Verification:
        """Reads every byte of every artifact and of the content store and compares it with what is on record.

        What is found damaged is hashed again by whoever uses it next, so `ensure` repairs it and `resolve` refuses it.
        With `repair` it is made again at once, under new inodes: from the content store, or from its origin.
        Raises StoreError; with `repair`, CatalogError as well.
        """
        found = self._verify()
        if not repair:
            return found
        provisioner = self.provisioner(progress=progress)
        provisioner.sweep()
        if not found.problems:
            if not provisioner.manifest_is_current():
                provisioner.write_manifest()
            return found
        from systemfiles.provision.repair import repair as make_again

        failures: list[SystemFilesError] = []
        try:
            failures += make_again(provisioner, self.catalog)
        except SystemFilesError as error:  # such as a versions.lock that cannot be read
            failures.append(error)
        left = self._verify()
        still = {str(problem) for problem in left.problems}
        repaired = tuple(problem for problem in found.problems if str(problem) not in still)
        return Verification(left.artifacts, (*left.problems, *(failures if left.problems else ())), repaired)

    def _verify(self) -> Verification:
        from systemfiles.content.store import Store

        if not self.paths.system.is_dir():
            msg = f"nothing was ever provisioned in {self.paths.data_dir}"
            raise StoreError(msg, hint="is this the right data directory? (--data-dir, $SYSTEMFILES_DATA_DIR)")
        count = 0
        problems: list[SystemFilesError] = []
        for kind in KINDS:
            for version, arch in self._artifacts.versions(kind):
                count += 1
                try:
                    problems += self._artifacts.verify(self._artifacts.load(kind, version, arch))
                except SystemFilesError as error:
                    problems.append(error)
        try:
            problems += Store(self.paths, self._artifacts).verify()
        except SystemFilesError as error:  # such as an index that cannot be read
            problems.append(error)
        problems += self._unreadable_lists()
        return Verification(count, tuple(problems))

    def _unreadable_lists(self) -> Iterator[SystemFilesError]:
        """What is wrong with versions.lock and SHA256SUMS; the latter need not know what `ensure` just made."""
        from systemfiles.foundation.lockfile import read_lock

        try:
            read_lock(self.paths.versions_lock)
        except SystemFilesError as error:
            yield error
        known = {line for artifact in self.artifacts() for line in artifact.sums}
        try:
            lines = self.paths.sha256sums.read_text(errors="replace").splitlines()
        except OSError:
            return  # it is written by the next run
        for line in lines:
            if line not in known:
                yield IntegrityError(
                    self.paths.sha256sums,
                    expected="a line for each file of each artifact",
                    got=repr(line[:100]),
                    consequence="sha256sum -c would refuse it",
                )
                return

    @property
    def catalog(self) -> Catalog:
        """The catalog with its overlays, read once. Raises CatalogError."""
        if self._catalog is None:
            from systemfiles.foundation.catalog import load_catalog

            self._catalog = load_catalog(self._catalog_path)
        return self._catalog

    def provisioner(self, *, progress: Progress | None = None, timeout: Timeout = None) -> Provisioner:
        """What makes artifacts in this data directory; the task graph and `ensure` share it."""
        from systemfiles.foundation.progress import silent
        from systemfiles.provision.provisioner import Provisioner

        return Provisioner(self.paths, self.catalog, self._artifacts, progress=progress or silent, timeout=timeout)

    def _names(self, kernel: str | None, initrd: str | None) -> tuple[str, str]:
        if kernel is not None and initrd is not None and self.profile is None:
            return kernel, initrd
        profile = self.catalog.find_profile(self.profile)
        return profile.kernel if kernel is None else kernel, profile.initrd if initrd is None else initrd

    def _resolve(self, kind: str, version: str) -> Artifact:
        try:
            artifact = self._artifacts.load(kind, version, self.arch)
            self._artifacts.check(artifact)
        except NotProvisioned as error:
            raise self._missing(kind, version, error) from None
        except IntegrityError as error:
            error.hint = f"make it again: systemfiles provision --{kind} {version} --arch {self.arch}{self._place}"
            raise
        return artifact

    def _missing(self, kind: str, name: str, error: NotProvisioned | None = None) -> NotProvisioned:
        """The error for `name`: which command provides it, or what a rolling name stands for here."""
        arch = self.arch.value
        if error is None:  # it came from the profile
            profile = f" --profile {self.profile}" if self.profile else ""
            provide = f"systemfiles provision{profile} --arch {arch}{self._place}"
            return NotProvisioned(kind, name, arch, looked_in=self.paths.kind(kind), provide=provide)
        try:
            stands_for = self.provisioner().rolling.read().stands_for(name, self.arch)
        except CatalogError:
            stands_for = ()
        return NotProvisioned(
            kind,
            name,
            arch,
            looked_in=error.looked_in,
            stands_for=", ".join(stands_for),
            provide=f"systemfiles provision --{kind} {name} --arch {arch}{self._place}",
        )


def _warn(message: str) -> None:
    import logging

    logging.getLogger(__name__).warning(message)


def _boot_files(kernel: Artifact, initrd: Artifact) -> BootFiles:
    return BootFiles(_kernel_file(kernel), _initrd_file(initrd))


def _kernel_file(kernel: Artifact) -> KernelFile:
    return KernelFile(*_facts(kernel))


def _initrd_file(initrd: Artifact) -> InitrdFile:
    return InitrdFile(*_facts(initrd), str(initrd.record["content_sha256"]))


def _facts(artifact: Artifact) -> tuple[Path, str, Arch, str, int]:
    facts = artifact.files[artifact.file]
    return artifact.path, artifact.version, artifact.arch, facts.sha256, facts.size
