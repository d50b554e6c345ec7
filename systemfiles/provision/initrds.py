"""Initrds: what a name means today, then kept, recovered, taken from a registry, or built for a kernel."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from systemfiles.content.artifacts import MODULES, Artifact, boot_file
from systemfiles.content.descriptors import BLOB
from systemfiles.content.store import changes
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import AptBusybox
from systemfiles.foundation.errors import (
    IntegrityError,
    NotProvisioned,
    SourceUnavailable,
    UnknownVersion,
    VersionConflict,
)
from systemfiles.foundation.files import storing
from systemfiles.foundation.lockfile import InitrdPin, PackagePin, editing_lock
from systemfiles.foundation.paths import INITRD, KERNEL
from systemfiles.foundation.units import human_size
from systemfiles.provision.images import Images
from systemfiles.provision.initrdpins import facts_of, inputs_of, is_named_by_content, readable, require_fit
from systemfiles.provision.published import Published
from systemfiles.provision.rolling import NO_LOCK
from systemfiles.provision.site import RECOVERED, Made, Site, new_record
from systemfiles.recipes.initrd import build_initrd

_CONTENT = re.compile(r"-([0-9a-f]{12})$")  # of a version that is named by its content


class InitrdPlan(NamedTuple):
    """What an initrd's name means today.

    `version` is None for content that was never built here. A version that is `named_by_content` may come from several
    sets of inputs; any other has one.
    """

    version: str | None
    pin: InitrdPin | None
    kernel: Artifact
    named_by_content: bool

    @property
    def inputs(self) -> dict[str, Any] | None:
        """What the version must have been made from; None when its name says it all."""
        return None if self.named_by_content or self.pin is None else self.pin.inputs


class Initrds:
    """Provides initrds and the base images they are built on. Safe to share among threads and processes."""

    def __init__(self, site: Site, images: Images, published: Published) -> None:
        self._site = site
        self._published = published
        self._images = images

    def concrete(self, name: str, kernel: Artifact, arch: Arch) -> str | None:
        """The concrete version that an initrd's name stands for with `kernel`; None when it was never provided.

        It is what today's inputs made, or else what was last provided: an update of something else, or a new release
        of this package, changes nothing before its initrd is built.
        """
        if not self._site.rolling.missing([], [name], arch)[1] and (version := self._plan(name, kernel, arch).version):
            return version
        return self._site.rolling.read().current_initrd(name, kernel.version, arch)

    def is_locked(self, name: str, initrd: Artifact, kernel: Artifact, arch: Arch) -> bool:
        """Whether versions.lock knows what is needed to find this initrd by its name, and to build it again."""
        entry = self._site.catalog.initrd.get(name)
        if entry is None or not entry.rolling:
            return True
        lock = self._site.rolling.read()
        built = arch in lock.initrd.get(initrd.version, {})
        return built and lock.current_initrd(name, kernel.version, arch) is not None

    def kernel_of(self, name: str, arch: Arch) -> str | None:
        """The kernel that a concrete initrd was provided for, as versions.lock knows it; one that is here if any is."""
        lock = self._site.rolling.read()
        known = [pin.kernel for pin in lock.initrd.get(name, {}).get(arch, ()) if pin.kernel]
        for kernels in lock.current.values():
            known += [kernel for kernel, initrds in kernels.items() if initrds.get(arch) == name]
        here = [kernel for kernel in known if self._site.store.holds(KERNEL, kernel, arch)]
        return next(iter([*here, *known]), None)

    def kept(self, name: str, kernel: Artifact, arch: Arch) -> Artifact | None:
        """The initrd called `name` for `kernel` when nothing is to do for it. Raises as `provide`."""
        if self._site.rolling.missing([], [name], arch)[1]:
            return None
        return self._kept(self._plan(name, kernel, arch), arch)

    def provide(
        self, name: str, kernel: Artifact, arch: Arch, *, newer: Mapping[str, PackagePin] | None = None
    ) -> Made:
        """The initrd called `name` that goes with `kernel`, intact on disk.

        `newer` busybox packages are taken before those of versions.lock. Raises as `Kernels.provide`, and
        IncompatiblePair for an initrd that carries another kernel's modules.
        """
        if newer is None:
            self._site.rolling.resolve([], [name], arch)
        plan = self._plan(name, kernel, arch, newer)
        if kept := self._kept(plan, arch):
            return Made(kept, self._lock_again(name, plan, kept, arch))
        with self._site.locked(INITRD, name, arch):
            plan = self._plan(name, kernel, arch, newer)
            if kept := self._kept(plan, arch):
                return Made(kept, self._lock_again(name, plan, kept, arch))
            if recovered := self._recover(plan, arch):
                self._lock_again(name, plan, recovered, arch)
                return Made(recovered, RECOVERED)
            if taken := self._take(name, plan, arch):
                self._lock_again(name, plan, taken.artifact, arch)
                return taken
            if plan.pin is None:
                raise UnknownVersion(INITRD, name, known=self._site.catalog.initrd)
            require_fit(name, plan.pin.inputs, kernel, plan.pin.kernel)
            return self._make(name, plan, plan.pin, arch)

    def make(self, version: str, pin: InitrdPin, kernel: Artifact, arch: Arch) -> None:
        """Builds this version from `pin` again, whatever catalog and versions.lock say.

        Raises as `provide`, and VersionConflict when this release would make something else from it.
        """
        with self._site.locked(INITRD, version, arch):
            if self._site.store.kept(INITRD, version, arch, None):
                return  # made by somebody else meanwhile
            require_fit(version, pin.inputs, kernel, pin.kernel)
            if different := changes(pin.inputs, inputs_of(pin, kernel)):
                raise VersionConflict(INITRD, version, arch.value, changes=different)
            # other inputs may have been the first to make this content, so what they were is not asked
            plan = InitrdPlan(version, pin, kernel, named_by_content=is_named_by_content(version, pin))
            self._make(version, plan, pin, arch)

    def source(self, version: str, arch: Arch, kernel: Artifact) -> InitrdPin | None:
        """What a concrete initrd is made from; None when only the disk knows it. Raises CatalogError."""
        entry = self._site.catalog.initrd.get(version)
        return None if entry is not None and entry.rolling else self._plan(version, kernel, arch).pin

    def without_base(self, name: str, kernel: Artifact, arch: Arch) -> Artifact | None:
        """The initrd called `name` for `kernel` when that takes no base image: kept, or recovered. Raises as `kept`."""
        if self._site.rolling.missing([], [name], arch)[1]:
            return None
        plan = self._plan(name, kernel, arch)
        with self._site.locked(INITRD, name, arch):
            return self._kept(plan, arch) or self._recover(plan, arch)

    def kept_busybox(self, name: str, arch: Arch) -> bool:
        """Whether the base image of the initrd called `name` is in the content store."""
        if name not in self._site.catalog.initrd:
            return True  # a version that only the disk or versions.lock knows brings its own
        if self._site.rolling.missing([], [name], arch)[1]:
            return False
        return self._images.kept(self._busybox_of(name, arch), arch) is not None

    def busybox(self, name: str, arch: Arch) -> str:
        """Provides the base image of the initrd called `name`; returns what it took. Raises as `provide`."""
        self._site.rolling.resolve([], [name], arch)
        layers = self._images.busybox(self._busybox_of(name, arch), arch)
        return f"{human_size(sum(layer.stat().st_size for layer in layers))} in the content store"

    def _plan(
        self, name: str, kernel: Artifact, arch: Arch, newer: Mapping[str, PackagePin] | None = None
    ) -> InitrdPlan:
        if name not in self._site.catalog.initrd:
            pins = self._site.rolling.read().initrd.get(name, {}).get(arch)
            return InitrdPlan(name, pins[0] if pins else None, kernel, named_by_content=True)
        entry = self._site.catalog.initrd[name]
        source = self._busybox_of(name, arch, newer)
        modular = MODULES in kernel.files and bool(entry.load or entry.carry)
        pin = InitrdPin(
            init=entry.init,
            busybox=source,
            kernel=kernel.version if modular else None,
            load=entry.load if modular else (),
            carry=entry.carry if modular else (),
            inputs={},
        )
        pin = pin.model_copy(update={"inputs": inputs_of(pin, kernel)})
        version = self._find(pin, arch) if entry.rolling else name
        return InitrdPlan(version, pin, kernel, named_by_content=entry.rolling)

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
        return self._fitting(self._site.store.kept, plan, arch)

    def _recover(self, plan: InitrdPlan, arch: Arch) -> Artifact | None:
        return self._fitting(self._site.store.recover, plan, arch)

    def _fitting(self, find: Callable[..., Artifact | None], plan: InitrdPlan, arch: Arch) -> Artifact | None:
        """What `find` finds of the planned version; never one that carries another kernel's modules."""
        if plan.version is None:
            return None
        found = find(INITRD, plan.version, arch, plan.inputs)
        if found is not None:
            require_fit(plan.version, found.inputs, plan.kernel, found.requires_kernel)
        return found

    def _take(self, name: str, plan: InitrdPlan, arch: Arch) -> Made | None:
        """The planned version as it was published; which one that is must be known here."""
        version = plan.version
        if version is None:
            if self._site.catalog.build is False:
                tried = [("versions.lock", f"it does not say what {name} is with kernel {plan.kernel.version}")]
                subject = f"initrd {name} ({arch})"
                raise SourceUnavailable(subject, tried=tried, hint=NO_LOCK)
            return None
        content = _CONTENT.search(version) if plan.named_by_content else None
        with self._locked_as(name, version, arch):
            taken = self._published.take(INITRD, version, arch, plan.inputs, content=content[1] if content else "")
        if taken:
            require_fit(version, taken.artifact.inputs, plan.kernel, taken.artifact.requires_kernel)
        return taken

    def _locked_as(self, name: str, version: str, arch: Arch) -> AbstractContextManager[None]:
        """The lock of a version that was asked for as `name`, whose lock is held."""
        return self._site.locked(INITRD, version, arch) if version != name else nullcontext()

    def _make(self, name: str, plan: InitrdPlan, pin: InitrdPin, arch: Arch) -> Made:
        store = self._site.store
        with ExitStack() as stack:
            paths = self._images.busybox(pin.busybox, arch)
            with storing(self._site.paths.oci_cache):
                layers = [stack.enter_context(path.open("rb")) for path in paths]
            out = stack.enter_context(store.layout.new_file())
            if pin.kernel:  # nobody collects it meanwhile
                stack.enter_context(self._site.locked(KERNEL, plan.kernel.version, arch))
            modules = self._modules_of(plan.kernel) if pin.kernel else None
            build = build_initrd(layers, out, init=pin.init, modules=modules, load=pin.load, carry=pin.carry)
            files = {boot_file(INITRD, arch): store.layout.add(out, BLOB)}
        concrete = f"{pin.init}-{build.content_sha256[:12]}" if plan.named_by_content else name
        if plan.version not in (None, concrete):
            raise VersionConflict(INITRD, name, arch.value, changes={"content": (plan.version, concrete)})
        record = {**new_record(INITRD, concrete, arch, files, pin.inputs), **facts_of(build, pin)}
        with self._locked_as(name, concrete, arch):
            # other inputs may have made the same content, and that is the same version
            artifact = store.kept(INITRD, concrete, arch, plan.inputs) or store.put(record, files)
        known = self._learn(name, concrete, pin, plan.kernel, arch) if plan.named_by_content else None
        note = f"{human_size(files[artifact.file].size)}, {build.entries} entries, {len(build.modules)} modules"
        why = changes(readable(known), readable(pin)) if known else {}
        return Made(artifact, note + "".join(f"\n   {key}: {old} → {new}" for key, (old, new) in why.items()))

    def _modules_of(self, kernel: Artifact) -> Path:
        """The kernel's modules, read once to be sure of every byte: an initrd is for ever. Raises DigestMismatch."""
        for problem in self._site.store.artifacts.verify(kernel, MODULES):
            raise problem
        return kernel.directory / MODULES

    def _lock_again(self, name: str, plan: InitrdPlan, kept: Artifact, arch: Arch) -> str:
        """Writes a rolling initrd that is on disk into a versions.lock that does not know it."""
        if plan.pin is None or self.is_locked(name, kept, plan.kernel, arch):
            return ""
        self._learn(name, kept.version, plan.pin, plan.kernel, arch)
        return "known to versions.lock"

    def _learn(self, name: str, version: str, pin: InitrdPin, kernel: Artifact, arch: Arch) -> InitrdPin | None:
        """Keeps what a rolling initrd is made from and that it is the current one for `kernel`.

        Returns what the one before it was made from: of this kernel, or else of another.
        """
        if name == version:
            return None  # asked for by its concrete name, so the lock knows it
        with editing_lock(self._site.paths, timeout=self._site.timeout) as lock:
            provided = lock.current.setdefault(name, {})
            others = [kernels[arch] for _, kernels in sorted(provided.items()) if arch in kernels]
            before = provided.get(kernel.version, {}).get(arch) or (others[-1] if others else None)
            known = lock.initrd.get(before or "", {}).get(arch)
            provided.setdefault(kernel.version, {})[arch] = version
            pins = lock.initrd.setdefault(version, {}).setdefault(arch, [])
            if all(other.inputs != pin.inputs for other in pins):
                pins.append(pin)
            return known[0] if known and before != version else None
