"""Bringing back a kernel or an initrd that is gone or damaged, by the cheapest way that works.

It comes from the content store, from a registry, or at last from its origin, which a pin knows by itself, whatever has
become of catalog and versions.lock. What turns out to be another content is not published under its version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

from systemfiles.content.artifacts import Artifact, Artifacts
from systemfiles.content.packaging import blobs_of
from systemfiles.content.store import layout_name
from systemfiles.foundation.catalog import KernelFile
from systemfiles.foundation.errors import (
    IntegrityError,
    NoSpace,
    NotProvisioned,
    SnapshotMismatch,
    SourceUnavailable,
    SystemFilesError,
    VersionConflict,
)
from systemfiles.foundation.lockfile import InitrdPin, PackagePin
from systemfiles.foundation.paths import INITRD
from systemfiles.provision.initrdpins import pin_on_record
from systemfiles.provision.kernels import source_on_record
from systemfiles.provision.provisioner import Provisioner
from systemfiles.retention.pins import PinnedFile
from systemfiles.retention.restoring import ELSEWHERE, as_it_is, differences, identity

log = logging.getLogger(__name__)

Source = KernelFile | PackagePin | InitrdPin
Way = tuple[str, Callable[[], object]]
"""What is asked, and how: it leaves the artifact on disk, or raises."""
Tried = list[tuple[str, str]]
"""What was asked in vain, and why."""

_ORIGIN = "the origin"


class Recovery:
    """Brings back what `name` names."""

    def __init__(self, artifacts: Artifacts, provisioner: Provisioner, *, name: str, full: bool) -> None:
        self._artifacts = artifacts
        self._provisioner = provisioner
        self._name = name
        self._full = full

    def provide(self, wanted: PinnedFile, kernel: PinnedFile | None = None, *, whole: bool = False) -> Artifact:
        """The artifact with the content on record, intact; `whole` is with all its files. An initrd goes with `kernel`.

        Raises SnapshotMismatch when this version is another content here, SourceUnavailable when it is gone for good.
        """
        try:
            return as_it_is(wanted, self._artifacts, full=self._full, whole=whole)
        except (NotProvisioned, IntegrityError) as error:
            log.warning("%s is brought back: %s", _called(wanted), error.summary)
            tried = _told("the files here", error)
        store = self._provisioner.store
        for record in store.records(wanted.kind, wanted.version, wanted.arch):
            if different := differences(wanted, record):
                raise SnapshotMismatch(self._name, differences=different, hint=ELSEWHERE)
        store.promise(wanted.kind, wanted.version, wanted.arch, identity(wanted))
        sources, untold = self._sources(wanted, kernel)
        for where, way in self._ways(wanted, kernel, sources):
            try:
                way()
                artifact = as_it_is(wanted, self._artifacts, full=self._full, whole=whole)
            except NoSpace:
                raise  # whatever else there is needs room as well
            except SystemFilesError as error:
                tried += _told(where, error)
                continue
            self._tell_others()
            return artifact
        raise self._gone(wanted, [*tried, *untold], sources)

    def _ways(self, wanted: PinnedFile, kernel: PinnedFile | None, sources: list[Source]) -> Iterator[Way]:
        yield "the content store", partial(self._from_its_name, wanted)
        if wanted.record["files"]:
            yield "the blobs on record", partial(self._from_blobs, wanted)
        for registry in self._provisioner.registries:
            yield f"registry {registry}", partial(self._from_registry, wanted, registry)
        for source in sources:
            yield _ORIGIN, partial(self._from_origin, wanted, kernel, source)

    def _sources(self, wanted: PinnedFile, kernel: PinnedFile | None) -> tuple[list[Source], Tried]:
        """What it is made from: by its own record, then as catalog or versions.lock have it; and why that is all."""
        if not self._provisioner.builds:
            return [], [(_ORIGIN, "nothing is built here (build = false in the catalog)")]
        of_record = (pin_on_record if wanted.kind == INITRD else source_on_record)(wanted.record)
        found: list[Source] = [of_record] if of_record else []
        try:
            told = self._told_source(wanted, kernel)
        except SystemFilesError as error:  # such as a versions.lock that cannot be read
            return found, _told(_ORIGIN, error)
        if told and told not in found:
            found.append(told)
        return found, [] if found else [(_ORIGIN, "neither a record, nor catalog, nor versions.lock knows it")]

    def _told_source(self, wanted: PinnedFile, kernel: PinnedFile | None) -> Source | None:
        """Raises CatalogError, NotProvisioned."""
        if kernel is None:
            return self._provisioner.kernels.source(wanted.version, wanted.arch)
        booted = self._artifacts.load(kernel.kind, kernel.version, kernel.arch)
        return self._provisioner.initrds.source(wanted.version, wanted.arch, booted)

    def _from_its_name(self, wanted: PinnedFile) -> None:
        if not self._provisioner.recover(wanted.kind, wanted.version, wanted.arch):
            name = layout_name(wanted.kind, wanted.version, wanted.arch)
            found = name in self._provisioner.store.layout.names()
            index = self._provisioner.store.layout.root / "index.json"
            raise IntegrityError(
                name if found else index,
                expected="all its blobs" if found else f"an entry for {name}",
                got="some of them missing or damaged" if found else "none",
                consequence="it is of no use",
            )

    def _from_blobs(self, wanted: PinnedFile) -> None:
        """From what the content store holds under the digests on record."""
        files = blobs_of(wanted.record)
        layout = self._provisioner.store.layout
        for file in files.values():
            if not layout.intact(file.digest, file.size):
                found = "other bytes" if layout.blob(file.digest).exists() else "no file"
                raise IntegrityError(
                    layout.blob(file.digest), expected=f"{file.size} bytes", got=found, consequence="it is of no use"
                )
        self._provisioner.put_together(wanted.record, files)

    def _from_registry(self, wanted: PinnedFile, registry: str) -> None:
        promised = wanted.record if wanted.record["files"] else None  # a VM's own record tells of one file only
        reference = f"{registry}/{wanted.kind}:{wanted.version}"
        self._provisioner.published.recover(reference, wanted.kind, wanted.version, wanted.arch, promised=promised)

    def _from_origin(self, wanted: PinnedFile, kernel: PinnedFile | None, source: Source) -> None:
        if not isinstance(source, InitrdPin):
            self._provisioner.kernels.make(wanted.version, wanted.arch, source)
            return
        assert kernel
        try:
            booted = self.provide(kernel, whole=source.kernel is not None)
        except SourceUnavailable as error:
            tried = [(f"{place} (for its kernel's modules)", why) for place, why in error.tried]
            raise SourceUnavailable(error.subject, tried=tried) from error
        self._provisioner.initrds.make(wanted.version, source, booted, wanted.arch)

    def _tell_others(self) -> None:
        """Brings the lists of what is here up to date. The files are good without."""
        try:
            self._provisioner.write_manifest()
        except SystemFilesError as error:
            log.warning("SHA256SUMS and index.json are not up to date: %s", error.summary)

    def _gone(self, wanted: PinnedFile, tried: Tried, sources: list[Source]) -> SourceUnavailable:
        hint = f"what it needs is the file with the sha256 {wanted.sha256} ({wanted.size} bytes)"
        if wanted.kind == INITRD:
            hint += f", or another one whose uncompressed content has the sha256 {wanted.content_sha256}"
        elif not any(isinstance(source, KernelFile) for source in sources):  # no name of the catalog
            hint += f"; with it: systemfiles add kernel FILE --version {wanted.version} --arch {wanted.arch}"
        subject = f"{_called(wanted)}, which {self._name} names,"
        return SourceUnavailable(subject, tried=tried, wanted="brought back", hint=hint)


def _called(wanted: PinnedFile) -> str:
    return f"{wanted.kind} {wanted.version} ({wanted.arch})"


def _told(where: str, error: SystemFilesError) -> Tried:
    """What was tried there, and all that is known of why it failed."""
    if isinstance(error, SourceUnavailable) and error.tried:
        return [(f"{where}, {place}", why) for place, why in error.tried]
    if isinstance(error, IntegrityError):
        return [(where, f"{error.summary} (expected {error.expected}, got {error.got})")]
    if isinstance(error, VersionConflict):
        changes = "; ".join(f"{what}: {old} -> {new}" for what, (old, new) in sorted(error.changes.items()))
        return [(where, f"something else would come of it ({changes})")]
    return [(where, error.summary)]
