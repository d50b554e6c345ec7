"""systemfiles: versioned guest kernels and initrds for microVM hosts.

Built or downloaded once, verified, never changed, and found again exactly when a snapshot is restored months later.
"""

from typing import TYPE_CHECKING

from systemfiles.bootfiles import BootFiles, InitrdFile, KernelFile
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    AssetExists,
    AssetInUse,
    AssetNotFound,
    CatalogError,
    DigestMismatch,
    IncompatiblePair,
    IntegrityError,
    InvalidArchive,
    InvalidKernel,
    InvalidName,
    LeaseNotFound,
    LeasesLost,
    LockTimeout,
    NoSpace,
    NotProvisioned,
    PinNotFound,
    SignatureRefused,
    SizeMismatch,
    SnapshotMismatch,
    SourceError,
    SourceRefused,
    SourceUnavailable,
    StoreError,
    SystemFilesError,
    ToolFailed,
    ToolMissing,
    UnknownModule,
    UnknownVersion,
    UnsupportedArch,
    UsageError,
    VersionConflict,
)
from systemfiles.system import DefaultVersions, SystemFiles
from systemfiles.version import __version__

if TYPE_CHECKING:
    from systemfiles.content.images import Image
    from systemfiles.provision.verification import Verification
    from systemfiles.recipes.disks import DiskFormat, write_config_disk, write_overlay_disk, write_rootfs_disk
    from systemfiles.recipes.guestconfig import GuestConfig, Network, Volume
    from systemfiles.registry.leases import Lease
    from systemfiles.retention.held import HeldLease
    from systemfiles.retention.keeper import Collection
    from systemfiles.retention.pins import Pin
else:
    # for start-up: whoever only resolves paths needs none of these
    _LATER = {
        "content.images": ("Image",),
        "provision.verification": ("Verification",),
        "recipes.disks": ("DiskFormat", "write_config_disk", "write_overlay_disk", "write_rootfs_disk"),
        "recipes.guestconfig": ("GuestConfig", "Network", "Volume"),
        "registry.leases": ("Lease",),
        "retention.held": ("HeldLease",),
        "retention.keeper": ("Collection",),
        "retention.pins": ("Pin",),
    }

    def __getattr__(name):
        for module, names in _LATER.items():
            if name in names:
                from importlib import import_module

                return getattr(import_module(f"systemfiles.{module}"), name)
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)


def __dir__() -> list[str]:
    return [*__all__]


__all__ = [
    "Arch",
    "AssetExists",
    "AssetInUse",
    "AssetNotFound",
    "BootFiles",
    "CatalogError",
    "Collection",
    "DefaultVersions",
    "DigestMismatch",
    "DiskFormat",
    "GuestConfig",
    "HeldLease",
    "Image",
    "IncompatiblePair",
    "InitrdFile",
    "IntegrityError",
    "InvalidArchive",
    "InvalidKernel",
    "InvalidName",
    "KernelFile",
    "Lease",
    "LeaseNotFound",
    "LeasesLost",
    "LockTimeout",
    "Network",
    "NoSpace",
    "NotProvisioned",
    "Pin",
    "PinNotFound",
    "SignatureRefused",
    "SizeMismatch",
    "SnapshotMismatch",
    "SourceError",
    "SourceRefused",
    "SourceUnavailable",
    "StoreError",
    "SystemFiles",
    "SystemFilesError",
    "ToolFailed",
    "ToolMissing",
    "UnknownModule",
    "UnknownVersion",
    "UnsupportedArch",
    "UsageError",
    "Verification",
    "VersionConflict",
    "Volume",
    "__version__",
    "write_config_disk",
    "write_overlay_disk",
    "write_rootfs_disk",
]
