"""Pushing a release to an OCI registry, so that a thousand hosts pull what one built.

For each version, in this order, so that whoever stops it leaves nothing that points to nothing:

1. the blobs and the manifest of each architecture, then its SBOM and provenance, which refer to that;
2. the index, by its digest, and its signatures (see sources/signatures.py);
3. the tag `<registry>/<kind>:<version>`.

What is there already is not sent again, and what is missing is. A version that was published is never changed: its
manifests must be these, and its documents stay the ones it was first published with, as long as a key that is given has
signed them. An architecture, or a signature, may be added; the former by whoever has every key that it is signed with.
Publish a version from one place at a time: of two indexes, the last one stays.

A registry is not believed here either: a signature is made only of what is in this release, or was signed by a key that
is given.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from systemfiles.content.artifacts import Artifact
from systemfiles.content.descriptors import IMAGE_CONFIG, INDEX, MANIFEST, Descriptor, canonical
from systemfiles.content.images import parts_of
from systemfiles.content.packaging import (
    DOCUMENTS,
    EMPTY,
    VERSION,
    Document,
    Packed,
    artifact_type,
    blobs_of,
    descriptor_of,
    pack,
    pack_document,
    pack_index,
)
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    DigestMismatch,
    InvalidDigest,
    SignatureRefused,
    SourceRefused,
    StoreError,
    UsageError,
    VersionConflict,
)
from systemfiles.foundation.manifests import INDEXES, Manifest
from systemfiles.foundation.progress import Progress, silent
from systemfiles.foundation.units import printable
from systemfiles.sources.oci import Reference, Repository
from systemfiles.sources.signatures import (
    KEY_ID,
    LARGEST_PAYLOAD,
    MOST_SIGNATURES,
    PAYLOAD,
    SIGNATURE,
    PrivateKey,
    PublicKey,
    payload,
    signed_digest,
    tag_of,
)
from systemfiles.sources.transport import Answered

T = TypeVar("T")


class Publication(NamedTuple):
    """One version in a registry: its reference with the digest, for which architectures, and what was done for it."""

    reference: str
    arches: tuple[Arch, ...]
    pushed: int
    signed: tuple[str, ...]


def publish(
    artifacts: Iterable[Artifact], registry: str, keys: Sequence[PrivateKey] = (), *, progress: Progress = silent
) -> Iterator[Publication]:
    """Pushes each version below `registry` and signs it with `keys`; says so as soon as a version is whole there.

    `pushed` counts blobs and manifests that were not there. Raises VersionConflict for a version that is published with
    other content, SourceRefused, SourceUnavailable, UsageError.
    """

    def named(artifact: Artifact) -> tuple[str, str]:
        return artifact.kind, artifact.version

    for (kind, version), group in groupby(sorted(artifacts, key=named), key=named):
        reference = Reference.parse(f"{registry}/{kind}:{version}")
        yield _Publishing(reference, kind, version, progress).run([*group], keys)


class _Told(NamedTuple):
    """What is told of an artifact: a document, its bytes, and the manifest that refers to the artifact's."""

    document: Document
    data: bytes
    referrer: bytes


class _Publishing:
    """One version on its way to a registry."""

    def __init__(self, reference: Reference, kind: str, version: str, progress: Progress) -> None:
        self._reference = reference
        self._repository = Repository(reference.registry, reference.repository, plain_http=reference.plain_http)
        self._kind = kind
        self._version = version
        self._progress = progress
        self._pushed = 0
        self._payloads: dict[Digest, bytes] = {}

    def run(self, artifacts: list[Artifact], keys: Sequence[PrivateKey]) -> Publication:
        there = self._published(keys)
        published = known = _entries(there)
        mine: dict[Arch, tuple[Artifact, Packed]] = {
            artifact.arch: (artifact, pack(artifact.record, blobs_of(artifact.record))) for artifact in artifacts
        }
        for arch, (_, packed) in mine.items():
            if arch in known and (theirs := known[arch].digest) != packed.target.digest:
                manifests = {"manifest": (theirs, packed.target.digest)}
                raise VersionConflict(self._kind, self._version, arch.value, changes=manifests)
        if there and keys and not self._vouched(there.digest, keys):
            self._require_all(there.digest, published.keys() - mine.keys())
            there, known = None, {}  # whoever put it there: what is signed is our own
        lacking = [arch for arch in mine if arch not in known or not self._has_all(known[arch])]
        told = {arch: [*_documents(*mine[arch])] for arch in lacking}
        targets = {arch: _entry(mine[arch][1], told[arch]) for arch in lacking}
        index = there.raw if there and not targets else pack_index(self._kind, self._version, {**known, **targets})
        if there and Digest.of(index) != there.digest:
            self._require_signers(there.digest, keys)
        for arch in lacking:
            self._push(*mine[arch], told[arch])
        digest = self._push_manifest(index, INDEX)
        signed = self._sign(digest, keys) if keys else ()
        if there is None or there.digest != digest:
            self._repository.push_manifest(index, INDEX, self._version)
        arches = tuple(sorted({*known, *mine}, key=str))
        return Publication(f"{self._reference}@{digest}", arches, self._pushed, signed)

    def _published(self, keys: Sequence[PrivateKey]) -> Manifest | None:
        """The index of this version that is there. Raises UsageError when something else is, and there are no keys.

        It must say itself what it is of: a signed one of another version may lie here.
        """
        found = self._find(self._version)
        if found is None:
            return None
        notes = found.value.get("annotations")
        said = (found.value.get("artifactType"), notes.get(VERSION) if isinstance(notes, dict) else None)
        if found.media_type in INDEXES and said == (artifact_type(self._kind), self._version):
            return found
        if not keys:
            msg = f"{self._reference} is there and something else ({found.digest})"
            raise UsageError(msg, hint="delete it there, or publish to another place")
        return None  # whoever put it there: what is signed is our own

    def _require_signers(self, digest: Digest, keys: Sequence[PrivateKey]) -> None:
        """Refuses to replace an index that is signed with more than `keys`: hosts may trust only those."""
        others = [
            str(layer.get("annotations", {}).get(KEY_ID, "a key without an id"))
            for layer in self._signatures(digest)
            if not any(self._is_of(layer, key.public, digest) for key in keys)
        ]
        if others:
            msg = f"{self._reference} is signed, and more is to be added to it"
            hint = f"give every key it is signed with: --key FILE; or delete those signatures first: {tag_of(digest)}"
            raise UsageError(msg, details=[("also by", printable(", ".join(others))[:300])], hint=hint)

    def _vouched(self, digest: Digest, keys: Sequence[PrivateKey]) -> bool:
        """Whether one of `keys` has signed this index: then all that is in it may be signed again."""
        return any(self._is_of(layer, key.public, digest) for layer in self._signatures(digest) for key in keys)

    def _has_all(self, entry: Descriptor) -> bool:
        """Whether all that was published for one architecture is there still."""
        promised = [entry.digest, *(entry.annotations.get(document.annotation) for document in DOCUMENTS)]
        for digest in promised:
            manifest = self._find(Digest.parse(digest)) if digest else None
            try:
                parts = parts_of(manifest, subject=self._repository.name) if manifest else []
            except SourceRefused:
                return False  # an index, or what nobody can pull
            there = (self._ask(part.digest, partial(self._repository.has_blob, part.digest)) for part in parts)
            if not parts or not all(there):
                return False
        return True

    def _require_all(self, digest: Digest, others: Iterable[Arch]) -> None:
        if names := ", ".join(sorted(map(str, others))):
            refused = SignatureRefused(
                f"{self._reference}@{digest}",
                expected="a signature of a key that was given, as not all of it is in this release",
                got=f"none, and it has {names}",
                consequence="it was not signed",
            )
            refused.hint = "release every architecture of it, or give the key that it was signed with, too"
            raise refused

    def _push(self, artifact: Artifact, packed: Packed, told: Iterable[_Told]) -> None:
        """Pushes one architecture's artifact, and its documents."""
        for name, facts in sorted(artifact.files.items()):
            with (artifact.directory / name).open("rb") as content:
                subject = f"{self._version} {name} ({artifact.arch})"
                self._push_blob(Digest.from_hex(facts.sha256), facts.size, content, subject)
        self._push_bytes(packed.record)
        self._push_bytes(packed.config)
        self._push_manifest(packed.manifest, MANIFEST)
        self._push_bytes(EMPTY)  # the config of what refers to it
        for document, data, referrer in told:
            self._push_bytes(data)
            listed = {**descriptor_of(referrer, MANIFEST).to_json(), "artifactType": document.media_type}
            self._repository.attach(referrer, packed.target.digest, listed)

    def _sign(self, digest: Digest, keys: Sequence[PrivateKey]) -> tuple[str, ...]:
        """Adds the signatures of an index that it does not have yet; the ids of all of `keys`."""
        layers = self._signatures(digest)[:MOST_SIGNATURES]
        missing = [key for key in keys if not any(self._is_of(layer, key.public, digest) for layer in layers)]
        if missing:
            # first ours, as nobody looks at more
            layers.sort(key=lambda layer: not any(self._is_of(layer, key.public, digest) for key in keys))
            data = payload(f"{self._reference.registry}/{self._reference.repository}", digest)
            self._push_bytes(data)
            for key in missing:
                signature = base64.b64encode(key.sign(data)).decode()
                notes = {SIGNATURE: signature, KEY_ID: str(key.public.id)}
                layers.insert(0, descriptor_of(data, PAYLOAD, notes).to_json())
            del layers[MOST_SIGNATURES:]
            config = canonical(
                {
                    "architecture": "",
                    "os": "",
                    "config": {},
                    "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
                }
            )
            self._push_bytes(config)
            described = descriptor_of(config, IMAGE_CONFIG).to_json()
            manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": layers}
            self._repository.push_manifest(canonical(manifest), MANIFEST, tag_of(digest))
            self._pushed += 1
        return tuple(key.public.id for key in keys)

    def _signatures(self, digest: Digest) -> list[dict[str, Any]]:
        """The layers of the manifest of an index's signatures; none when there is none, or it is something else."""
        there = self._find(tag_of(digest))
        found = there.value.get("layers") if there else None
        layers: list[dict[str, Any]] = []
        for layer in found if isinstance(found, list) else ():
            with contextlib.suppress(StoreError):
                layers.append(Descriptor.from_json(layer).to_json())
        return layers

    def _is_of(self, layer: Mapping[str, Any], key: PublicKey, digest: Digest) -> bool:
        """Whether a signature of `digest` that is there is of `key`."""
        try:
            named, signature = Digest.parse(layer["digest"]), base64.b64decode(layer["annotations"][SIGNATURE])
            if named not in self._payloads:
                small = partial(self._repository.small_blob, named, limit=LARGEST_PAYLOAD)
                self._payloads[named] = self._ask(named, small) or b""
        except (KeyError, TypeError, ValueError, InvalidDigest, DigestMismatch, SourceRefused):
            return False  # not whole, so it is of no use to anybody
        data = self._payloads[named]
        return signed_digest(data) == digest and key.made(signature, data)

    def _find(self, target: str) -> Manifest | None:
        """What a tag or digest names; see `_ask`."""
        return self._ask(target, partial(self._repository.manifest, target))

    def _ask(self, what: str, ask: Callable[[], T]) -> T | None:
        """What `ask` gives, None when the registry has no such thing. Raises SourceRefused, SourceUnavailable."""
        with self._repository.insisting(what):
            try:
                return ask()
            except Answered as error:
                if error.status != 404:
                    raise
                return None

    def _push_bytes(self, data: bytes) -> None:
        self._push_blob(Digest.of(data), len(data), io.BytesIO(data), "")

    def _push_blob(self, digest: Digest, size: int, content: BinaryIO, subject: str) -> None:
        if subject:
            self._progress(subject, 0, size)
        self._pushed += self._repository.push_blob(digest, size, content)
        if subject:
            self._progress(subject, size, size)

    def _push_manifest(self, data: bytes, media_type: str) -> Digest:
        digest = Digest.of(data)
        if not self._ask(digest, partial(self._repository.has_manifest, digest)):
            self._repository.push_manifest(data, media_type, digest)
            self._pushed += 1
        return digest


def read_keys(paths: Iterable[Path]) -> list[PrivateKey]:
    """The keys to sign with. Raises UsageError, ToolMissing."""
    return [PrivateKey.read(path) for path in paths]


def _documents(artifact: Artifact, packed: Packed) -> Iterator[_Told]:
    for document in DOCUMENTS:
        data = (artifact.directory / document.file).read_bytes()
        yield _Told(document, data, pack_document(document, data, packed.target))


def _entry(packed: Packed, told: Iterable[_Told]) -> Descriptor:
    """What the index says of one architecture's artifact."""
    notes = {document.annotation: str(Digest.of(referrer)) for document, _, referrer in told}
    return replace(packed.target, annotations=notes)


def _entries(index: Manifest | None) -> dict[Arch, Descriptor]:
    """What a published index has for each architecture."""
    by_name = {arch.debian: arch for arch in Arch}
    entries: dict[Arch, Descriptor] = {}
    found = index.value.get("manifests") if index else None
    for entry in found if isinstance(found, list) else ():
        platform = entry.get("platform") if isinstance(entry, dict) else None
        arch = by_name.get(str(platform.get("architecture"))) if isinstance(platform, dict) else None
        if arch:
            entries[arch] = Descriptor.from_json(entry)
    return entries
