"""Versions that were built elsewhere: taken from the registries that the catalog names, if they may be trusted.

A version is `<registry>/<kind>:<version>`, an index (see content/packaging.py). Where the catalog names trusted keys,
one of them must have signed that index, it must say itself that it is this version, and the documents it promises must
be there: so no other version can be passed off as this one, and nothing of it be exchanged or left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from systemfiles.content.artifacts import Artifact
from systemfiles.content.packaging import DOCUMENTS, VERSION, artifact_type
from systemfiles.content.store import identity_of
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    IntegrityError,
    InvalidDigest,
    SignatureRefused,
    SourceError,
    SourceUnavailable,
    blaming,
)
from systemfiles.foundation.kernelimage import check_kernel
from systemfiles.foundation.manifests import Manifest, choose
from systemfiles.foundation.paths import INITRD, KERNEL
from systemfiles.foundation.units import human_size, printable
from systemfiles.provision.images import Images
from systemfiles.provision.site import Made, Site
from systemfiles.recipes.initrd import check_content

if TYPE_CHECKING:
    from systemfiles.sources.oci import Repository
    from systemfiles.sources.signatures import Trust

log = logging.getLogger(__name__)

_MOST_SIGNATURES = 32
_REFUSED = "it was refused"
_NOT_BUILT = "publish it there, or let it be built here: systemfiles provision, without build = false in the catalog"
_NO_REGISTRY = 'name one: $SYSTEMFILES_REGISTRY, or registries = ["…"] in a catalog'


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
        tried: list[tuple[str, str]] = []
        wrong: IntegrityError | None = None
        for registry in self._site.catalog.registries:
            try:
                artifact = self._take(
                    f"{registry}/{kind}:{version}", kind, version, arch, inputs=inputs, content=content
                )
            except IntegrityError as error:
                wrong = error
                log.warning("%s", error.summary)
            except SourceUnavailable as error:
                tried += error.tried
            except SourceError as error:
                tried.append((registry, error.summary))
            else:
                size = sum(facts.size for facts in artifact.files.values())
                return Made(artifact, f"{human_size(size)} fetched from {registry}")
        if wrong is not None:
            raise wrong
        subject = f"{kind} {version} ({arch})"
        if self._site.catalog.build is False:
            hint = _NOT_BUILT if tried else _NO_REGISTRY
            raise SourceUnavailable(subject, tried=tried or [("registries", "none is configured")], hint=hint)
        if tried:
            log.warning("no registry has %s: %s", subject, "; ".join(f"{where}: {why}" for where, why in tried))
        return None

    def recover(
        self, reference: str, kind: str, version: str, arch: Arch, *, sums: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Takes in what a registry has as `reference`, if it is this version with the content that was promised.

        `sums` is what its record must say of its files, unless empty. A promise is worth more than a signature, which
        is not asked for. Raises SourceError, IntegrityError, UsageError, VersionConflict, StoreError.
        """
        with self._site.locked(kind, version, arch):
            if not self._site.store.kept(kind, version, arch, None):  # else somebody else was here first
                self._take(reference, kind, version, arch, sums=sums)

    def _take(
        self,
        reference: str,
        kind: str,
        version: str,
        arch: Arch,
        *,
        inputs: Mapping[str, Any] | None = None,
        sums: Mapping[str, Mapping[str, Any]] | None = None,
        content: str = "",
    ) -> Artifact:
        store = self._site.store

        def accept(repository: Repository, found: Manifest) -> None:
            if sums is None:
                self._require_trusted(repository, found, kind, version, arch)

        record, files = store.describe(self._images.fetch(reference, arch, accept=accept))
        got: object = "{kind} {version} ({arch})".format(**record)
        expected: object = f"{kind} {version} ({arch})"
        if got == expected and sums:
            got, expected = record["files"], sums
        if got == expected and not identity_of(record).startswith(content):
            got, expected = identity_of(record), f"a sha256 that begins with {content}"
        if got != expected:
            raise IntegrityError(reference, expected=expected, got=got, consequence=_REFUSED)
        boot = store.layout.blob(files[INITRD if kind == INITRD else arch.kernel_file].digest)
        if kind == KERNEL:
            with blaming(reference):
                check_kernel(boot, arch)
        else:
            check_content(boot, record["content_sha256"], subject=reference)
        store.require_inputs(record, inputs)
        return store.put(record, files)

    # ── trust ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _require_trusted(self, repository: Repository, found: Manifest, kind: str, version: str, arch: Arch) -> None:
        if self._site.catalog.trust is None:
            return
        subject = f"{repository.name}@{found.digest}"
        self._require_signed(repository, found.digest, subject)
        notes = found.value.get("annotations")
        said = (found.value.get("artifactType"), notes.get(VERSION) if isinstance(notes, dict) else None)
        if said != (artifact_type(kind), version):
            got = printable(f"{said[0]} {said[1]}")[:200]
            raise SignatureRefused(subject, expected=f"{artifact_type(kind)} {version}", got=got, consequence=_REFUSED)
        self._require_documents(repository, choose(found, arch, subject=subject)[0], subject)

    def _require_signed(self, repository: Repository, digest: Digest, subject: str) -> None:
        from systemfiles.sources.signatures import tag_of
        from systemfiles.sources.transport import Answered

        trust = self._trust()
        expected = "a signature of a trusted key"
        try:
            layers = repository.manifest(tag_of(digest)).value.get("layers")
        except Answered as error:
            if error.temporary or error.status not in (400, 404):
                raise
            raise SignatureRefused(subject, expected=expected, got="no signature", consequence=_REFUSED) from error
        faults = dict[str, None]()
        for layer in (layers if isinstance(layers, list) else [])[:_MOST_SIGNATURES]:
            fault = _fault(repository, trust, digest, layer)
            if fault is None:
                return
            faults[fault] = None
        got = "; ".join(faults) or "no signature"
        raise SignatureRefused(subject, expected=expected, got=got, consequence=_REFUSED)

    def _trust(self) -> Trust:
        from systemfiles.sources.signatures import PublicKey, Trust

        told = self._site.catalog.trust
        assert told is not None
        return Trust(map(PublicKey.read, told.keys), told.revoked)

    def _require_documents(self, repository: Repository, entry: Mapping[str, Any], subject: str) -> None:
        """Refuses a version whose documents, of which its index tells, are not there any more."""
        from systemfiles.sources.transport import Answered

        notes = entry.get("annotations")
        for name, annotation in DOCUMENTS.items():
            try:
                promised = Digest.parse(str(notes.get(annotation) if isinstance(notes, dict) else None))
                (document,) = repository.manifest(promised).value["layers"]
                there = repository.has_blob(Digest.parse(document["digest"]))
            except Answered as error:
                if error.status != 404:
                    raise
                there = False
            except (InvalidDigest, KeyError, TypeError, ValueError):
                there = False
            if not there:
                raise SignatureRefused(
                    subject, expected=f"the {name} that its index promises", got="none", consequence=_REFUSED
                )


def _fault(repository: Repository, trust: Trust, digest: Digest, layer: object) -> str | None:
    """Why the signature in one layer does not count; None when it does."""
    from systemfiles.sources.transport import Answered

    notes = layer.get("annotations") if isinstance(layer, dict) else None
    if not isinstance(layer, dict) or not isinstance(notes, dict):
        return "one is no signature"
    try:
        data = repository.small_blob(Digest.parse(str(layer.get("digest"))))
    except (Answered, InvalidDigest, IntegrityError) as error:
        return f"one cannot be read ({printable(str(error).splitlines()[0])[:100]})"
    return trust.fault(digest, data, notes)
