"""Bringing back what a pin or a VM's record names: as it is, from its blobs, from a registry, or from its origin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from systemfiles.content.artifacts import Artifact
from systemfiles.content.layout import Descriptor
from systemfiles.content.store import layout_name
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    IntegrityError,
    NotProvisioned,
    SnapshotMismatch,
    SourceUnavailable,
    SystemFilesError,
)
from systemfiles.foundation.paths import INITRD
from systemfiles.provision.provisioner import Provisioner
from systemfiles.provision.site import BLOB
from systemfiles.retention.pins import PinnedFile

log = logging.getLogger(__name__)


def restore(
    provisioner: Callable[[], Provisioner], kernel: PinnedFile, initrd: PinnedFile, *, name: str, full: bool
) -> tuple[Artifact, Artifact]:
    """Both artifacts, intact and with the bytes on record; `full` reads every byte of them.

    Raises SnapshotMismatch when a version is another content here, SourceUnavailable when something is gone for good.
    """
    found = _Restorer(provisioner, name, full)
    booted = found.restore(kernel, lambda maker: maker.kernels.provide(kernel.version, kernel.arch).artifact)
    return booted, found.restore(
        initrd, lambda maker: maker.initrds.provide(initrd.version, booted, initrd.arch).artifact
    )


class _Restorer:
    def __init__(self, provisioner: Callable[[], Provisioner], name: str, full: bool) -> None:
        self._make = provisioner
        self._made: Provisioner | None = None
        self._name = name
        self._full = full

    @property
    def _provisioner(self) -> Provisioner:
        self._made = self._made or self._make()
        return self._made

    def restore(self, wanted: PinnedFile, make_again: Callable[[Provisioner], Artifact]) -> Artifact:
        """The artifact as it is, else by the cheapest way that works."""
        try:
            return self._as_it_is(wanted)
        except (NotProvisioned, IntegrityError) as error:
            log.warning("%s %s (%s) is brought back: %s", wanted.kind, wanted.version, wanted.arch, error.summary)
            tried = [("the files here", error.summary)]
        ways: dict[str, Callable[[], object]] = {
            "the content store": lambda: self._from_blobs(wanted),
            **{
                f"registry {registry}": lambda registry=registry: self._from_registry(wanted, registry)  # type: ignore[misc]
                for registry in self._provisioner.registries
            },
            "the origin": lambda: make_again(self._provisioner),
        }
        for where, way in ways.items():
            try:
                way()
                artifact = self._as_it_is(wanted)
            except SnapshotMismatch:
                raise
            except SystemFilesError as error:
                tried.append((where, error.summary))
                continue
            self._provisioner.write_manifest()
            return artifact
        subject = f"{wanted.kind} {wanted.version} ({wanted.arch}), which {self._name} names,"
        raise SourceUnavailable(
            subject,
            tried=tried,
            wanted="brought back",
            hint=f"it needs the file with the sha256 {wanted.sha256} ({wanted.size} bytes)",
        )

    def _as_it_is(self, wanted: PinnedFile) -> Artifact:
        """Raises NotProvisioned, IntegrityError; SnapshotMismatch for another content under this version."""
        artifacts = self._provisioner.store.artifacts
        artifact = artifacts.load(wanted.kind, wanted.version, wanted.arch)
        here = artifact.files[artifact.file].sha256
        same = here == wanted.sha256
        if wanted.kind == INITRD and not same:  # compressed by another zlib, it is still the same
            here, same = artifact.record["content_sha256"], artifact.record["content_sha256"] == wanted.content_sha256
        if not same:
            recorded = wanted.content_sha256 if wanted.kind == INITRD else wanted.sha256
            raise SnapshotMismatch(self._name, differences={f"{wanted.kind} {wanted.version}": (recorded, here)})
        artifacts.check(artifact)
        if self._full:
            for problem in artifacts.verify(artifact, artifact.file):
                raise problem
        return artifact

    def _from_blobs(self, wanted: PinnedFile) -> None:
        """From what the content store holds under its name, or under the digests on record."""
        provisioner = self._provisioner
        if provisioner.recover(wanted.kind, wanted.version, wanted.arch):
            return
        files = _descriptors(wanted.record)
        layout = provisioner.store.layout
        for file in files.values():
            if not layout.intact(file.digest, file.size):
                raise IntegrityError(
                    layout.blob(file.digest), expected=f"{file.size} bytes", got="not these", consequence="it is no use"
                )
        provisioner.put_together(wanted.record, files)

    def _from_registry(self, wanted: PinnedFile, registry: str) -> None:
        provisioner = self._provisioner
        name = layout_name(wanted.kind, wanted.version, wanted.arch)
        provisioner.images.fetch(f"{registry}/{wanted.kind}:{wanted.version}", wanted.arch, name=name)
        if not provisioner.recover(wanted.kind, wanted.version, wanted.arch):
            raise NotProvisioned(wanted.kind, wanted.version, wanted.arch.value, looked_in=registry)


def _descriptors(record: Mapping[str, Any]) -> dict[str, Descriptor]:
    return {
        name: Descriptor(BLOB, Digest.from_hex(facts["sha256"]), facts["size"])
        for name, facts in record["files"].items()
    }
