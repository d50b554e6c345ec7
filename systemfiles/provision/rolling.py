"""Rolling versions: what the host's apt says a name is now, kept in versions.lock until an update moves it.

A concrete kernel is called after its entry and its package's version: `debian-cloud` at 6.1.192-2 becomes
`debian-cloud-6.1.192-2`. What a version name may not hold is written as `_p` for "+", `_t` for "~", `_c` for ":" and
`_u` before a letter that was upper case; Debian's versions never hold "_", so no two meet in one name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import AptBusybox, Catalog
from systemfiles.foundation.errors import SourceUnavailable, VersionConflict
from systemfiles.foundation.files import scratch_dir
from systemfiles.foundation.lock import Timeout, locked, patience
from systemfiles.foundation.lockfile import PackagePin, ProfilePin, VersionsLock, editing_lock, read_lock
from systemfiles.foundation.paths import KERNEL, Paths, check_version
from systemfiles.sources.apt import Apt, Package

log = logging.getLogger(__name__)

_ESCAPES = {"+": "_p", "~": "_t", ":": "_c"}


def name_of_version(version: str) -> str:
    """A distribution's version as a part of a version name; different versions stay different."""
    return re.sub(r"[+~:A-Z]", lambda match: _ESCAPES.get(match[0], f"_u{match[0].lower()}"), version)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What rolling names are now: kernel entries to (concrete version, package), busybox packages to package."""

    kernels: Mapping[str, tuple[str, PackagePin]]
    busyboxes: Mapping[str, PackagePin]


@dataclass(frozen=True, slots=True)
class Move:
    """One rolling name that an update moved; `before` is None for a name that was new here."""

    name: str
    before: str | None
    after: str


NO_LOCK = (
    "bring the versions.lock of the release here, "
    "or let it be built here: systemfiles provision, without build = false in the catalog"
)


class Rolling:
    """The rolling names of one catalog in one data directory."""

    def __init__(self, paths: Paths, catalog: Catalog, *, timeout: Timeout = None) -> None:
        self._paths = paths
        self._catalog = catalog
        self._timeout = timeout

    def read(self) -> VersionsLock:
        """versions.lock as it is now."""
        return read_lock(self._paths.versions_lock)

    def concrete_kernel(self, name: str, arch: Arch) -> str | None:
        """The concrete version of a kernel name; None for a rolling one that was never resolved here."""
        entry = self._catalog.kernel.get(name)
        if entry is None or not entry.rolling:
            return name
        return self.read().rolling.get(name, {}).get(arch)

    def is_noted(self, kernel: str, initrd: str, arch: Arch) -> bool:
        """Whether versions.lock has this pair for each profile whose names these are."""
        names = self._profiles(kernel, initrd)
        noted = self.read().profile if names else {}
        pair = ProfilePin(kernel=kernel, initrd=initrd)
        return all(noted.get(name, {}).get(arch) == pair for name in names)

    def note(self, kernel: str, initrd: str, arch: Arch) -> None:
        """Notes of which profiles this is the pair, so that it is kept whatever catalog a collection is told of."""
        if self.is_noted(kernel, initrd, arch):
            return
        with editing_lock(self._paths, timeout=self._timeout) as lock:
            for name in self._profiles(kernel, initrd):
                lock.profile.setdefault(name, {})[arch] = ProfilePin(kernel=kernel, initrd=initrd)

    def _profiles(self, kernel: str, initrd: str) -> list[str]:
        profiles = self._catalog.profile.items()
        return [name for name, profile in profiles if (profile.kernel, profile.initrd) == (kernel, initrd)]

    def missing(self, kernels: Iterable[str], initrds: Iterable[str], arch: Arch) -> tuple[list[str], list[str]]:
        """Of these entries, the rolling kernels and the busybox packages that versions.lock has nothing for."""
        lock = self.read()
        packages = self._busybox_packages(initrds)
        return (
            [name for name in self._rolling_kernels(kernels) if arch not in lock.rolling.get(name, {})],
            [package for package in packages if arch not in lock.busybox.get(package, {})],
        )

    def resolve(self, kernels: Iterable[str], initrds: Iterable[str], arch: Arch) -> tuple[Move, ...]:
        """Asks apt for whatever of these versions.lock has nothing for. Returns at once when that is nothing.

        Raises SourceUnavailable, SourceRefused, ToolMissing, UnsupportedArch.
        """
        names, packages = self.missing(kernels, initrds, arch)
        if not names and not packages:
            return ()
        self._require_builds([*names, *packages])
        with self.asking():
            # whoever waited here finds what the other one has settled
            names, packages = self.missing(kernels, initrds, arch)
            if not names and not packages:
                return ()
            resolved, _ = self._ask(names, packages, arch)
            return self.settle(resolved, arch)

    def _require_builds(self, names: list[str]) -> None:
        """A host that builds nothing is told what rolling names are by the release that it takes. Raises."""
        if self._catalog.build is False:
            tried = [("versions.lock", "only the one of a release says that here (build = false)")]
            raise SourceUnavailable(" and ".join(names), tried=tried, wanted="told", hint=NO_LOCK)

    def asking(self) -> AbstractContextManager[None]:
        """The lock under which apt is asked and names are moved to what it said. Raises LockTimeout."""
        return locked(self._paths.lock("rolling"), timeout=self._timeout)

    def newest(self, kernels: Iterable[str], initrds: Iterable[str], arch: Arch) -> Resolved:
        """What apt says these are now. versions.lock learns the concrete versions, but no name moves yet.

        Raises as `resolve`, and when a part of apt's sources could not be read and the rest would move something.
        """
        names, packages = self._rolling_kernels(kernels), self._busybox_packages(initrds)
        if not names and not packages:
            return Resolved({}, {})
        self._require_builds([*names, *packages])
        resolved, failed = self._ask(names, packages, arch)
        moves = self._moves(resolved, self.read(), arch)
        if failed and any(move.before for move in moves):
            # an unreachable security archive would make the older version of the main one look new
            raise SourceUnavailable(
                " and ".join(move.name for move in moves),
                tried=[("apt", line) for line in failed],
                hint="nothing was moved; mend the host's apt sources (apt-get update) and update again",
            )
        with editing_lock(self._paths, timeout=self._timeout) as lock:
            _learn(lock, resolved, arch)
        return resolved

    def settle(self, resolved: Resolved, arch: Arch) -> tuple[Move, ...]:
        """Moves the names to what they were resolved to."""
        with editing_lock(self._paths, timeout=self._timeout) as lock:
            moves = self._moves(resolved, lock, arch)
            _learn(lock, resolved, arch)
            for name, (version, _) in resolved.kernels.items():
                lock.rolling.setdefault(name, {})[arch] = version
            for package, pin in resolved.busyboxes.items():
                lock.busybox.setdefault(package, {})[arch] = pin
        return moves

    def _ask(self, names: Iterable[str], packages: Iterable[str], arch: Arch) -> tuple[Resolved, tuple[str, ...]]:
        with scratch_dir(self._paths.tmp) as state:
            apt = Apt(arch, state)
            apt.update()
            patience(self._timeout).check()  # what an interrupted apt has fetched is not all there is
            kernels = {}
            for name in names:
                pin = _pin(apt.locate_kernel(self._catalog.find_kernel(name, arch).apt[arch]))
                kernels[name] = (check_version(KERNEL, f"{name}-{name_of_version(pin.version)}"), pin)
            busyboxes = {package: _pin(apt.locate(package)) for package in packages}
        return Resolved(kernels, busyboxes), apt.failed_sources

    def _moves(self, resolved: Resolved, lock: VersionsLock, arch: Arch) -> tuple[Move, ...]:
        now = {name: (lock.rolling.get(name, {}).get(arch), new) for name, (new, _) in resolved.kernels.items()}
        for package, pin in resolved.busyboxes.items():
            old = lock.busybox.get(package, {}).get(arch)
            now[package] = (old.version if old else None, pin.version)
        return tuple(Move(name, old, new) for name, (old, new) in sorted(now.items()) if old != new)

    def _rolling_kernels(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self._catalog.kernel and self._catalog.kernel[name].rolling]

    def _busybox_packages(self, initrds: Iterable[str]) -> list[str]:
        entries = (self._catalog.initrd[name] for name in initrds if name in self._catalog.initrd)
        return sorted({entry.busybox.apt for entry in entries if isinstance(entry.busybox, AptBusybox)})


def _pin(package: Package) -> PackagePin:
    return PackagePin(
        package=package.name, version=package.version, url=package.url, size=package.size, sha256=package.sha256
    )


def _learn(lock: VersionsLock, resolved: Resolved, arch: Arch) -> None:
    """Adds the concrete kernels. An archive that has other bytes under a known version is not believed."""
    for version, pin in resolved.kernels.values():
        known = lock.kernel.setdefault(version, {}).setdefault(arch, pin)
        if known.sha256 != pin.sha256:
            raise VersionConflict(KERNEL, version, arch.value, changes={"sha256": (known.sha256, pin.sha256)})
