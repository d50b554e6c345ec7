"""The documents that go with an artifact: what they are called as files and as referrers.

Importing this is cheap; what writes a document comes with the extra `release`, and hosts that only fetch have none.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from systemfiles.content.artifacts import Artifact
from systemfiles.foundation.errors import ToolMissing


class Document(NamedTuple):
    """A kind of document: its file name beside an artifact's files, and its media type (IANA)."""

    file: str
    media_type: str


SBOM: Final = Document("sbom.cdx.json", "application/vnd.cyclonedx+json")
PROVENANCE: Final = Document("provenance.json", "application/vnd.in-toto+json")
DOCUMENTS: Final = (SBOM, PROVENANCE)


def documents(artifact: Artifact, *, builder: str, when: int, source: str | None) -> dict[Document, bytes]:
    """Every document about `artifact`. Arguments and errors are those of `sbom` and `provenance`, and ToolMissing."""
    try:
        from systemfiles.release.provenance import provenance
        from systemfiles.release.sbom import sbom
    except ModuleNotFoundError as error:
        package = f"the Python package {error.name}"
        raise ToolMissing(package, hint="pip install 'systemfiles[release]'") from error
    return {
        SBOM: sbom(artifact, when=when),
        PROVENANCE: provenance(artifact, builder=builder, when=when, source=source),
    }
