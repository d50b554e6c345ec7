"""Initrds: what a name means today, then kept, recovered, or built for a kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from systemfiles.content.artifacts import MODULES, Artifact, boot_file
from systemfiles.content.store import changes
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import AptBusybox
from systemfiles.foundation.errors import (
    IncompatiblePair,
    IntegrityError,
    NotProvisioned,
    UnknownVersion,
    VersionConflict,
)
from systemfiles.foundation.lockfile import InitrdPin, PackagePin, editing_lock
from systemfiles.foundation.paths import INITRD
from systemfiles.foundation.units import human_size
from systemfiles.provision.images import Images
from systemfiles.provision.site import BLOB, RECOVERED, Made, Site, new_record
from systemfiles.recipes.initrd import InitrdBuild, build_initrd, initrd_inputs


class InitrdPlan(NamedTuple):
    """What an initrd's name means today. `version` is None for content that was never built here."""

    version: str | None
    pin: InitrdPin | None
    kernel: Artifact

    @property
    def inputs(self) -> dict[str, Any] | None:
        return self.pin.inputs if self.pin else None


class Initrds:
    """Provides initrds and the base images they are built on. Safe to share among threads and processes."""

    def __init__(self, site: Site, images: Images) -> None:
        self._site = site
        self._images = images

    def concrete(self, name: str, kernel: Artifact, arch: Arch) -> str | None:
        """The concrete version of an initrd's name for `kernel`; None for one that was never built here."""
        if self._site.rolling.missing([], [name], arch)[1]:
            return None
        return self._plan(name, kernel, arch).version

    def is_locked(self, name: str, initrd: Artifact, arch: Arch) -> bool:
        """Whether versions.lock has what is needed to build a rolling initrd again."""
        entry = self._site.catalog.initrd.get(name)
        return entry is None or not entry.rolling or arch in self._site.rolling.read().initrd.get(initrd.version, {})

    def kept(self, name: str, kernel: Artifact, arch: Arch) -> Artifact | None:
        """The initrd called `name` for `kernel` when nothing is to do for it. Raises as `initrd`."""
        if self._site.rolling.missing([], [name], arch)[1]:
            return None
        return self._kept(self._plan(name, kernel, arch), arch)

    def provide(
        self, name: str, kernel: Artifact, arch: Arch, *, newer: Mapping[str, PackagePin] | None = None
    ) -> Made:
        """The initrd called `name` that goes with `kernel`, intact on disk.

        `newer` busybox packages are taken before those of versions.lock.
        Raises as `kernel`, and IncompatiblePair for one that carries another kernel's modules.
        """
        if newer is None:
            self._site.rolling.resolve([], [name], arch)
        plan = self._plan(name, kernel, arch, newer)
        if kept := self._kept(plan, arch):
            return Made(kept, self._lock_again(name, plan, kept, arch))
        with self._site.locked(INITRD, plan.version or name, arch):
            plan = self._plan(name, kernel, arch, newer)
            if kept := self._kept(plan, arch):
                return Made(kept, "")
            if plan.version and (recovered := self._site.store.recover(INITRD, plan.version, arch, plan.inputs)):
                return Made(recovered, RECOVERED)
            if plan.pin is None:
                raise UnknownVersion(INITRD, name, known=self._site.catalog.initrd)
            return self._make(name, plan.version, plan.pin, kernel, arch)

    def kept_busybox(self, name: str, arch: Arch) -> bool:
        """Whether the base image of the initrd called `name` is in the content store."""
        if name not in self._site.catalog.initrd:
            return True  # a version that only the disk or versions.lock knows brings its own
        if self._site.rolling.missing([], [name], arch)[1]:
            return False
        return self._images.kept(self._busybox_of(name, arch), arch) is not None

    def busybox(self, name: str, arch: Arch) -> str:
        """Provides the base image of the initrd called `name`; returns what it took. Raises as `initrd`."""
        self._site.rolling.resolve([], [name], arch)
        layers = self._images.busybox(self._busybox_of(name, arch), arch)
        return f"{human_size(sum(layer.stat().st_size for layer in layers))} in the content store"

    def _plan(
        self, name: str, kernel: Artifact, arch: Arch, newer: Mapping[str, PackagePin] | None = None
    ) -> InitrdPlan:
        if name not in self._site.catalog.initrd:
            return InitrdPlan(name, self._site.rolling.read().initrd.get(name, {}).get(arch), kernel)
        entry = self._site.catalog.initrd[name]
        source = self._busybox_of(name, arch, newer)
        modular = MODULES in kernel.files and bool(entry.load or entry.carry)
        pin = InitrdPin(
            init=entry.init,
            busybox=source,
            kernel=kernel.version if modular else None,
            load=entry.load if modular else (),
            carry=entry.carry if modular else (),
            inputs=initrd_inputs(
                init=entry.init,
                busybox=_busybox_inputs(source),
                kernel={"modules": kernel.files[MODULES].sha256} if modular else None,
                load=entry.load,
                carry=entry.carry,
            ),
        )
        version = self._find(pin, arch) if entry.rolling else name
        return InitrdPlan(version, pin, kernel)

    def _busybox_of(self, name: str, arch: Arch, newer: Mapping[str, PackagePin] | None = None) -> PackagePin | str:
        busybox = self._site.catalog.initrd[name].busybox
        if not isinstance(busybox, AptBusybox):
            return busybox
        return (newer or {}).get(busybox.apt) or self._site.rolling.read().busybox[busybox.apt][arch]

    def _find(self, pin: InitrdPin, arch: Arch) -> str | None:
        """The concrete version that was made from exactly these inputs, as the lock or else the disk knows it."""
        if known := self._site.rolling.read().find_initrd(pin.inputs, arch):
            return known
        for version, there in self._site.store.artifacts.versions(INITRD):
            if there is arch and version.startswith(f"{pin.init}-"):
                with contextlib.suppress(IntegrityError, NotProvisioned):
                    if self._site.store.artifacts.load(INITRD, version, arch).inputs == pin.inputs:
                        return version
        return None

    def _kept(self, plan: InitrdPlan, arch: Arch) -> Artifact | None:
        if plan.version is None:
            return None
        kept = self._site.store.kept(INITRD, plan.version, arch, plan.inputs)
        if kept is not None and not kept.fits(plan.kernel):
            raise IncompatiblePair(plan.kernel.version, plan.version, requires=str(kept.requires_kernel))
        return kept

    def _make(self, name: str, version: str | None, pin: InitrdPin, kernel: Artifact, arch: Arch) -> Made:
        layout = self._site.store.layout
        with ExitStack() as stack:
            layers = [stack.enter_context(path.open("rb")) for path in self._images.busybox(pin.busybox, arch)]
            out = stack.enter_context(layout.new_file())
            modules = kernel.directory / MODULES if pin.kernel else None
            build = build_initrd(layers, out, init=pin.init, modules=modules, load=pin.load, carry=pin.carry)
            files = {boot_file(INITRD, arch): layout.add(out, BLOB)}
        concrete = f"{pin.init}-{build.content_sha256[:12]}"
        if version not in (None, concrete) and version not in self._site.catalog.initrd:
            raise VersionConflict(INITRD, version or "", arch.value, changes={"content": (version, concrete)})
        version = version or concrete
        record = {**new_record(INITRD, version, arch, files, pin.inputs), **_facts(build, pin)}
        known = self._learn(name, version, pin, arch)
        artifact = self._site.store.put(record, files)
        note = f"{human_size(files[artifact.file].size)}, {build.entries} entries, {len(build.modules)} modules"
        why = changes(known.model_dump(mode="json"), pin.model_dump(mode="json")) if known else {}
        return Made(artifact, note + "".join(f"\n   {key}: {old} → {new}" for key, (old, new) in why.items()))

    def _lock_again(self, name: str, plan: InitrdPlan, kept: Artifact, arch: Arch) -> str:
        """Writes a rolling initrd that is on disk into a versions.lock that was lost."""
        if plan.pin is None or self.is_locked(name, kept, arch):
            return ""
        self._learn(name, kept.version, plan.pin, arch)
        return "versions.lock knows it again"

    def _learn(self, name: str, version: str, pin: InitrdPin, arch: Arch) -> InitrdPin | None:
        """Keeps what a rolling initrd was made from; returns the same of the one it follows."""
        with editing_lock(self._site.paths, timeout=self._site.timeout) as lock:
            before = lock.rolling.get(name, {}).get(arch)
            if version != name:
                lock.rolling.setdefault(name, {})[arch] = version
                lock.initrd.setdefault(version, {})[arch] = pin
            return lock.initrd.get(before or "", {}).get(arch)


def _facts(build: InitrdBuild, pin: InitrdPin) -> dict[str, Any]:
    return {
        "content_sha256": build.content_sha256,
        "content_size": build.content_size,
        "requires_kernel": pin.kernel,
        "entries": build.entries,
        "modules": list(build.modules),
        "compressor": build.compressor,
        "source": pin.model_dump(mode="json", include={"busybox"}),
    }


def _busybox_inputs(source: PackagePin | str) -> dict[str, Any]:
    if isinstance(source, PackagePin):
        return {"package": source.package, "package_version": source.version, "sha256": source.sha256}
    return {"image": source.rpartition("@")[2]}
