"""A kernel or an initrd as an OCI artifact: in the content store, and in registries (image-spec, manifest.md).

::

    index                               one for each version, in registries only
    ├── artifactType                    application/vnd.systemfiles.<kind>.v1
    ├── annotations                     the version
    └── manifests                       one for each architecture, with its platform
        └── manifest
            ├── artifactType            as above
            ├── config                  an image's, so that tools that know only images show the platform
            └── layers                  artifact.json without what is of one host, then the files, by name

The same record and files make the same bytes wherever that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from systemfiles.content.artifacts import RECORD
from systemfiles.content.descriptors import (
    BLOB,
    IMAGE_CONFIG,
    INDEX,
    MANIFEST,
    Descriptor,
    canonical,
    image_config,
    manifest,
)
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.units import public_url

TITLE = "org.opencontainers.image.title"
VERSION = "org.opencontainers.image.version"
EMPTY = b"{}"
"""What stands for a config that there is none of (image-spec, manifest.md, "Guidance for an Empty Descriptor")."""
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_HOST_FACTS = ("created_at", "created_by")


class Document(NamedTuple):
    """A kind of document that is published about each manifest.

    `file` is its name beside the artifact's files, `media_type` as IANA has it, `annotation` what is on the manifest's
    entry in the index: the digest of the referrer.
    """

    file: str
    media_type: str
    annotation: str


SBOM: Final = Document("sbom.cdx.json", "application/vnd.cyclonedx+json", "io.systemfiles.sbom")
PROVENANCE: Final = Document("provenance.json", "application/vnd.in-toto+json", "io.systemfiles.provenance")
DOCUMENTS: Final = (SBOM, PROVENANCE)


class Packed(NamedTuple):
    """The three documents of an artifact, and its manifest's descriptor."""

    record: bytes
    config: bytes
    manifest: bytes
    target: Descriptor


def artifact_type(kind: str) -> str:
    """The media type of a kind of artifact."""
    return f"application/vnd.systemfiles.{kind}.v1"


def without_host_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without when and by what it was made, which is of one host."""
    return {key: value for key, value in record.items() if key not in _HOST_FACTS}


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what is of one host: when and by what it was made, and how that may fetch from an origin."""
    public: dict[str, Any] = public_urls(without_host_facts(record))
    return public


def public_urls(value: Any) -> Any:
    """JSON in which no `url` has credentials. One that nobody else could fetch from stays: it says that as well."""
    if not isinstance(value, Mapping):
        return [*map(public_urls, value)] if isinstance(value, list) else value
    public = {key: public_urls(part) for key, part in value.items()}
    if isinstance(url := public.get("url"), str):
        public["url"] = public_url(url) or url
    return public


def blobs_of(record: Mapping[str, Any]) -> dict[str, Descriptor]:
    """What points to the files on record, by name, wherever they are kept as blobs."""
    return {
        name: Descriptor(BLOB, Digest.from_hex(facts["sha256"]), facts["size"])
        for name, facts in record["files"].items()
    }


def pack(record: Mapping[str, Any], files: Mapping[str, Descriptor]) -> Packed:
    """The documents of the artifact that `record` describes; `files` are its blobs, by file name."""
    media_type, arch = artifact_type(record["kind"]), Arch.parse(record["arch"])
    described = canonical(public_record(record))
    layers = [descriptor_of(described, f"{media_type}+json", {TITLE: RECORD})]
    for name, file in sorted(files.items()):  # the manifest is the same whoever writes it
        layers.append(Descriptor(f"{media_type}.file", file.digest, file.size, {TITLE: name}))
    config = image_config(arch, layers)
    data = manifest(descriptor_of(config, IMAGE_CONFIG), layers, {VERSION: record["version"]}, artifact_type=media_type)
    return Packed(described, config, data, descriptor_of(data, MANIFEST))


def pack_index(kind: str, version: str, manifests: Mapping[Arch, Descriptor]) -> bytes:
    """The index of a version's manifests, whose annotations it keeps."""
    entries = [
        {
            **target.to_json(),
            "artifactType": artifact_type(kind),
            "platform": {"architecture": arch.debian, "os": "linux"},
        }
        for arch, target in sorted(manifests.items(), key=lambda entry: entry[0].value)
    ]
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "artifactType": artifact_type(kind),
            "manifests": entries,
            "annotations": {VERSION: version},
        }
    )


def pack_document(document: Document, data: bytes, subject: Descriptor) -> bytes:
    """The manifest of a document that refers to the manifest `subject`, of which it tells something."""
    value = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": document.media_type,
        "config": descriptor_of(EMPTY, EMPTY_TYPE).to_json(),
        "layers": [descriptor_of(data, document.media_type, {TITLE: document.file}).to_json()],
        "subject": subject.to_json(),
    }
    return canonical(value)


def descriptor_of(data: bytes, media_type: str, annotations: Mapping[str, str] | None = None) -> Descriptor:
    """What points to `data`."""
    return Descriptor(media_type, Digest.of(data), len(data), annotations or {})
