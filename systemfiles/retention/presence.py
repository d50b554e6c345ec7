"""What can be seen of pinned files without reading or writing any: whether they are there, and as they were checked."""

from __future__ import annotations

from collections.abc import Iterable

from systemfiles.content.artifacts import Artifacts
from systemfiles.foundation.errors import IntegrityError, NotProvisioned
from systemfiles.retention.pins import Pin, PinnedFile
from systemfiles.retention.reasons import id_of_file


def faults(pins: Iterable[Pin], artifacts: Artifacts) -> dict[str, str]:
    """By asset id, what is wrong with those that are pinned: only those that something is wrong with."""
    held = {id_of_file(file): (file, pin.name) for pin in pins for file in pin.files}
    return {
        asset: f"{fault}: see `systemfiles restore {name} --full`"
        for asset, (file, name) in held.items()
        if (fault := _fault(file, artifacts))
    }


def _fault(file: PinnedFile, artifacts: Artifacts) -> str:
    try:
        artifact = artifacts.load(file.kind, file.version, file.arch)
    except NotProvisioned:
        return "it is not there"
    except IntegrityError:
        return "its record is damaged"
    try:
        return "" if artifacts.is_as_checked(artifact, artifact.file) else "its file is not as it was checked last"
    except NotProvisioned:
        return "its file is not there"
    except IntegrityError as error:
        return f"its file has {error.got} instead of {error.expected}"
