"""systemfiles: versioned guest kernels and initrds for microVM hosts.

Built or downloaded once, verified, never changed, and found again exactly when a snapshot is restored months later.
"""

from systemfiles.bootfiles import BootFiles, InitrdFile, KernelFile
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    CatalogError,
    DigestMismatch,
    IncompatiblePair,
    IntegrityError,
    InvalidArchive,
    InvalidKernel,
    InvalidName,
    LockTimeout,
    NoSpace,
    NotProvisioned,
    SizeMismatch,
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
from systemfiles.system import DefaultVersions, SystemFiles, Verification
from systemfiles.version import __version__

__all__ = [
    "Arch",
    "BootFiles",
    "CatalogError",
    "DefaultVersions",
    "DigestMismatch",
    "IncompatiblePair",
    "InitrdFile",
    "IntegrityError",
    "InvalidArchive",
    "InvalidKernel",
    "InvalidName",
    "KernelFile",
    "LockTimeout",
    "NoSpace",
    "NotProvisioned",
    "SizeMismatch",
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
    "__version__",
]
