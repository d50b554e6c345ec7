"""The documents that go with an artifact (see content/packaging.py), written by what comes with the extra `release`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from systemfiles.content.artifacts import Artifact
from systemfiles.content.packaging import PROVENANCE, SBOM, Document
from systemfiles.foundation.errors import ToolMissing


def require_origin(*, builder: str, when: int, source: str | None) -> None:
    """Refuses what `documents` would, before anything is built. Raises UsageError, ToolMissing."""
    with _writers():
        from systemfiles.release import sbom
        from systemfiles.release.provenance import check_origin

        assert sbom
        check_origin(builder=builder, when=when, source=source)


@contextlib.contextmanager
def _writers() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = f"the Python package {error.name}"
        raise ToolMissing(package, hint="pip install 'systemfiles[release]'") from error


def documents(artifact: Artifact, *, builder: str, when: int, source: str | None) -> dict[Document, bytes]:
    """Every document about `artifact`. Arguments and errors are those of `sbom` and `provenance`, and ToolMissing."""
    with _writers():
        from systemfiles.release.provenance import provenance
        from systemfiles.release.sbom import sbom
    return {
        SBOM: sbom(artifact, when=when),
        PROVENANCE: provenance(artifact, builder=builder, when=when, source=source),
    }
