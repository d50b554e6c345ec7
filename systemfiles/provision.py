"""How a missing or damaged artifact comes to be, and why an intact one is kept.

For each artifact, under its lock: **kept** when it is on disk, intact, and of today's inputs; else **recovered** from
the content store when that still holds all of it; else **made** by its recipe from its origin.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from systemfiles.content.artifacts import MODULES, Artifact, Artifacts, boot_file
from systemfiles.content.layout import Descriptor
from systemfiles.content.store import Store, changes
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import AptBusybox, Catalog, KernelFile
from systemfiles.foundation.digest import CHUNK, Digest
from systemfiles.foundation.errors import IncompatiblePair, UnknownVersion, UsageError, VersionConflict, blaming
from systemfiles.foundation.files import NewFile, scratch_dir, write_file
from systemfiles.foundation.lock import locked
from systemfiles.foundation.lockfile import InitrdPin, PackagePin, editing_lock
from systemfiles.foundation.paths import INITRD, KERNEL, KINDS, Paths, check_version
from systemfiles.foundation.progress import Progress, silent
from systemfiles.foundation.units import human_size
from systemfiles.images import Images
from systemfiles.recipes.initrd import InitrdBuild, build_initrd, initrd_inputs
from systemfiles.recipes.kernel import KernelBuild, build_kernel
from systemfiles.rolling import Move, Rolling

log = logging.getLogger(__name__)

BLOB = "application/octet-stream"
_MIRRORS = (
    "use a mirror ([mirrors] in versions.toml or $SYSTEMFILES_MIRRORS), or another profile, such as profile=debian"
)
_FORGOTTEN = "an archive keeps only its newest packages; doit update moves to what it has now"
_RECOVERED = "written again from the content store"


class Made(NamedTuple):
    """An artifact, and what it took: "" when it was kept as it was."""

    artifact: Artifact
    note: str


class InitrdPlan(NamedTuple):
    """What an initrd's name means today. `version` is None for content that was never built here."""

    version: str | None
    pin: InitrdPin | None
    kernel: Artifact

    @property
    def inputs(self) -> dict[str, Any] | None:
        return self.pin.inputs if self.pin else None


class Provisioner:
    """Provides the artifacts of one catalog in one data directory. Safe to share among threads and processes."""

    def __init__(
        self,
        paths: Paths,
        catalog: Catalog,
        artifacts: Artifacts,
        *,
        progress: Progress = silent,
        timeout: float | None = None,
    ) -> None:
        self.rolling = Rolling(paths, catalog, timeout=timeout)
        self.store = Store(paths, artifacts)
        self.images = Images(paths, catalog, self.store.layout, progress=progress, timeout=timeout)
        self._paths = paths
        self._catalog = catalog
        self._progress = progress
        self._timeout = timeout

    def kept_kernel(self, name: str, arch: Arch) -> Artifact | None:
        """The kernel called `name` when nothing is to do for it. Raises VersionConflict."""
        version = self.rolling.concrete_kernel(name, arch)
        if version is None:
            return None
        return self.store.kept(KERNEL, version, arch, _kernel_inputs(self._kernel_source(version, arch)))

    def kernel(self, name: str, arch: Arch) -> Made:
        """The kernel called `name`, a concrete or a rolling one, intact on disk.

        Raises UnknownVersion, UnsupportedArch, VersionConflict, SourceError, IntegrityError, InvalidKernel, StoreError.
        """
        self.rolling.resolve([name], [], arch)
        if kept := self.kept_kernel(name, arch):
            return Made(kept, "")
        version = self.rolling.concrete_kernel(name, arch) or name
        source = self._kernel_source(version, arch)
        inputs = _kernel_inputs(source)
        with self._locked(KERNEL, version, arch):
            if kept := self.store.kept(KERNEL, version, arch, inputs):
                return Made(kept, "")
            if recovered := self.store.recover(KERNEL, version, arch, inputs):
                return Made(recovered, _RECOVERED)
            if source is None:
                self._catalog.find_kernel(version, arch)
                raise UnknownVersion(KERNEL, version, known=self._catalog.kernel)
            return self._make_kernel(version, arch, source)

    def add_kernel(self, path: Path, version: str, arch: Arch) -> Made:
        """Takes the local kernel file at `path` in as `version`; the same file again is fine.

        Raises InvalidKernel, VersionConflict, UsageError for a name of the catalog, StoreError.
        """
        check_version(KERNEL, version)
        if version in self._catalog.kernel:
            msg = f"{version} is a name of the catalog already"
            raise UsageError(msg, hint="choose another --version")
        with self._locked(KERNEL, version, arch), self.store.layout.new_file() as source:
            with path.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    source.write(chunk)
            inputs = {"sha256": source.digest().hex}
            if kept := self.store.kept(KERNEL, version, arch, inputs):
                return Made(kept, "")
            with scratch_dir(self._paths.tmp) as work:
                with blaming(path):
                    build = build_kernel(source.path, work, arch)
                return self._put_kernel(version, arch, build, source, inputs, {"added_from": path.name})

    def kept_initrd(self, name: str, kernel: Artifact, arch: Arch) -> Artifact | None:
        """The initrd called `name` for `kernel` when nothing is to do for it. Raises as `initrd`."""
        if self.rolling.missing([], [name], arch)[1]:
            return None
        return self._kept(self._plan_initrd(name, kernel, arch), arch)

    def initrd(self, name: str, kernel: Artifact, arch: Arch, *, newer: Mapping[str, PackagePin] | None = None) -> Made:
        """The initrd called `name` that goes with `kernel`, intact on disk.

        `newer` busybox packages are taken before those of versions.lock.
        Raises as `kernel`, and IncompatiblePair for one that carries another kernel's modules.
        """
        if newer is None:
            self.rolling.resolve([], [name], arch)
        plan = self._plan_initrd(name, kernel, arch, newer)
        if kept := self._kept(plan, arch):
            return Made(kept, "")
        with self._locked(INITRD, plan.version or name, arch):
            plan = self._plan_initrd(name, kernel, arch, newer)
            if kept := self._kept(plan, arch):
                return Made(kept, "")
            if plan.version and (recovered := self.store.recover(INITRD, plan.version, arch, plan.inputs)):
                return Made(recovered, _RECOVERED)
            if plan.pin is None:
                raise UnknownVersion(INITRD, name, known=self._catalog.initrd)
            return self._make_initrd(name, plan.version, plan.pin, kernel, arch)

    def kept_busybox(self, name: str, arch: Arch) -> bool:
        """Whether the base image of the initrd called `name` is in the content store."""
        if name not in self._catalog.initrd:
            return True  # a version that only the disk or versions.lock knows brings its own
        if self.rolling.missing([], [name], arch)[1]:
            return False
        return self.images.kept(self._busybox_of(name, arch), arch) is not None

    def busybox(self, name: str, arch: Arch) -> str:
        """Provides the base image of the initrd called `name`; returns what it took. Raises as `initrd`."""
        self.rolling.resolve([], [name], arch)
        layers = self.images.busybox(self._busybox_of(name, arch), arch)
        return f"{human_size(sum(layer.stat().st_size for layer in layers))} in the content store"

    def update(self, kernel: str, initrd: str, arch: Arch) -> tuple[Move, ...]:
        """Moves the rolling names among these to what apt has now, once all of that is provisioned."""
        resolved = self.rolling.newest([kernel], [initrd], arch)
        version = resolved.kernels[kernel][0] if kernel in resolved.kernels else kernel
        provided = self.kernel(version, arch).artifact
        self.initrd(initrd, provided, arch, newer=resolved.busyboxes)
        return self.rolling.settle(resolved, arch)

    def write_manifest(self) -> int:
        """Brings SHA256SUMS and our names in index.json up to date; returns how many files are listed."""
        self.store.reassert()
        with locked(self._paths.lock("SHA256SUMS"), timeout=self._timeout):
            data = self._manifest()
            write_file(self._paths.sha256sums, data, scratch=self._paths.tmp, mode=0o644)
        return data.count(b"\n")

    def manifest_is_current(self) -> bool:
        """Whether `write_manifest` would change nothing."""
        try:
            return self._paths.sha256sums.read_bytes() == self._manifest() and self.store.is_asserted()
        except FileNotFoundError:
            return False

    def _manifest(self) -> bytes:
        lines = []
        for kind in KINDS:
            for version, arch in self.store.artifacts.versions(kind):
                artifact = self.store.artifacts.load(kind, version, arch)
                for name, facts in sorted(artifact.files.items()):
                    lines.append(f"{facts.sha256}  {kind}/{version}/{arch}/{name}\n")
        return "".join(lines).encode()

    def _kernel_source(self, version: str, arch: Arch) -> KernelFile | PackagePin | None:
        """Where a concrete kernel comes from; None when only the disk knows it."""
        if version in self._catalog.kernel and not self._catalog.kernel[version].rolling:
            return self._catalog.kernel[version].files.get(arch)
        return self.rolling.read().kernel.get(version, {}).get(arch)

    def _make_kernel(self, version: str, arch: Arch, source: KernelFile | PackagePin) -> Made:
        from systemfiles.sources.apt import apt_proxies
        from systemfiles.sources.http import fetch  # 100 ms for `requests`, and most runs fetch nothing

        subject = f"kernel {version} ({arch})"
        started = time.monotonic()
        with self.store.layout.new_file() as new, scratch_dir(self._paths.tmp) as work:
            package = isinstance(source, PackagePin)
            url = fetch(
                source.url,
                new,
                subject=subject,
                digest=Digest.from_hex(source.sha256),
                size=source.size,
                mirrors=self._catalog.mirrors,
                proxies=apt_proxies() if package else None,
                hint=_FORGOTTEN if package else _MIRRORS,
                progress=self._progress,
            )
            fetched = f"{human_size(new.size)} fetched and verified in {time.monotonic() - started:.1f} s"
            with blaming(url):
                build = build_kernel(new.path, work, arch)
            origin = source.model_dump(exclude_none=True) | {"fetched_from": url}
            made = self._put_kernel(version, arch, build, new, _kernel_inputs(source) or {}, origin)
        return Made(made.artifact, f"{fetched} → {made.note}")

    def _put_kernel(
        self,
        version: str,
        arch: Arch,
        build: KernelBuild,
        source: NewFile,
        inputs: Mapping[str, Any],
        origin: Mapping[str, Any],
    ) -> Made:
        layout = self.store.layout
        boot = layout.add(source, BLOB) if build.path == source.path else layout.add_path(build.path, BLOB)
        files = {boot_file(KERNEL, arch): boot}
        if build.modules is not None:
            files[MODULES] = layout.add_path(build.modules, BLOB)
        record = {
            **_record(KERNEL, version, arch, files, inputs),
            "source": dict(origin),
            "facts": {"format": build.image.format, **dict(build.image.facts)},
            **({"release": build.release} if build.release else {}),
        }
        artifact = self.store.put(record, files)
        checked = "PVH entry ok" if arch is Arch.X86_64 else "arm64 header ok"
        return Made(artifact, f"{artifact.file} {human_size(boot.size)}, {checked}")

    def _plan_initrd(
        self, name: str, kernel: Artifact, arch: Arch, newer: Mapping[str, PackagePin] | None = None
    ) -> InitrdPlan:
        if name not in self._catalog.initrd:
            return InitrdPlan(name, self.rolling.read().initrd.get(name, {}).get(arch), kernel)
        entry = self._catalog.initrd[name]
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
                kernel={"version": kernel.version, "modules": kernel.files[MODULES].sha256} if modular else None,
                load=entry.load,
                carry=entry.carry,
            ),
        )
        version = self._find_initrd(pin, arch) if entry.rolling else name
        return InitrdPlan(version, pin, kernel)

    def _busybox_of(self, name: str, arch: Arch, newer: Mapping[str, PackagePin] | None = None) -> PackagePin | str:
        busybox = self._catalog.initrd[name].busybox
        if not isinstance(busybox, AptBusybox):
            return busybox
        return (newer or {}).get(busybox.apt) or self.rolling.read().busybox[busybox.apt][arch]

    def _find_initrd(self, pin: InitrdPin, arch: Arch) -> str | None:
        """The concrete version that was made from exactly these inputs, as the lock or else the disk knows it."""
        if known := self.rolling.read().find_initrd(pin.inputs, arch):
            return known
        for version, there in self.store.artifacts.versions(INITRD):
            if there is arch and version.startswith(f"{pin.init}-"):
                artifact = self.store.kept(INITRD, version, arch, None)
                if artifact is not None and artifact.inputs == pin.inputs:
                    return version
        return None

    def _kept(self, plan: InitrdPlan, arch: Arch) -> Artifact | None:
        if plan.version is None:
            return None
        kept = self.store.kept(INITRD, plan.version, arch, plan.inputs)
        required = kept.requires_kernel if kept else plan.pin and plan.pin.kernel
        if required and required != plan.kernel.version:
            raise IncompatiblePair(plan.kernel.version, plan.version, requires=required)
        return kept

    def _make_initrd(self, name: str, version: str | None, pin: InitrdPin, kernel: Artifact, arch: Arch) -> Made:
        layout = self.store.layout
        with ExitStack() as stack:
            layers = [stack.enter_context(path.open("rb")) for path in self.images.busybox(pin.busybox, arch)]
            out = stack.enter_context(layout.new_file())
            modules = kernel.directory / MODULES if pin.kernel else None
            build = build_initrd(layers, out, init=pin.init, modules=modules, load=pin.load, carry=pin.carry)
            files = {boot_file(INITRD, arch): layout.add(out, BLOB)}
        concrete = f"{pin.init}-{build.content_sha256[:12]}"
        if version not in (None, concrete) and version not in self._catalog.initrd:
            raise VersionConflict(INITRD, version or "", arch.value, changes={"content": (version, concrete)})
        version = version or concrete
        record = {**_record(INITRD, version, arch, files, pin.inputs), **_initrd_facts(build, pin)}
        with editing_lock(self._paths, timeout=self._timeout) as lock:
            before = lock.rolling.get(name, {}).get(arch)
            known = lock.initrd.get(before or "", {}).get(arch)
            if version != name:
                lock.rolling.setdefault(name, {})[arch] = version
                lock.initrd.setdefault(version, {})[arch] = pin
        artifact = self.store.put(record, files)
        note = f"{human_size(files[artifact.file].size)}, {build.entries} entries, {len(build.modules)} modules"
        why = changes(known.inputs, pin.inputs) if known else {}
        return Made(artifact, note + "".join(f"\n   {key}: {old} → {new}" for key, (old, new) in why.items()))

    def _locked(self, kind: str, version: str, arch: Arch) -> AbstractContextManager[None]:
        check_version(kind, version)
        return locked(self._paths.lock(f"{kind}-{version}-{arch}"), timeout=self._timeout)


def _record(
    kind: str, version: str, arch: Arch, files: Mapping[str, Descriptor], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": kind,
        "version": version,
        "arch": arch.value,
        "files": {name: {"sha256": file.digest.hex, "size": file.size} for name, file in files.items()},
        "inputs": dict(inputs),
    }


def _initrd_facts(build: InitrdBuild, pin: InitrdPin) -> dict[str, Any]:
    return {
        "content_sha256": build.content_sha256,
        "content_size": build.content_size,
        "requires_kernel": pin.kernel,
        "entries": build.entries,
        "modules": list(build.modules),
        "compressor": build.compressor,
        "source": pin.model_dump(mode="json", include={"busybox"}),
    }


def _kernel_inputs(source: KernelFile | PackagePin | None) -> dict[str, Any] | None:
    if isinstance(source, PackagePin):
        return {"package": source.package, "package_version": source.version, "sha256": source.sha256}
    return {"sha256": source.sha256} if source else None


def _busybox_inputs(source: PackagePin | str) -> dict[str, Any]:
    if isinstance(source, PackagePin):
        return {"package": source.package, "package_version": source.version, "sha256": source.sha256}
    return {"image": source.rpartition("@")[2]}
