"""Versions that were built elsewhere: taken from the registries that the catalog names, if they may be trusted.

A version is `<registry>/<kind>:<version>`, an index (see content/packaging.py). Where the catalog names trusted keys,
one of them must have signed that index, it must say itself that it is this version, and the documents it promises must
be there: so no other version can be passed off as this one, and nothing of it be exchanged or left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from systemfiles.content.artifacts import Artifact, boot_file
from systemfiles.content.packaging import DOCUMENTS, VERSION, artifact_type
from systemfiles.content.store import changes, identity_of
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    IntegrityError,
    InvalidDigest,
    InvalidKernel,
    SignatureRefused,
    SourceError,
    SourceRefused,
    SourceUnavailable,
    StoreError,
    SystemFilesError,
    blaming,
)
from systemfiles.foundation.kernelimage import check_kernel
from systemfiles.foundation.manifests import INDEXES, Manifest, choose
from systemfiles.foundation.paths import KERNEL
from systemfiles.foundation.units import human_size, printable
from systemfiles.provision.images import Images
from systemfiles.provision.site import Made, Site
from systemfiles.recipes.initrd import check_content

if TYPE_CHECKING:
    from systemfiles.sources.oci import Repository
    from systemfiles.sources.signatures import Trust

log = logging.getLogger(__name__)

_MOST_SIGNATURES = 8
_REFUSED = "it was refused"
_NOT_BUILT = "publish it there, or let it be built here: systemfiles provision, without build = false in the catalog"
_NO_REGISTRY = 'name one: $SYSTEMFILES_REGISTRY, or registries = ["…"] in a catalog'
_TRUST = "whose signatures count is said by keys and revoked, under [trust] in the catalog"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A version for one architecture, and what is known of it before it is asked for.

    `inputs` are what it must have been made from; `content` is how the sha256 of its content begins; `promised` is its
    whole record. `refused` collects what was not trusted, by one mirror or another.
    """

    kind: str
    version: str
    arch: Arch
    inputs: Mapping[str, Any] | None = None
    content: str = ""
    promised: Mapping[str, Any] | None = None
    refused: list[SystemFilesError] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kind} {self.version} ({self.arch})"


class Published:
    """Takes published versions in. Safe to share among threads."""

    def __init__(self, site: Site, images: Images) -> None:
        self._site = site
        self._images = images

    def take(
        self, kind: str, version: str, arch: Arch, inputs: Mapping[str, Any] | None, *, content: str = ""
    ) -> Made | None:
        """This version from the first registry that has it; None when none has, and it may be built here.

        `inputs` are what it must have been made from, `content` is how the sha256 of its content begins, as far as that
        is known. Call it under the artifact's lock. Raises SignatureRefused and other IntegrityErrors, InvalidKernel,
        VersionConflict, StoreError; SourceUnavailable when it may not be built here.
        """
        wanted = _Wanted(kind, version, arch, inputs, content)
        tried: list[tuple[str, str]] = []
        wrong: SystemFilesError | None = None
        for registry in self._site.catalog.registries:
            try:
                artifact = self._take(f"{registry}/{kind}:{version}", wanted)
            except (IntegrityError, InvalidKernel) as error:
                wrong = wrong or error
                tried.append((registry, error.summary))
            except SourceUnavailable as error:
                tried += error.tried
            except SourceError as error:
                tried.append((registry, error.summary))
            else:
                if tried:
                    log.warning("%s came from %s; before that, %s", wanted, registry, _told(tried))
                size = sum(facts.size for facts in artifact.files.values())
                return Made(artifact, f"{human_size(size)} fetched from {registry}")
        if wrong is not None or wanted.refused:
            raise wrong or wanted.refused[0]
        if self._site.catalog.build is False:
            hint = _NOT_BUILT if tried else _NO_REGISTRY
            raise SourceUnavailable(str(wanted), tried=tried or [("registries", "none is configured")], hint=hint)
        if tried:
            log.warning("no registry has %s: %s", wanted, _told(tried))
        return None

    def recover(
        self, reference: str, kind: str, version: str, arch: Arch, *, promised: Mapping[str, Any] | None
    ) -> None:
        """Takes in what a registry has as `reference`, if it is this version with the content that was promised.

        `promised` is its record, where the whole of that is known: then that counts and not what the registry says, and
        no signature is needed. Raises SourceError, IntegrityError, InvalidKernel, VersionConflict, StoreError.
        """
        with self._site.locked(kind, version, arch):
            if not self._site.store.kept(kind, version, arch, None):  # else somebody else was here first
                self._take(reference, _Wanted(kind, version, arch, promised=promised))

    def _take(self, reference: str, wanted: _Wanted) -> Artifact:
        store = self._site.store

        def accept(repository: Repository, found: Manifest) -> None:
            if wanted.promised is None and self._site.catalog.trust is not None:
                try:
                    self._require_trusted(repository, found, wanted)
                except SignatureRefused as error:
                    wanted.refused.append(error)
                    raise

        pulled = self._images.fetch(reference, wanted.arch, accept=accept)
        try:
            record, files = store.describe(pulled)
        except StoreError as error:
            expected = f"the manifest of {wanted}"
            raise IntegrityError(reference, expected=expected, got=error.summary, consequence=_REFUSED) from error
        _require_wanted(reference, record, wanted)
        boot = store.layout.blob(files[boot_file(wanted.kind, wanted.arch)].digest)
        if wanted.kind == KERNEL:
            with blaming(reference):
                check_kernel(boot, wanted.arch)
        else:
            check_content(boot, record["content_sha256"], subject=reference)
        return store.put(_as_promised(record, wanted.promised), files)

    # ── trust ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _require_trusted(self, repository: Repository, found: Manifest, wanted: _Wanted) -> None:
        subject = f"{repository.name}@{found.digest}"
        expected = f"{artifact_type(wanted.kind)} {wanted.version}"
        if found.media_type not in INDEXES:
            raise SignatureRefused(subject, expected=f"the index of {expected}", got="a manifest", consequence=_REFUSED)
        self._require_signed(repository, found.digest, subject)
        notes = found.value.get("annotations")
        said = f"{found.value.get('artifactType')} {notes.get(VERSION) if isinstance(notes, dict) else None}"
        if said != expected:
            raise SignatureRefused(subject, expected=expected, got=printable(said)[:200], consequence=_REFUSED)
        self._require_documents(repository, choose(found, wanted.arch, subject=subject)[0], subject)

    def _require_signed(self, repository: Repository, digest: Digest, subject: str) -> None:
        from systemfiles.sources.signatures import tag_of
        from systemfiles.sources.transport import Answered

        trust = self._trust()
        faults = dict[str, None]()
        layers: object = None
        try:
            layers = repository.manifest(tag_of(digest)).value.get("layers")
        except Answered as error:
            if error.temporary or error.status not in (400, 404):
                raise
        for layer in (layers if isinstance(layers, list) else [])[:_MOST_SIGNATURES]:
            fault = _fault(repository, trust, digest, layer)
            if fault is None:
                return
            faults[fault] = None
        refused = SignatureRefused(
            subject,
            expected="a signature of a trusted key",
            got="; ".join(faults) or "no signature",
            consequence=_REFUSED,
        )
        refused.hint = _TRUST
        raise refused

    def _trust(self) -> Trust:
        from systemfiles.sources.signatures import PublicKey, Trust

        told = self._site.catalog.trust
        assert told is not None
        return Trust(map(PublicKey.read, told.keys), told.revoked)

    def _require_documents(self, repository: Repository, entry: Mapping[str, Any], subject: str) -> None:
        """Refuses a version whose documents, of which its index tells, are not there any more."""
        from systemfiles.sources.transport import Answered

        notes = entry.get("annotations")
        for document in DOCUMENTS:
            try:
                promised = Digest.parse(str(notes.get(document.annotation) if isinstance(notes, dict) else None))
                (content,) = repository.manifest(promised).value["layers"]
                there = repository.has_blob(Digest.parse(content["digest"]))
            except Answered as error:
                if error.status != 404:
                    raise
                there = False
            except (InvalidDigest, KeyError, TypeError, ValueError):
                there = False
            if not there:
                raise SignatureRefused(
                    subject, expected=f"the {document.file} that its index promises", got="none", consequence=_REFUSED
                )


def _told(tried: list[tuple[str, str]]) -> str:
    return "; ".join(f"{where}: {why}" for where, why in tried)


def _require_wanted(reference: str, record: Mapping[str, Any], wanted: _Wanted) -> None:
    """Refuses a record of something else than what is wanted, as far as that is known. Raises IntegrityError."""
    pairs: list[tuple[object, object]] = [
        (str(wanted), "{kind} {version} ({arch})".format(**record)),
        (wanted.content, identity_of(record)[: len(wanted.content)]),
    ]
    if wanted.inputs is not None:
        differing = changes(record["inputs"], wanted.inputs)
        pairs += [(f"{name} {new}", f"{name} {old}") for name, (old, new) in differing.items()]
    if wanted.promised is not None:
        pairs.append((identity_of(wanted.promised), identity_of(record)))
        if wanted.kind == KERNEL:  # an initrd may be compressed otherwise there
            pairs.append((wanted.promised["files"], record["files"]))
    for expected, got in pairs:
        if expected != got:
            told = printable(str(got))[:500]
            raise IntegrityError(reference, expected=expected, got=told, consequence=_REFUSED)


def _as_promised(record: Mapping[str, Any], promised: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The record that was promised, if any, of the files that are there."""
    if promised is None:
        return record
    compressed = {"compressor": str(record.get("compressor"))} if "compressor" in promised else {}
    return {**promised, "files": record["files"], **compressed}


def _fault(repository: Repository, trust: Trust, digest: Digest, layer: object) -> str | None:
    """Why the signature in one layer does not count; None when it does."""
    from systemfiles.sources.signatures import LARGEST_PAYLOAD
    from systemfiles.sources.transport import Answered

    notes = layer.get("annotations") if isinstance(layer, dict) else None
    if not isinstance(layer, dict) or not isinstance(notes, dict):
        return "one is no signature"
    try:
        data = repository.small_blob(Digest.parse(str(layer.get("digest"))), limit=LARGEST_PAYLOAD)
    except (Answered, InvalidDigest, IntegrityError, SourceRefused) as error:
        if isinstance(error, Answered) and error.temporary:
            raise
        return f"one cannot be read ({printable(str(error).splitlines()[0])[:100]})"
    return trust.fault(digest, data, notes)
