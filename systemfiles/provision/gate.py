"""What may be taken for a published version: who must have signed it, what it must say of itself, what it may hold.

A version is an index (see content/packaging.py). Where the catalog names trusted keys, one of them must have signed
that index, it must say itself that it is this version, and the documents it promises must be there: so no other version
can be passed off as this one, and nothing of it be exchanged or left out. What is promised by a pin's record needs no
signature; then each file is that, or an initrd of that content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from systemfiles.content.artifacts import MODULES, RECORD, boot_file
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.layout import LARGEST_JSON
from systemfiles.content.packaging import DOCUMENTS, TITLE, VERSION, artifact_type
from systemfiles.content.store import changes, identity_of
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import Trust as TrustedKeys
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    IntegrityError,
    InvalidDigest,
    SignatureRefused,
    SourceRefused,
    SystemFilesError,
)
from systemfiles.foundation.manifests import INDEXES, Manifest, choose
from systemfiles.foundation.paths import KERNEL
from systemfiles.foundation.units import printable
from systemfiles.recipes.initrd import CONTENT_LIMITS

if TYPE_CHECKING:
    from systemfiles.sources.oci import Repository
    from systemfiles.sources.signatures import Trust

REFUSED = "it was refused"
_TRUST = "whose signatures count is said by keys and revoked, under [trust] in the catalog"


@dataclass(frozen=True, slots=True)
class Wanted:
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


class VersionGate:
    """Lets one published version through; see provision/pull.py."""

    def __init__(self, wanted: Wanted, trusted: TrustedKeys | None) -> None:
        self._wanted = wanted
        self._trusted = trusted if wanted.promised is None else None
        self._subject = str(wanted)

    def named(self, repository: Repository, found: Manifest) -> None:
        """Raises SignatureRefused for what is not to be trusted."""
        self._subject = f"{repository.name}@{found.digest}"
        if self._trusted is None:
            return
        try:
            self._require_trusted(repository, found)
        except SignatureRefused as error:
            self._wanted.refused.append(error)
            raise

    def holds(self, config: Descriptor, layers: Sequence[Descriptor]) -> None:
        """Raises IntegrityError for blobs that it cannot have, before they fill a disk."""
        files = {layer.annotations.get(TITLE, ""): layer for layer in layers}
        record, promised = files.pop(RECORD, None), self._wanted.promised
        boot = boot_file(self._wanted.kind, self._wanted.arch)
        known = {boot, MODULES} if self._wanted.kind == KERNEL else {boot}
        fit = files.keys() == promised["files"].keys() if promised else files.keys() <= known
        if record is None or boot not in files or not fit or len(files) + 1 != len(layers):
            names = printable(", ".join(sorted(layer.annotations.get(TITLE, "no name") for layer in layers)))
            self._refuse(f"the files of {self._wanted}, and {RECORD}", names[:200])
        for part in (config, record):
            if part.size > LARGEST_JSON:
                self._refuse(f"at most {LARGEST_JSON} bytes of JSON", f"{part.size} bytes")
        if self._wanted.kind != KERNEL and files[boot].size > (most := self._most()):
            self._refuse(f"at most {most} bytes of {boot}", f"{files[boot].size} bytes")
        for name, facts in promised["files"].items() if promised and self._wanted.kind == KERNEL else ():
            if (files[name].digest.hex, files[name].size) != (facts["sha256"], facts["size"]):
                self._refuse(f"{name} {facts['sha256']}", files[name].digest.hex)

    def _most(self) -> int:
        """How long an initrd may be: what cannot be made smaller grows by less than a hundredth (RFC 1951, 3.2.4)."""
        size = (self._wanted.promised or {}).get("content_size")
        if isinstance(size, int) and 0 < size < CONTENT_LIMITS.max_size:
            return size * 101 // 100 + 1024
        return CONTENT_LIMITS.max_size

    def _refuse(self, expected: str, got: str) -> NoReturn:
        raise IntegrityError(self._subject, expected=expected, got=got, consequence=REFUSED)

    def _require_trusted(self, repository: Repository, found: Manifest) -> None:
        subject, wanted = self._subject, self._wanted
        expected = f"{artifact_type(wanted.kind)} {wanted.version}"
        if found.media_type not in INDEXES:
            raise SignatureRefused(subject, expected=f"the index of {expected}", got="a manifest", consequence=REFUSED)
        self._require_signed(repository, found.digest)
        notes = found.value.get("annotations")
        said = f"{found.value.get('artifactType')} {notes.get(VERSION) if isinstance(notes, dict) else None}"
        if said != expected:
            raise SignatureRefused(subject, expected=expected, got=printable(said)[:200], consequence=REFUSED)
        self._require_documents(repository, choose(found, wanted.arch, subject=subject)[0])

    def _require_signed(self, repository: Repository, digest: Digest) -> None:
        from systemfiles.sources.signatures import MOST_SIGNATURES, tag_of
        from systemfiles.sources.transport import Answered

        trust = self._trust()
        faults = dict[str, None]()
        layers: object = None
        try:
            layers = repository.manifest(tag_of(digest)).value.get("layers")
        except Answered as error:
            if error.temporary or error.status not in (400, 404):
                raise
        for layer in (layers if isinstance(layers, list) else [])[:MOST_SIGNATURES]:
            fault = _fault(repository, trust, digest, layer)
            if fault is None:
                return
            faults[fault] = None
        refused = SignatureRefused(
            self._subject,
            expected="a signature of a trusted key",
            got="; ".join(faults) or "no signature",
            consequence=REFUSED,
        )
        refused.hint = _TRUST
        raise refused

    def _trust(self) -> Trust:
        from systemfiles.sources.signatures import PublicKey, Trust

        assert self._trusted is not None
        return Trust(map(PublicKey.read, self._trusted.keys), self._trusted.revoked)

    def _require_documents(self, repository: Repository, entry: Mapping[str, Any]) -> None:
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
                expected = f"the {document.file} that its index promises"
                raise SignatureRefused(self._subject, expected=expected, got="none", consequence=REFUSED)


def require_wanted(reference: str, record: Mapping[str, Any], wanted: Wanted) -> None:
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
            raise IntegrityError(reference, expected=expected, got=told, consequence=REFUSED)


def as_promised(record: Mapping[str, Any], promised: Mapping[str, Any] | None) -> Mapping[str, Any]:
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
