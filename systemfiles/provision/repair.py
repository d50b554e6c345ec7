"""Making whole what was found damaged: from the content store, whatever any catalog says now, or from its origin."""

from __future__ import annotations

from collections.abc import Iterator

from systemfiles.content.artifacts import Artifact
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import AptBusybox, Catalog
from systemfiles.foundation.errors import IntegrityError, NotProvisioned, SystemFilesError
from systemfiles.foundation.lockfile import PackagePin
from systemfiles.foundation.paths import INITRD, KERNEL
from systemfiles.provision.provisioner import Provisioner


def repair(provisioner: Provisioner, catalog: Catalog) -> Iterator[SystemFilesError]:
    """Provides every version that is on record here again, kernels first; yields why one of them could not be.

    What is intact is kept as it is. Damage must be known already: `SystemFiles.verify` drops the stamps of changed
    files and the blobs that are none any more.
    """
    for version, arch in provisioner.store.recorded(KERNEL):
        try:
            if not provisioner.recover(KERNEL, version, arch):
                provisioner.kernels.provide(version, arch)
        except SystemFilesError as error:
            yield error
    for source, arch in _base_images(provisioner, catalog):
        try:
            provisioner.images.repair(source, arch)
        except SystemFilesError as error:
            yield error
    for version, arch in provisioner.store.recorded(INITRD):
        try:
            if not provisioner.recover(INITRD, version, arch):
                provisioner.initrds.provide(version, _kernel_for(provisioner, version, arch), arch)
        except SystemFilesError as error:
            yield error
    provisioner.write_manifest()


def _base_images(provisioner: Provisioner, catalog: Catalog) -> Iterator[tuple[PackagePin | str, Arch]]:
    """Where the base images come from that may have been fetched here."""
    for entry in catalog.initrd.values():
        if not isinstance(entry.busybox, AptBusybox):
            yield from ((entry.busybox, arch) for arch in Arch)
    lock = provisioner.rolling.read()
    for packages in lock.busybox.values():
        yield from ((pin, arch) for arch, pin in packages.items())
    for initrds in lock.initrd.values():
        yield from ((pin.busybox, arch) for arch, pins in initrds.items() for pin in pins)


def _kernel_for(provisioner: Provisioner, initrd: str, arch: Arch) -> Artifact:
    """The kernel that an initrd was provided for, else any: an initrd without modules goes with all of them."""
    known = provisioner.initrds.kernel_of(initrd, arch)
    candidates = [known] if known else [version for version, of in provisioner.store.recorded(KERNEL) if of is arch]
    for version in candidates:
        try:
            return provisioner.store.artifacts.load(KERNEL, version, arch)
        except (IntegrityError, NotProvisioned):
            continue
    raise NotProvisioned(INITRD, initrd, arch.value, looked_in=provisioner.store.layout.root)
