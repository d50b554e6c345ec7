"""A release as a folder: a person understands it, any web server can serve it, and `systemfiles publish` pushes it.

::

    dist/
    ├── SHA256SUMS                          of everything else here; `sha256sum -c SHA256SUMS`
    ├── versions.lock                       what rolling names stand for in it, if any do
    ├── kernel/<version>/<arch>/
    │   ├── vmlinux or Image, modules.tar
    │   ├── artifact.json                   its record, without what is of the host that built it
    │   └── sbom.cdx.json, provenance.json
    └── initrd/<version>/<arch>/            initrd, artifact.json, sbom.cdx.json, provenance.json

The same commit and versions.lock make the same bytes in all of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from systemfiles.content.artifacts import RECORD, Artifact, artifact_of, listed, parse_record
from systemfiles.content.packaging import DOCUMENTS, Document, public_record
from systemfiles.foundation.digest import hash_file
from systemfiles.foundation.errors import DigestMismatch, IntegrityError, UsageError
from systemfiles.foundation.files import link_or_copy, make_dirs, storing, write_file
from systemfiles.foundation.paths import KINDS

SUMS = "SHA256SUMS"
LOCK = "versions.lock"
_SUM = re.compile(r"([0-9a-f]{64})  ([^\0\n]+)")
_REFUSED = "nothing was published"
_READABLE = 0o644


def write_artifact(dist: Path, artifact: Artifact, documents: Mapping[Document, bytes]) -> None:
    """Adds an artifact and what is told of it to the release that is being written at `dist`."""
    place = dist / artifact.kind / artifact.version / artifact.arch.value
    make_dirs(place)
    for name in artifact.files:
        link_or_copy(artifact.directory / name, place / name, scratch=dist.parent)
    texts = {RECORD: json.dumps(public_record(artifact.record), indent=1).encode() + b"\n"}
    texts |= {document.file: data for document, data in documents.items()}
    for name, data in texts.items():
        write_file(place / name, data, scratch=dist.parent, mode=_READABLE)


def write_sums(dist: Path) -> None:
    """Writes SHA256SUMS, last."""
    with storing(dist):
        lines = [f"{hash_file(dist / name)[0].hex}  {name}\n" for name in _names(dist)]
    write_file(dist / SUMS, "".join(lines).encode(), scratch=dist.parent, mode=_READABLE)


def read_dist(dist: Path) -> tuple[Artifact, ...]:
    """The artifacts of the release at `dist`, every byte of which is as SHA256SUMS says.

    Raises UsageError where there is no release, IntegrityError for one that is damaged or not whole.
    """
    if not (dist / SUMS).is_file():
        msg = f"{dist} is not a release"
        raise UsageError(msg, details=[("expected", f"a folder with {SUMS}")], hint="make one: doit release")
    told = dict(_sums(dist / SUMS))
    if (there := {*_names(dist)}) != {*told}:
        missing, unknown = sorted({*told} - there), sorted(there - {*told})
        got = f"{', '.join(missing) or 'none'} missing, {', '.join(unknown) or 'none'} unknown"
        raise IntegrityError(dist, expected=f"the files of {SUMS}", got=got[:500], consequence=_REFUSED)
    for name, sha256 in told.items():
        with storing(dist):
            got = hash_file(dist / name)[0].hex
        if got != sha256:
            raise DigestMismatch(dist / name, expected=sha256, got=got, consequence=_REFUSED)
    return tuple(_artifact(dist, path, told) for kind in KINDS for path in listed(dist / kind, f"*/*/{RECORD}"))


def _artifact(dist: Path, path: Path, told: Mapping[str, str]) -> Artifact:
    """What the record at `path` is of, if it says of the files what SHA256SUMS has `told` of them."""
    record = parse_record(path.read_bytes(), path)
    said = (record["kind"], record["version"], record["arch"])
    if said != (place := path.parent.parts[-3:]):
        raise IntegrityError(path, expected=" ".join(place), got=" ".join(said), consequence=_REFUSED)
    artifact = artifact_of(record, path.parent)
    for document in DOCUMENTS:
        if (path.parent / document.file).relative_to(dist).as_posix() not in told:
            raise IntegrityError(path.parent, expected=document.file, got="none", consequence=_REFUSED)
    for name, facts in artifact.files.items():
        file = path.parent / name
        if (got := told.get(file.relative_to(dist).as_posix())) != facts.sha256:
            raise DigestMismatch(file, expected=facts.sha256, got=got, consequence=_REFUSED)
    return artifact


def _names(dist: Path) -> list[str]:
    found = (path.relative_to(dist).as_posix() for path in dist.rglob("*") if not path.is_dir())
    return sorted(name for name in found if name != SUMS)


def _sums(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(errors="surrogateescape").splitlines():
        match = _SUM.fullmatch(line)
        if match is None:
            raise IntegrityError(path, expected="lines of sha256sum", got=repr(line[:100]), consequence=_REFUSED)
        yield match[2], match[1]
