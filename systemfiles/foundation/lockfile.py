"""versions.lock: what rolling versions were resolved to, so that they move only when someone says so.

JSON, portable (no paths of this host), and only ever added to by provisioning: `kernel` and `initrd` keep every
concrete version that was ever resolved here, so that one whose files were lost can be made again from exactly the
same inputs. An initrd has a list, because several sets of inputs may give one content. What a later release adds
survives a rewrite by this one.

::

    {"schema": 1,
     "rolling": {"debian-cloud": {"x86_64": "debian-cloud-6.1.192-2"}},
     "busybox": {"busybox-static": {"x86_64": {package, version, url, size, sha256}}},
     "kernel":  {"debian-cloud-6.1.192-2": {"x86_64": {package, version, url, size, sha256}}},
     "initrd":  {"v1.0.0-3fa9c1d20b7e": {"x86_64": [{init, busybox, kernel, load, carry, inputs}]}},
     "current": {"v1.0.0-debian": {"debian-cloud-6.1.192-2": {"x86_64": "v1.0.0-3fa9c1d20b7e"}}},
     "profile": {"debian": {"x86_64": {"kernel": "debian-cloud", "initrd": "v1.0.0-debian"}}}}
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import (
    ArchKey,
    Module,
    Package,
    PinnedReference,
    Sha256,
    Url,
    VersionName,
)
from systemfiles.foundation.errors import CatalogError, StoreError
from systemfiles.foundation.files import write_file
from systemfiles.foundation.lock import Timeout, locked
from systemfiles.foundation.paths import Paths

_MEND = "restore it from a backup, or remove it: rolling names are then resolved again, to what apt has now"


class LockModel(BaseModel):
    """What the tables of versions.lock are: frozen, and keeping keys that nobody here knows."""

    model_config = ConfigDict(extra="allow", frozen=True)


class PackagePin(LockModel):
    """One package file of a distribution's archive; `size` in bytes."""

    package: Package
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+:~-]*$")]
    url: Url
    size: Annotated[int, Field(gt=0)]
    sha256: Sha256

    @property
    def inputs(self) -> dict[str, Any]:
        """What it is to whatever is made from it; where it was fetched from is no part of that."""
        return {"package": self.package, "package_version": self.version, "sha256": self.sha256}


class InitrdPin(LockModel):
    """All that a concrete initrd can be made from; `inputs` is the preimage of its content."""

    init: VersionName
    busybox: PinnedReference | PackagePin
    kernel: VersionName | None = None
    load: tuple[Module, ...] = ()
    carry: tuple[Module, ...] = ()
    inputs: dict[str, Any]


class ProfilePin(LockModel):
    """The names of a profile's pair when it was last provided here."""

    kernel: VersionName
    initrd: VersionName


class VersionsLock(BaseModel):
    """The whole file. Edit it inside `editing_lock` only."""

    model_config = ConfigDict(extra="allow")

    schema_version: Literal[1] = Field(default=1, alias="schema")
    rolling: dict[VersionName, dict[ArchKey, VersionName]] = {}
    busybox: dict[Package, dict[ArchKey, PackagePin]] = {}
    kernel: dict[VersionName, dict[ArchKey, PackagePin]] = {}
    initrd: dict[VersionName, dict[ArchKey, list[InitrdPin]]] = {}
    current: dict[VersionName, dict[VersionName, dict[ArchKey, VersionName]]] = {}
    profile: dict[VersionName, dict[ArchKey, ProfilePin]] = {}

    def find_initrd(self, inputs: dict[str, Any], arch: Arch) -> str | None:
        """The concrete initrd that was made from exactly these inputs."""
        for version, pins in sorted(self.initrd.items()):
            if any(pin.inputs == inputs for pin in pins.get(arch, ())):
                return version
        return None

    def stands_for(self, name: str, arch: Arch) -> tuple[str, ...]:
        """The concrete versions that a rolling name became here: one of a kernel, one for each kernel of an initrd."""
        kernel = self.rolling.get(name, {}).get(arch)
        initrds = {kernels[arch] for kernels in self.current.get(name, {}).values() if arch in kernels}
        return (kernel,) if kernel else tuple(sorted(initrds))

    def current_initrd(self, name: str, kernel: str, arch: Arch) -> str | None:
        """What an initrd's name became when it was last provided for this kernel."""
        return self.current.get(name, {}).get(kernel, {}).get(arch)


def read_lock(path: Path) -> VersionsLock:
    """The lock at `path`; an empty one where there is none. Raises CatalogError with every fault."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return VersionsLock()
    except IsADirectoryError as error:
        raise CatalogError(path, [("file", "is a directory")], hint=_MEND) from error
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror})"
        raise StoreError(msg) from error
    try:
        return VersionsLock.model_validate_json(raw)
    except ValidationError as error:
        faults = [(".".join(map(str, fault["loc"])) or "file", fault["msg"]) for fault in error.errors()]
        raise CatalogError(path, faults, hint=_MEND) from None


@contextlib.contextmanager
def editing_lock(paths: Paths, *, timeout: Timeout = None) -> Iterator[VersionsLock]:
    """The lock, to be changed in place; written when the block ends well and something changed."""
    with locked(paths.lock("versions"), timeout=timeout):
        lock = read_lock(paths.versions_lock)
        before = _serialise(lock)
        yield lock
        if (after := _serialise(lock)) != before or not paths.versions_lock.exists():
            write_file(paths.versions_lock, after, scratch=paths.tmp, mode=0o644)


def _serialise(lock: VersionsLock) -> bytes:
    return json.dumps(lock.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True).encode() + b"\n"
