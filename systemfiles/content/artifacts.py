"""Artifact directories: one version of a kernel or an initrd for one architecture, finished and never changed again.

::

    system/kernel/debian-cloud-6.1.192-2/x86_64/
    ├── vmlinux         a hard link to its blob, mode 0444
    ├── modules.tar     likewise; what initrds may take
    ├── stamp.json      device, inode, mtime_ns and sha256 of each file when its bytes were last hashed
    └── artifact.json   written last: what it is, of what, from what; nothing is there until this file is

A file is intact when its size is on record and its stamp is the one beside it; when only the stamp differs, it is
hashed again and the stamp refreshed, so that a copied data directory works and a changed file is caught. Never ctime:
linking changes it. This module is on the path of every VM start: it imports nothing heavy, and hashes only when it
must.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest, hash_file
from systemfiles.foundation.errors import (
    DigestMismatch,
    IntegrityError,
    InvalidDigest,
    NotProvisioned,
    SizeMismatch,
    StoreError,
    UnsupportedArch,
    require_fault_of_file,
)
from systemfiles.foundation.paths import INITRD, KERNEL, KINDS, Paths, is_version

RECORD = "artifact.json"
STAMPS = "stamp.json"
MODULES = "modules.tar"
_REFUSED = "it was not handed out"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ARCHES = frozenset(arch.value for arch in Arch)

Stamp = tuple[int, int, int, str]
"""Device, inode, mtime in ns, and the sha256 (hex) of the bytes that were found there."""


class FileFacts(NamedTuple):
    """`sha256` in hex, `size` in bytes."""

    sha256: str
    size: int


class Artifact(NamedTuple):
    """One finished artifact, as its artifact.json describes it."""

    kind: str
    version: str
    arch: Arch
    directory: Path
    files: dict[str, FileFacts]
    record: dict[str, Any]

    @property
    def file(self) -> str:
        """The name of the file a VMM is given."""
        return boot_file(self.kind, self.arch)

    @property
    def path(self) -> Path:
        return self.directory / self.file

    @property
    def sums(self) -> list[str]:
        """Its lines of SHA256SUMS (sha256sum(1))."""
        place = f"{self.kind}/{self.version}/{self.arch}"
        return [f"{facts.sha256}  {place}/{name}" for name, facts in sorted(self.files.items())]

    @property
    def inputs(self) -> dict[str, Any]:
        """The preimage of the content: equal inputs make equal content."""
        inputs: dict[str, Any] = self.record["inputs"]
        return inputs

    @property
    def requires_kernel(self) -> str | None:
        """The kernel version whose modules an initrd was given."""
        required: str | None = self.record.get("requires_kernel")
        return required


def fits(initrd: Mapping[str, Any], kernel: Artifact) -> bool:
    """Whether an initrd of these inputs goes with `kernel`: it carries no modules, or just the ones `kernel` has."""
    carried = initrd.get("kernel", {}).get("modules")
    return carried is None or (MODULES in kernel.files and kernel.files[MODULES].sha256 == carried)


def boot_file(kind: str, arch: Arch) -> str:
    """What the file of an artifact is called that a VMM is given."""
    return arch.kernel_file if kind == KERNEL else INITRD


def parse_record(raw: bytes, where: object) -> dict[str, Any]:
    """artifact.json, checked as far as anything here relies on it. Raises IntegrityError."""
    try:
        record: dict[str, Any] = json.loads(raw)
        _require(record["schema"] == 1 and record["kind"] in KINDS)
        _require(boot_file(record["kind"], Arch.parse(record["arch"])) in _files(record))
        _require(isinstance(record["inputs"], dict) and isinstance(record["version"], str))
        _require(isinstance(record.get("requires_kernel"), str | None))
        _require(isinstance(record["inputs"].get("kernel", {}), dict))
        if record["kind"] == INITRD:
            Digest.from_hex(record["content_sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnsupportedArch, InvalidDigest):
        raise IntegrityError(
            where, expected="the record of an artifact, schema 1", got="something else", consequence=_REFUSED
        ) from None
    return record


def artifact_of(record: dict[str, Any], directory: Path) -> Artifact:
    """The artifact that a record, which was checked, is of; its files are in `directory`."""
    return Artifact(record["kind"], record["version"], Arch.parse(record["arch"]), directory, _files(record), record)


class Artifacts:
    """All artifact directories of one data directory. Safe to share among threads."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._seen: dict[Path, Stamp] = {}  # what this process hashed where stamp.json may not be written

    def load(self, kind: str, version: str, arch: Arch) -> Artifact:
        """The artifact on record, its files not yet looked at. Raises NotProvisioned, IntegrityError, InvalidName."""
        directory = self._paths.artifact(kind, version, arch)
        path = directory / RECORD
        try:
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotProvisioned(kind, version, arch.value, looked_in=directory) from None
        except OSError as error:
            require_fault_of_file(error, path)
            raise IntegrityError(path, expected="a file", got=error.strerror, consequence=_REFUSED) from error
        record = parse_record(raw, path)
        if (named := (record["kind"], record["version"], record["arch"])) != (kind, version, arch.value):
            raise IntegrityError(
                path, expected=f"{kind} {version} ({arch})", got="{} {} ({})".format(*named), consequence=_REFUSED
            )
        return artifact_of(record, directory)

    def check(self, artifact: Artifact, *names: str) -> None:
        """Makes sure that these files of it (default: the one a VMM is given) are intact.

        Raises NotProvisioned for a missing file, SizeMismatch or DigestMismatch for a changed one.
        """
        stamps: dict[str, Stamp] | None = None
        for name in names or (artifact.file,):
            stamp = self._stamp(artifact, name)
            if stamps is None:
                stamps = _read_stamps(artifact.directory)
            if stamp in (stamps.get(name), self._seen.get(artifact.directory / name)):
                continue
            self._hash(artifact, name)
            stamps[name] = stamp
            if not _try_writing_stamps(artifact.directory, stamps, self._paths.tmp):
                self._seen[artifact.directory / name] = stamp

    def is_as_checked(self, artifact: Artifact, name: str) -> bool:
        """Whether this file is the one that was hashed last, by its stamp; writes nothing, and reads nothing of it.

        Another one is hashed by whoever uses it, and may well be good. Raises NotProvisioned, IntegrityError.
        """
        stamp = self._stamp(artifact, name)
        return stamp in (_read_stamps(artifact.directory).get(name), self._seen.get(artifact.directory / name))

    def verify(self, artifact: Artifact, *names: str) -> Iterator[IntegrityError | NotProvisioned]:
        """Hashes these files of it (default: all), whatever their stamps say; yields what is wrong and forgets them."""
        for name in names or artifact.files:
            try:
                self._stamp(artifact, name)
                self._hash(artifact, name, consequence="it is not handed out from now on")
            except (IntegrityError, NotProvisioned) as error:
                with contextlib.suppress(StoreError):  # whoever may not repair it may know it all the same
                    self.forget(artifact)
                yield error

    def forget(self, artifact: Artifact) -> None:
        """Drops the stamps, so that the next use hashes the files again. Raises StoreError when it may not."""
        for name in artifact.files:
            self._seen.pop(artifact.directory / name, None)
        from systemfiles.foundation.files import fsync_path

        try:
            (artifact.directory / STAMPS).unlink(missing_ok=True)
            fsync_path(artifact.directory)
        except OSError as error:
            msg = f"{artifact.directory / STAMPS} cannot be removed ({error.strerror})"
            raise StoreError(msg) from error

    def versions(self, kind: str) -> Iterator[tuple[str, Arch]]:
        """Every (version, architecture) with a record, sorted."""
        root = self._paths.kind(kind)
        for record in listed(root, f"*/*/{RECORD}"):
            version, arch = record.parent.parent.name, record.parent.name
            if is_version(version) and arch in ARCHES:
                yield version, Arch(arch)

    def unfinished(self, kind: str) -> Iterator[Path]:
        """Directories of a version that hold something, but no record: lost, or a run that did not get to its end."""
        for directory in listed(self._paths.kind(kind), "*/*"):
            if directory.is_dir() and listed(directory, "*") and not (directory / RECORD).exists():
                yield directory

    def publish(
        self, record: Mapping[str, Any], blobs: Mapping[str, Path], *, created_at: str, created_by: str
    ) -> Artifact:
        """Links the blobs into the artifact's directory and writes its record, last. Replaces what is there."""
        from systemfiles.foundation.files import link_or_copy, make_dirs, storing, write_file

        arch = Arch.parse(record["arch"])
        directory = self._paths.artifact(record["kind"], record["version"], arch)
        for place in (directory.parent, directory):
            if place.is_symlink():  # else the files of whatever it leads to would be replaced
                with storing(place):
                    place.unlink()
        make_dirs(directory)
        for name, blob in blobs.items():
            link_or_copy(blob, directory / name, scratch=self._paths.tmp)
        # the blob was hashed; a copy, where a link was not possible, was not
        linked = {name: (directory / name).lstat() for name, blob in blobs.items() if blob.samefile(directory / name)}
        stamps = {name: _stamp_of(found, record["files"][name]["sha256"]) for name, found in linked.items()}
        _try_writing_stamps(directory, stamps, self._paths.tmp)
        whole = {**record, "created_at": created_at, "created_by": created_by}
        write_file(directory / RECORD, json.dumps(whole, indent=1).encode() + b"\n", scratch=self._paths.tmp)
        return self.load(record["kind"], record["version"], arch)

    def _stamp(self, artifact: Artifact, name: str) -> Stamp:
        path = artifact.directory / name
        expected = artifact.files[name].size
        try:
            found = path.lstat()
        except FileNotFoundError:
            raise NotProvisioned(artifact.kind, artifact.version, artifact.arch.value, looked_in=path) from None
        except OSError as error:
            raise IntegrityError(path, expected="a file", got=error.strerror, consequence=_REFUSED) from error
        if not stat.S_ISREG(found.st_mode):
            raise IntegrityError(path, expected="a regular file", got="something else", consequence=_REFUSED)
        if found.st_size != expected:
            raise SizeMismatch(path, expected=f"{expected} bytes", got=f"{found.st_size} bytes", consequence=_REFUSED)
        return _stamp_of(found, artifact.files[name].sha256)

    def _hash(self, artifact: Artifact, name: str, *, consequence: str = _REFUSED) -> None:
        path = artifact.directory / name
        expected = Digest.from_hex(artifact.files[name].sha256)
        try:
            got = hash_file(path)[0]
        except OSError as error:
            require_fault_of_file(error, path)
            raise IntegrityError(path, expected=expected, got=error.strerror, consequence=consequence) from error
        if got != expected:
            raise DigestMismatch(path, expected=expected, got=got, consequence=consequence)


def _files(record: Mapping[str, Any]) -> dict[str, FileFacts]:
    files = {}
    for name, facts in record["files"].items():
        size = facts["size"]
        _require(_NAME.fullmatch(name) is not None and name not in (RECORD, STAMPS))
        _require(isinstance(size, int) and not isinstance(size, bool) and size >= 0)
        files[name] = FileFacts(Digest.from_hex(facts["sha256"]).hex, size)
    return files


def listed(root: Path, pattern: str) -> list[Path]:
    """What matches below `root`, sorted. Raises StoreError: what cannot be listed is not taken for empty.

    A `*` in `pattern` is any name. What is removed meanwhile, as by a collection, is not there.
    """
    found = [root]
    for part in pattern.split("/"):
        found = [path for directory in found for path in _entries(directory) if part in ("*", path.name)]
    return sorted(found)


def _entries(directory: Path) -> list[Path]:
    try:
        return [*directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        msg = f"{directory} cannot be listed ({error.strerror})"
        raise StoreError(msg) from error


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _stamp_of(found: os.stat_result, sha256: str) -> Stamp:
    return (found.st_dev, found.st_ino, found.st_mtime_ns, sha256)


def _read_stamps(directory: Path) -> dict[str, Stamp]:
    try:
        return {name: tuple(stamp) for name, stamp in json.loads((directory / STAMPS).read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # unreadable stamps only mean that the files are hashed again


def _try_writing_stamps(directory: Path, stamps: Mapping[str, Stamp], scratch: Path) -> bool:
    from systemfiles.foundation.files import write_file

    try:
        write_file(directory / STAMPS, json.dumps(stamps).encode(), scratch=scratch, mode=0o644)
    except (OSError, StoreError):
        return False  # a read-only or full data directory resolves all the same, and each process hashes once
    return True
