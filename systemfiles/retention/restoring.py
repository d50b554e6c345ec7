"""What a pin, or a VM's own record of its boot files, names: exactly that content, or an error that says what differs.

The start of a VM from a snapshot waits for this, so as long as the files are intact nothing heavy is imported, no
catalog is read, and nothing is written that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from systemfiles.bootfiles import BootFiles, InitrdFile, KernelFile
from systemfiles.content.artifacts import Artifact, Artifacts
from systemfiles.content.store import identity_of
from systemfiles.foundation.errors import IntegrityError, NotProvisioned, SnapshotMismatch
from systemfiles.foundation.paths import INITRD, KERNEL
from systemfiles.retention.pins import PinnedFile, Pins

if TYPE_CHECKING:
    from systemfiles.provision.provisioner import Provisioner

Differences = dict[str, tuple[object, object]]

ELSEWHERE = "a version has one content for ever: what is here under that name came from elsewhere"


def restore(
    pinned: str | Mapping[str, Any],
    pins: Pins,
    artifacts: Artifacts,
    provisioner: Callable[[], Provisioner],
    *,
    hypervisor: str | None = None,
    full: bool = False,
) -> tuple[Artifact, Artifact]:
    """The kernel and the initrd that a pin or a record of boot files names, intact. Raises as `SystemFiles.restore`."""
    if isinstance(pinned, str):
        pin = pins.get(pinned)
        name, recorded, (kernel, initrd) = f"pin {pinned}", pin.hypervisor, pin.files
    else:
        boot = BootFiles.from_dict(pinned)
        name, recorded, (kernel, initrd) = "the record", pinned.get("hypervisor"), (_named(part) for part in boot)
    different: Differences = {}
    if hypervisor not in (None, recorded):
        different["hypervisor"] = (recorded or "none", hypervisor)
    for file in (kernel, initrd):
        different |= _differences_on_disk(file, artifacts)
    if different:
        raise SnapshotMismatch(name, differences=different, hint=None if "hypervisor" in different else ELSEWHERE)
    try:
        return as_it_is(kernel, artifacts, full=full), as_it_is(initrd, artifacts, full=full)
    except (NotProvisioned, IntegrityError):
        from systemfiles.retention.recovery import Recovery

        recovery = Recovery(artifacts, provisioner(), name=name, full=full)
        return recovery.provide(kernel), recovery.provide(initrd, kernel)


def as_it_is(wanted: PinnedFile, artifacts: Artifacts, *, full: bool, whole: bool = False) -> Artifact:
    """The artifact that is on disk, if it is the one that is wanted; `full` reads every byte of what a VMM is given.

    With `whole` all files of it must be intact. Raises NotProvisioned, IntegrityError.
    """
    artifact = artifacts.load(wanted.kind, wanted.version, wanted.arch)
    artifacts.check(artifact, *(artifact.files if whole else ()))
    if full:
        for problem in artifacts.verify(artifact, artifact.file):
            raise problem
    if artifact.files[artifact.file].sha256 != wanted.sha256:
        # An initrd that another zlib compressed may still be the same; so far that is only what its record says.
        from systemfiles.recipes.initrd import check_content

        check_content(artifact.path, identity(wanted), subject=artifact.path)
    return artifact


def identity(file: PinnedFile) -> str:
    """What `identity_of` its record must be."""
    return file.content_sha256 or file.sha256


def differences(wanted: PinnedFile, record: Mapping[str, Any]) -> Differences:
    """How the content that a record tells of differs from the one that is wanted."""
    recorded, here = identity(wanted), identity_of(record)
    return {} if recorded == here else {f"{wanted.kind} {wanted.version} ({wanted.arch})": (recorded, here)}


def _differences_on_disk(wanted: PinnedFile, artifacts: Artifacts) -> Differences:
    try:
        return differences(wanted, artifacts.load(wanted.kind, wanted.version, wanted.arch).record)
    except (NotProvisioned, IntegrityError):
        return {}


def _named(file: KernelFile | InitrdFile) -> PinnedFile:
    """What a record of boot files names; of how it was made it says nothing."""
    kind, content = (INITRD, file.content_sha256) if isinstance(file, InitrdFile) else (KERNEL, None)
    return PinnedFile(kind, file.version, file.arch, file.sha256, file.size, {"files": {}}, content)
