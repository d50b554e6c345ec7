"""Where everything is. No other module spells a path of the data directory.

::

    {data_dir}/
    ├── system/
    │   ├── kernel/<version>/<arch>/   vmlinux or Image, modules.tar, artifact.json, stamp.json
    │   ├── initrd/<version>/<arch>/   initrd, artifact.json, stamp.json
    │   ├── pins/<name>.json           what must not go, whatever the registry says
    │   ├── store.json                 which store this is in its registry
    │   ├── versions.lock              what rolling versions were resolved to
    │   ├── oci-cache/                 an OCI image layout: oci-layout, index.json, blobs/sha256/<hex>
    │   └── SHA256SUMS                 for `sha256sum -c`
    ├── registry.sqlite                assets, leases, tombstones; or in PostgreSQL, by $SYSTEMFILES_DATABASE_URL
    ├── logs/boot-<kernel>-<initrd>-<arch>.log   what guests wrote when a boot check failed
    ├── collected.jsonl                what collections removed: one JSON object for each line
    └── tmp/, locks/                   never needed after a crash
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import InvalidName, StoreError, UsageError

VERSION_RULE = "a-z, 0-9, '.', '_', '-'; a letter or digit first; at most 96 characters"
_VERSION = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")

KERNEL = "kernel"
INITRD = "initrd"
KINDS = (KERNEL, INITRD)
CONTENT_STORE = "oci-cache"
"""Its directory, and the lock under which index.json is rewritten."""
_SYSTEM, _TMP, _LOCKS = "system", "tmp", "locks"
_REGISTRY, _COLLECTED = "registry.sqlite", "collected.jsonl"


def is_version(text: str) -> bool:
    """Whether `text` may be the name of a version."""
    return _VERSION.fullmatch(text) is not None


def check_version(kind: str, version: str) -> str:
    """`version` itself when it may become a file name and an OCI tag. Raises InvalidName."""
    if not is_version(version):
        raise InvalidName(kind, version, rule=VERSION_RULE)
    return version


def default_data_dir() -> Path:
    """`$SYSTEMFILES_DATA_DIR`, else /var/lib/systemfiles for root, else the user's data directory (XDG)."""
    if configured := os.environ.get("SYSTEMFILES_DATA_DIR"):
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/var/lib/systemfiles")
    from platformdirs import user_data_path  # only an unprivileged user pays for it

    return user_data_path("systemfiles")


def check_asset_path(path: str) -> str:
    """`path` itself when an asset's file may be there: relative to a data directory, and in none of what is ours.

    Raises UsageError.
    """
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or path.startswith("/") or ".." in parts:
        msg = f"{path!r:.200} is no path of an asset"
        raise UsageError(msg, details=[("allowed", "a path below the data directory, with one / between names")])
    # the database has files beside it
    if parts[0] in (_SYSTEM, _TMP, _LOCKS) or parts[0].startswith((_REGISTRY, _COLLECTED)):
        msg = f"{path!r:.200} is no path of an asset"
        raise UsageError(msg, details=[("reserved", f"{_SYSTEM}, {_TMP}, {_LOCKS}, and the registry")])
    return path


class Paths:
    """Every path under one data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.expanduser().absolute()
        self.system = self.data_dir / _SYSTEM
        self.tmp = self.data_dir / _TMP
        self.locks = self.data_dir / _LOCKS
        self.oci_cache = self.system / CONTENT_STORE
        self.sha256sums = self.system / "SHA256SUMS"
        self.pins = self.system / "pins"
        self.store = self.system / "store.json"
        self.registry = self.data_dir / _REGISTRY
        self.collected = self.data_dir / _COLLECTED
        self.versions_lock = self.system / "versions.lock"

    def require_used(self) -> None:
        """Raises StoreError where nothing ever was."""
        if not any(place.exists() for place in (self.system, self.tmp, self.locks, self.registry)):
            msg = f"nothing was ever provisioned in {self.data_dir}"
            raise StoreError(msg, hint="is this the right data directory? (--data-dir, $SYSTEMFILES_DATA_DIR)")

    def boot_log(self, name: str) -> Path:
        """Where the serial log of a boot check is kept when the contract does not hold."""
        return self.data_dir / "logs" / f"{name}.log"

    def kind(self, kind: str) -> Path:
        """The directory of all versions of a kind."""
        return self.system / kind

    def artifact(self, kind: str, version: str, arch: Arch) -> Path:
        """The directory of one version for one architecture. Raises InvalidName."""
        return self.system / kind / check_version(kind, version) / arch.value

    def asset(self, path: str) -> Path:
        """The file of an asset that is no artifact. Raises UsageError, see `check_asset_path`."""
        return self.data_dir / check_asset_path(path)

    def lock(self, name: str) -> Path:
        """The file whose lock guards `name`."""
        return self.locks / f"{re.sub(r'[^A-Za-z0-9._@-]', '_', name)}.lock"
