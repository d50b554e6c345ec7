"""Artifact directories and the content store under them, kept in step.

Every artifact is also an OCI artifact in the layout, named `<kind>-<version>-<arch>`. So each of the two can be written
again from the other, and no other tool's collection frees its bytes.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from systemfiles.content.artifacts import ARCHES, RECORD, Artifact, Artifacts, boot_file, parse_record
from systemfiles.content.descriptors import IMAGE_CONFIG, MANIFEST, Descriptor
from systemfiles.content.layout import LARGEST_JSON, Layout
from systemfiles.content.packaging import TITLE, blobs_of, pack
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    DigestMismatch,
    IntegrityError,
    NotProvisioned,
    StoreError,
    SystemFilesError,
    VersionConflict,
)
from systemfiles.foundation.files import link_or_copy
from systemfiles.foundation.lock import Timeout
from systemfiles.foundation.paths import INITRD, KINDS, Paths
from systemfiles.foundation.units import utc
from systemfiles.version import __version__

log = logging.getLogger(__name__)

_JSON = "application/json"


def layout_name(kind: str, version: str, arch: Arch) -> str:
    """What an artifact is called in index.json."""
    return f"{kind}-{version}-{arch}"


def identity_of(record: Mapping[str, Any]) -> str:
    """What tells this content from others: the sha256 of a kernel's file, of an initrd's uncompressed cpio."""
    if record["kind"] == INITRD:
        return str(record["content_sha256"])
    return str(record["files"][boot_file(record["kind"], Arch.parse(record["arch"]))]["sha256"])


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Which inputs differ, by dotted name: (before, now)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found[f"{prefix}{key}"] = (old, new)
    return found


class Store:
    """Finds, takes in and names artifacts. Callers hold the artifact's lock."""

    def __init__(
        self,
        paths: Paths,
        artifacts: Artifacts,
        *,
        timeout: Timeout = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.layout = Layout(paths, timeout=timeout)
        self.artifacts = artifacts
        self._paths = paths
        self._clock = clock
        self._promised: dict[str, str] = {}

    def kept(self, kind: str, version: str, arch: Arch, inputs: Mapping[str, Any] | None) -> Artifact | None:
        """The artifact when every file of it is intact on disk. Changes nothing, needs no lock.

        `inputs` are today's inputs of that version, None when nothing but the disk knows it.
        Raises VersionConflict when it exists and was made from others.
        """
        try:
            artifact = self.artifacts.load(kind, version, arch)
            _require_same(kind, version, arch, artifact.inputs, inputs)
            self.artifacts.check(artifact, *artifact.files)
        except (NotProvisioned, IntegrityError):
            return None
        return artifact

    def recover(self, kind: str, version: str, arch: Arch, inputs: Mapping[str, Any] | None) -> Artifact | None:
        """Writes the artifact again from the layout, when that has every byte of it. Raises VersionConflict."""
        target = self.layout.names().get(layout_name(kind, version, arch))
        if target is None:
            return None
        try:
            record, files = self._read_manifest(target)
        except (StoreError, IntegrityError, KeyError, TypeError) as error:
            log.warning("%s in the content store cannot be used: %s", layout_name(kind, version, arch), error)
            return None
        if (record["kind"], record["version"], record["arch"]) != (kind, version, arch.value):
            return None
        _require_same(kind, version, arch, record["inputs"], inputs)
        self.layout.note(target.digest)
        if not all(self.layout.intact(file.digest, file.size) for file in files.values()):
            return None
        self.layout.name(layout_name(kind, version, arch), target)  # a collection may just have dropped it
        return self._publish(record, files)

    def put(self, record: Mapping[str, Any], files: Mapping[str, Descriptor]) -> Artifact:
        """Publishes what was made: `files` are blobs of the layout, by file name; `record` describes them.

        Raises VersionConflict when an artifact of that name, whatever became of its files, has another content on
        record: on disk or in the layout; DigestMismatch for another content than was promised.
        """
        kind, version, arch = record["kind"], record["version"], Arch.parse(record["arch"])
        promised, identity = self._promised.get(layout_name(kind, version, arch)), identity_of(record)
        if promised not in (None, identity):
            subject = f"{kind} {version} ({arch})"
            raise DigestMismatch(subject, expected=promised, got=identity, consequence="it was refused")
        for known in self.records(kind, version, arch):
            if (before := _content(known)) != (now := _content(record)):
                raise VersionConflict(kind, version, arch.value, changes={"content": (before, now)})
        self._name(record, files)
        return self._publish(record, files)

    def promise(self, kind: str, version: str, arch: Arch, identity: str) -> None:
        """Lets `put` refuse any other content under this version from now on; see `identity_of`."""
        self._promised[layout_name(kind, version, arch)] = identity

    def describe(self, target: Descriptor) -> tuple[dict[str, Any], dict[str, Descriptor]]:
        """The record and the files, by name, of an artifact whose manifest is in the layout.

        Raises StoreError, also for the manifest of something else, and IntegrityError.
        """
        try:
            return self._read_manifest(target)
        except (KeyError, TypeError) as error:
            msg = f"the manifest {target.digest} is not that of a kernel or an initrd"
            raise StoreError(msg) from error

    def records(self, kind: str, version: str, arch: Arch) -> Iterator[dict[str, Any]]:
        """What disk and layout have on record of this version, whatever became of its files."""
        with contextlib.suppress(NotProvisioned, IntegrityError):
            yield self.artifacts.load(kind, version, arch).record
        target = self.layout.names().get(layout_name(kind, version, arch))
        with contextlib.suppress(StoreError, IntegrityError, KeyError, TypeError):
            if target is not None:
                yield self._read_manifest(target)[0]

    def holds(self, kind: str, version: str, arch: Arch) -> bool:
        """Whether this version is on record here, on disk or in the layout."""
        return any(self.records(kind, version, arch))

    def recorded(self, kind: str) -> list[tuple[str, Arch]]:
        """Every version of a kind that disk or layout knows, whatever became of its files; sorted."""
        unfinished = ((path.parent.name, path.name) for path in self.artifacts.unfinished(kind))
        found = {*self.artifacts.versions(kind), *((name, Arch(arch)) for name, arch in unfinished if arch in ARCHES)}
        for target in self.layout.names().values():
            with contextlib.suppress(StoreError, IntegrityError, KeyError, TypeError):
                record = self._read_manifest(target)[0]
                if record["kind"] == kind:
                    found.add((record["version"], Arch.parse(record["arch"])))
        return sorted(found, key=str)

    def verify(self) -> Iterator[SystemFilesError]:
        """What is wrong with the layout, with what it says of artifacts, and with directories that have no record."""
        if missing := self.layout.missing():
            msg = f"the content store {self.layout.root} has no {' and no '.join(missing)}"
            yield StoreError(msg, hint="doit or systemfiles provision makes it again from what is provided")
        yield from self.layout.verify()
        named = self.layout.names()
        for target in named.values():
            yield from self._unprovided(target)
        for kind in KINDS:
            for version, arch in self.artifacts.versions(kind):
                if layout_name(kind, version, arch) not in named:
                    yield IntegrityError(
                        self.layout.root / "index.json",
                        expected=f"an entry for {layout_name(kind, version, arch)}",
                        got="none",
                        consequence="another tool's collection may free its blobs",
                    )
            for directory in self.artifacts.unfinished(kind):
                yield IntegrityError(directory, expected=RECORD, got="none", consequence="nothing in it is handed out")

    def _unprovided(self, target: Descriptor) -> Iterator[SystemFilesError]:
        """The error for an artifact of the layout that has no directory any more."""
        try:
            record = self._read_manifest(target)[0]
        except (StoreError, IntegrityError, KeyError, TypeError):
            return  # an image, or damage that is told of elsewhere
        try:
            self.artifacts.load(record["kind"], record["version"], Arch.parse(record["arch"]))
        except NotProvisioned as error:
            yield error
        except IntegrityError:
            return

    def reassert(self) -> None:
        """Makes index.json reach every artifact on disk again, should another tool have rewritten it."""
        self.layout.create()
        if not self.is_asserted():
            with self.layout.ingesting():
                self._reassert_all()

    def _reassert_all(self) -> None:
        for kind, version, arch in [*self._unasserted()]:
            name = layout_name(kind, version, arch)
            try:
                self._reassert(self.artifacts.load(kind, version, arch))
            except (IntegrityError, NotProvisioned) as error:
                log.warning("%s is not named in the content store: %s", name, error.summary)
            except StoreError:
                if (kind, version, arch) in [(kind, *there) for there in self.artifacts.versions(kind)]:
                    raise  # else a collection has just taken it

    def is_asserted(self) -> bool:
        """Whether index.json has a name for every artifact on disk."""
        return self.layout.exists() and not any(self._unasserted())

    def _unasserted(self) -> Iterator[tuple[str, str, Arch]]:
        """The artifacts on disk that index.json does not reach, or not wholly."""
        named = self.layout.names()
        for kind in KINDS:
            for version, arch in self.artifacts.versions(kind):
                target = named.get(layout_name(kind, version, arch))
                if target is None or not self._whole(target):
                    yield kind, version, arch

    def _whole(self, target: Descriptor) -> bool:
        """Whether the manifest, the record and the config can be read and every file is there."""
        parts = [*self.layout.reachable(target)]
        small = [part for part in parts if part.size <= LARGEST_JSON and TITLE not in part.annotations]
        return (
            len(parts) > 1
            and all(self.layout.blob(part.digest).exists() for part in parts)
            and all(self.layout.intact(part.digest, part.size) for part in small)
        )

    def _reassert(self, artifact: Artifact) -> None:
        self.artifacts.check(artifact, *artifact.files)
        files = blobs_of(artifact.record)
        for name, file in files.items():
            self.layout.note(file.digest)
            if not self.layout.blob(file.digest).exists():
                self.layout.create()
                link_or_copy(artifact.directory / name, self.layout.blob(file.digest), scratch=self._paths.tmp)
        self._name(artifact.record, files)

    def _name(self, record: Mapping[str, Any], files: Mapping[str, Descriptor]) -> None:
        packed = pack(record, files)
        self.layout.add_bytes(packed.record, _JSON)
        self.layout.add_bytes(packed.config, IMAGE_CONFIG)
        target = self.layout.add_bytes(packed.manifest, MANIFEST)
        self.layout.name(layout_name(record["kind"], record["version"], Arch.parse(record["arch"])), target)

    def _publish(self, record: Mapping[str, Any], files: Mapping[str, Descriptor]) -> Artifact:
        blobs = {name: self.layout.blob(file.digest) for name, file in files.items()}
        now = utc(self._clock())
        return self.artifacts.publish(record, blobs, created_at=now, created_by=f"systemfiles {__version__}")

    def _read_manifest(self, target: Descriptor) -> tuple[dict[str, Any], dict[str, Descriptor]]:
        layers = map(Descriptor.from_json, self.layout.read_json(target.digest)["layers"])
        files = {layer.annotations[TITLE]: layer for layer in layers}
        described = files.pop(RECORD).digest
        record = parse_record(self.layout.read(described), self.layout.blob(described))
        if {name: (file.digest.hex, file.size) for name, file in files.items()} != {
            name: (facts["sha256"], facts["size"]) for name, facts in record["files"].items()
        }:
            msg = "the manifest names other files than the record"
            raise StoreError(msg)
        return record, files


def _require_same(
    kind: str, version: str, arch: Arch, recorded: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> None:
    if inputs is not None and (different := changes(recorded, inputs)):
        raise VersionConflict(kind, version, arch.value, changes=different)


def _content(record: Mapping[str, Any]) -> str:
    """The identity of an artifact's content: of what is inside an initrd, whatever compressed it."""
    if "content_sha256" in record:
        return str(record["content_sha256"])
    return " ".join(f"{name}:{facts['sha256']}" for name, facts in sorted(record["files"].items()))
