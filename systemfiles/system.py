"""`SystemFiles`: the one object an instance manager holds.

Resolving reads two small records and two file stamps; everything heavier is imported by the method that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from systemfiles.bootfiles import BootFiles, InitrdFile, KernelFile
from systemfiles.content.artifacts import Artifact, Artifacts, fits
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    CatalogError,
    IncompatiblePair,
    IntegrityError,
    NotProvisioned,
    SnapshotMismatch,
    StoreError,
    SystemFilesError,
)
from systemfiles.foundation.paths import INITRD, KERNEL, KINDS, Paths, default_data_dir

if TYPE_CHECKING:
    from systemfiles.content.images import Image
    from systemfiles.foundation.catalog import Catalog
    from systemfiles.foundation.lock import Timeout
    from systemfiles.foundation.progress import Progress
    from systemfiles.provision.provisioner import Provisioner
    from systemfiles.provision.verification import Verification
    from systemfiles.registry.leases import Lease
    from systemfiles.retention.held import HeldLease
    from systemfiles.retention.holdings import Holdings
    from systemfiles.retention.keeper import Collection, Keeper
    from systemfiles.retention.pins import Pin
    from systemfiles.retention.reasons import Explanation


class DefaultVersions(NamedTuple):
    """The concrete versions that new VMs start with."""

    kernel: str
    initrd: str


class SystemFiles:
    """The kernels and initrds of one data directory, for one architecture and profile.

    With `build` false, what is neither here nor in a registry is not fetched from its origin and built; it defaults to
    the catalog's.
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
        build: bool | None = None,
    ) -> None:
        self.paths = Paths(Path(data_dir) if data_dir else default_data_dir())
        self._place = f" --data-dir {data_dir}" if data_dir else ""
        self.arch = Arch.parse(str(arch)) if arch else Arch.host()
        self.profile = profile
        self._catalog_path = Path(catalog) if catalog else None
        self._catalog: Catalog | None = None
        self._build = build
        self._artifacts = Artifacts(self.paths)

    def ensure(
        self,
        kernel: str | None = None,
        initrd: str | None = None,
        *,
        holder: str | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> BootFiles:
        """Provides a kernel and an initrd, the profile's unless named, and builds what is missing.

        With a `holder` they are leased to it, without end, before this returns: `release_all` ends that. Without one
        a collection may take them as soon as the grace period is over.
        `timeout` is how long, in seconds, to wait at most each time that another process is at it. `progress` is called
        as (subject, bytes done, bytes in all or None).
        Raises UnknownVersion, UnsupportedArch, VersionConflict, IncompatiblePair, SourceError, IntegrityError,
        InvalidKernel, StoreError.
        """
        from systemfiles.provision.site import despite_collections

        kernel, initrd = self._names(kernel, initrd)
        provisioner = self.provisioner(progress=progress, timeout=timeout)
        provisioner.require_known(kernel, initrd, self.arch)
        provisioner.rolling.resolve([kernel], [initrd], self.arch)
        return despite_collections(lambda: self._provide(provisioner, kernel, initrd, holder))

    def _provide(self, provisioner: Provisioner, kernel: str, initrd: str, holder: str | None) -> BootFiles:
        booted = provisioner.kernels.provide(kernel, self.arch)
        root = provisioner.initrds.provide(initrd, booted.artifact, self.arch)
        self._note(provisioner, kernel, initrd)
        made = [each.artifact for each in (booted, root) if each.note]
        if made or holder is not None:
            self.holdings.provided(made, [booted.artifact, root.artifact], holder)
        return _boot_files(booted.artifact, root.artifact)

    def _note(self, provisioner: Provisioner, kernel: str, initrd: str) -> None:
        """Lets versions.lock say of which profiles the pair was provided, where that may be written."""
        try:
            provisioner.rolling.note(kernel, initrd, self.arch)
        except StoreError as error:
            _warn(f"versions.lock does not say that {kernel} and {initrd} are a profile's: {error.summary}")

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

    def lease(self, files: BootFiles | Mapping[str, Any], *, holder: str, ttl: float | None = None) -> HeldLease:
        """Keeps `files` (or their `to_dict()`) from being collected for `ttl` seconds, None is without end.

        To be used in a `with` block, or until `release`. Once it returns, both are there and intact.
        Raises NotProvisioned, IntegrityError, SnapshotMismatch for another content under these versions, UsageError,
        StoreError.
        """
        from systemfiles.retention.held import HeldLease

        held = files if isinstance(files, BootFiles) else BootFiles.from_dict(files)
        lease = self.holdings.registrar.hold(self._load(held), holder, ttl=ttl)
        taken = HeldLease(self.holdings.registry, lease, held)
        try:
            artifacts = self._load(held)
            _require_same(artifacts, held)
            for artifact in artifacts:
                self._artifacts.check(artifact)
        except SystemFilesError:
            with suppress(SystemFilesError):  # it may have ended
                taken.release()
            raise
        return taken

    acquire = lease

    def renew(self, lease_id: str, ttl: float | None = None) -> Lease:
        """Lets a lease end `ttl` seconds from now. Raises LeaseNotFound, for one that has ended too."""
        self.paths.require_used()
        return self.holdings.registry.leases.renew(lease_id, now=self.holdings.registry.clock(), ttl=ttl)

    def release(self, lease_id: str) -> None:
        """Ends a lease. Raises LeaseNotFound, for one that has ended too."""
        self.paths.require_used()
        self.holdings.registry.leases.release(lease_id, now=self.holdings.registry.clock())

    def release_all(self, holder: str) -> int:
        """Ends all leases of a holder, and returns how many."""
        return self.holdings.release_all(holder)

    def leases(self, holder: str | None = None) -> tuple[Lease, ...]:
        """The live leases, of everybody or of one holder, oldest first."""
        return self.holdings.leases(holder)

    def pin(
        self,
        name: str,
        files: BootFiles | Mapping[str, Any],
        *,
        hypervisor: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Pin:
        """Holds `files` (or their `to_dict()`) under `name` until `unpin`, whatever becomes of the registry.

        The same once more changes nothing; for anything else under that name it raises SnapshotMismatch. Raises
        NotProvisioned, IntegrityError, UsageError, StoreError.
        """
        held = files if isinstance(files, BootFiles) else BootFiles.from_dict(files)
        artifacts = self._load(held)
        _require_same(artifacts, held)
        return self.holdings.pin(name, artifacts, hypervisor=hypervisor, labels=labels or {})

    def unpin(self, name: str) -> None:
        """Ends a pin. Raises PinNotFound."""
        self.holdings.unpin(name)

    def pins(self) -> tuple[Pin, ...]:
        """All pins, by name. Raises StoreError for a damaged one."""
        return tuple(self.holdings.pins)

    def restore(
        self, pinned: str | Mapping[str, Any], *, hypervisor: str | None = None, full: bool = False
    ) -> BootFiles:
        """The files that a pin, or a stored `BootFiles.to_dict()`, names: exactly these bytes, or a typed error.

        What is gone or damaged is brought back: from the content store, a registry, or its origin. While both are
        intact nothing else is looked at. `full` reads every byte. `hypervisor` must be the one on record, and a record
        has one when its caller added "hypervisor" to it.
        Raises SnapshotMismatch, which says what differs, PinNotFound, SourceUnavailable, UsageError, StoreError;
        CatalogError when something is to be brought back.
        """
        from systemfiles.retention.pins import Pins
        from systemfiles.retention.restoring import restore

        pins = Pins(self.paths)
        return _boot_files(*restore(pinned, pins, self._artifacts, self.provisioner, hypervisor=hypervisor, full=full))

    def collect(
        self,
        *,
        dry_run: bool = False,
        grace: int | None = None,
        keep_last: int | None = None,
        max_cache_bytes: int | None = None,
        accept_lost_leases: bool = False,
    ) -> Collection:
        """Removes what nothing holds: no lease, no pin, no profile, and no use within `grace` seconds.

        `dry_run` only tells, and changes nothing at all. The limits are the catalog's [retention] unless given.
        Raises LeasesLost, and StoreError or CatalogError when it cannot be told what is held; then nothing is removed.
        """
        rules = self.keeper.rules(self.catalog, grace=grace, keep_last=keep_last, max_cache_bytes=max_cache_bytes)
        return self.keeper.collect(
            self.provisioner(), self.catalog, rules, dry_run=dry_run, accept_lost_leases=accept_lost_leases
        )

    def explain(
        self, subject: str, *, grace: int | None = None, keep_last: int | None = None
    ) -> tuple[Explanation, ...]:
        """Why everything that `subject` names (a version, a digest, a pin, an asset, a name in the content store) is
        kept or would go, by the limits of `collect`. Raises UsageError when nothing here is called that."""
        rules = self.keeper.rules(self.catalog, grace=grace, keep_last=keep_last)
        return self.keeper.explain(subject, self.catalog, rules)

    def usage(self) -> tuple[list[dict[str, str | int]], int]:
        """What takes space here and why it is kept, as rows (`size` in bytes); and all bytes, shared ones once."""
        return self.keeper.usage(self.catalog)

    @cached_property
    def holdings(self) -> Holdings:
        """Who holds what in this data directory."""
        from systemfiles.retention.holdings import Holdings

        return Holdings(self.paths, self._artifacts)

    @cached_property
    def keeper(self) -> Keeper:
        """What is kept in this data directory, and why."""
        from systemfiles.retention.keeper import Keeper

        return Keeper(self.holdings)

    def add_kernel(self, path: Path | str, version: str) -> KernelFile:
        """Takes a local kernel file in as `version`. Raises InvalidKernel, VersionConflict, UsageError, StoreError."""
        return _kernel_file(self.provisioner().kernels.add(Path(path), version, self.arch).artifact)

    def image(self, name: str, *, progress: Progress | None = None, timeout: float | None = None) -> Image:
        """An image for guests from the content store: by its name or digest there (`sha256:…`), or by its reference.

        One that is not there is pulled when `name` is a full reference, the registry's host in it; with a digest it is
        exactly that image. The blobs must be there with their sizes; the manifest's and the config's digests are
        compared. `progress` and `timeout` as in `ensure`.
        Raises NotProvisioned, SourceError, IntegrityError, LockTimeout, StoreError.
        """
        from systemfiles.content.images import find_image

        try:
            image = find_image(self.paths, name, self.arch)
        except IntegrityError:
            image = None  # what can be pulled again is
        if image is None:
            image = self.provisioner(progress=progress, timeout=timeout).images.image(name, self.arch)
        self.holdings.used(image.digest)
        return image

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
        from systemfiles.provision.verification import verify, verify_and_repair

        if not repair:
            return verify(self.paths, self._artifacts)
        return verify_and_repair(self.paths, self._artifacts, self.provisioner(progress=progress), self.catalog)

    @property
    def catalog(self) -> Catalog:
        """The catalog with its overlays, read once. Raises CatalogError."""
        if self._catalog is None:
            from systemfiles.foundation.catalog import load_catalog

            catalog = load_catalog(self._catalog_path)
            self._catalog = catalog if self._build is None else catalog.model_copy(update={"build": self._build})
        return self._catalog

    def provisioner(self, *, progress: Progress | None = None, timeout: Timeout = None) -> Provisioner:
        """What makes artifacts in this data directory; the task graph and `ensure` share it."""
        from systemfiles.foundation.progress import silent
        from systemfiles.provision.provisioner import Provisioner

        return Provisioner(self.paths, self.catalog, self._artifacts, progress=progress or silent, timeout=timeout)

    def _load(self, files: BootFiles) -> list[Artifact]:
        load = self._artifacts.load
        return [
            load(KERNEL, files.kernel.version, files.kernel.arch),
            load(INITRD, files.initrd.version, files.initrd.arch),
        ]

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


def _require_same(artifacts: list[Artifact], files: BootFiles) -> None:
    """Raises SnapshotMismatch when one of the versions has another content here than `files` says."""
    kernel, initrd = artifacts
    facts = {
        KERNEL: (files.kernel.sha256, kernel.files[kernel.file].sha256),
        INITRD: (files.initrd.content_sha256, str(initrd.record["content_sha256"])),
    }
    if differences := {what: pair for what, pair in facts.items() if pair[0] != pair[1]}:
        subject = "the record of boot files"
        raise SnapshotMismatch(subject, differences=differences)


def _boot_files(kernel: Artifact, initrd: Artifact) -> BootFiles:
    return BootFiles(_kernel_file(kernel), _initrd_file(initrd))


def _kernel_file(kernel: Artifact) -> KernelFile:
    return KernelFile(*_facts(kernel))


def _initrd_file(initrd: Artifact) -> InitrdFile:
    return InitrdFile(*_facts(initrd), str(initrd.record["content_sha256"]))


def _facts(artifact: Artifact) -> tuple[Path, str, Arch, str, int]:
    facts = artifact.files[artifact.file]
    return artifact.path, artifact.version, artifact.arch, facts.sha256, facts.size
