"""A small host to keep things on: origins that answer in milliseconds, a catalog, and a clock that is set by hand.

Kernels are 9 KB that a VMM would take, from file: URLs; a busybox is its table of applets, an initrd 2 KB. Packages
of a distribution are files, too: versions.lock is moved as an update moves it, but for asking apt. Images come from a
real registry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from systemfiles import BootFiles, SystemFiles
from systemfiles.content.artifacts import Artifacts
from systemfiles.content.layout import Layout
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.lockfile import PackagePin, editing_lock
from systemfiles.foundation.paths import Paths
from systemfiles.foundation.progress import Progress, silent
from systemfiles.provision.rolling import Resolved
from systemfiles.registry.registry import Registry
from systemfiles.retention.holdings import Holdings
from systemfiles.sources.oci import Repository
from tests.registries import registry
from tests.unit.test_busybox import elf
from tests.unit.test_deb import package, tar
from tests.unit.test_kernelimage import bzimage, lz4_legacy, vmlinux
from tests.unit.test_kernelimage import image as arm_image
from tests.unit.test_kmod import module

X86, ARM = Arch.X86_64, Arch.AARCH64
CURRENT = ("steady", "plain")
"""What the default profile names."""
KERNELS = ("steady", "k-1", "k-2", "k-3")
INITRDS = ("plain", "i-1", "i-2", "twin")
"""`twin` has another name and the same content as i-1."""
RELEASES = ("6.1.1-1", "6.1.2-1", "6.1.3-1")
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
REF_NAME = "org.opencontainers.image.ref.name"
DAY = 24 * 3600
_RELEASE = "6.1.0-test"
_MODULES = ("arch/x86/crypto/aesni", "drivers/block/virtio_blk", "fs/erofs/erofs")
_MACHINES = {X86: 62, ARM: 183}


class Clock:
    """What time it is: the host's own, and as much later as the test says."""

    def __init__(self, later: float = 0) -> None:
        self.later = later

    def __call__(self) -> float:
        return time.time() + self.later

    def advance(self, seconds: float) -> None:
        self.later += seconds


@dataclass(frozen=True)
class World:
    """Where everything is."""

    root: Path
    host: str
    images: tuple[str, ...]
    """References with digests; of each two that follow another, one layer is the same."""
    docker_image: str

    @property
    def catalog(self) -> Path:
        return self.root / "versions.toml"

    def system(
        self, data: Path, *, clock: Callable[[], float] = time.time, arch: Arch = X86, url: str | None = None
    ) -> SystemFiles:
        """Whoever works on the data directory, with that time, and perhaps a registry elsewhere."""
        system, paths = SystemFiles(data, catalog=self.catalog, arch=arch), Paths(data)
        registry = Registry(paths, url=url, clock=clock, timeout=60)
        system.holdings = Holdings(paths, Artifacts(paths), registry=registry, clock=clock, timeout=60)
        return system

    def pin_of(self, name: str, release: str) -> PackagePin:
        """A package as versions.lock has it."""
        path = self.root / "files" / f"{name}-{release}.deb"
        data = path.read_bytes()
        return PackagePin(
            package=name,
            version=release,
            url=path.as_uri(),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )

    def update(self, system: SystemFiles, release: str, *, progress: Progress = silent) -> BootFiles:
        """What `provision --update` does once apt has said that `release` is the newest."""
        version = f"packaged-{release}"
        kernel, busybox = (self.pin_of(name, release) for name in ("linux-image-test", "busybox-static"))
        with editing_lock(system.paths) as lock:
            lock.kernel.setdefault(version, {}).setdefault(X86, kernel)
        provisioner, newer = system.provisioner(timeout=60, progress=progress), {"busybox-static": busybox}
        _, root = provisioner.provide(version, ["modular"], X86, newer=newer)
        provisioner.rolling.settle(Resolved({"packaged": (version, kernel)}, newer), X86)
        return system.ensure(version, root.artifact.version)


@contextlib.contextmanager
def world(root: Path) -> Iterator[World]:
    """Everything below `root`, until the block ends."""
    files = root / "files"
    files.mkdir(parents=True)
    with registry(root / "registry") as running:
        host = running.host
        for name in KERNELS:
            for arch in Arch:
                (files / f"{name}-{arch}").write_bytes(_kernel(name, arch))
        for release in RELEASES:
            _write_packages(files, release)
        layers = [random.Random(f"layer {number}").randbytes(20_000) for number in range(5)]
        images = tuple(
            _push(host, f"guest-{number}", {X86: [layers[number], layers[number + 1]]}) for number in range(4)
        )
        docker = _push(host, "docker", {X86: [random.Random("docker").randbytes(30_000)]}, docker=True)
        (root / "versions.toml").write_text(_catalog(files, host))
        yield World(root, host, images, docker)


def _catalog(files: Path, host: str) -> str:
    lines = [
        'schema = 1\ndefault_profile = "pinned"',
        '[profile.pinned]\nkernel = "steady"\ninitrd = "plain"',
        '[profile.packaged]\nkernel = "packaged"\ninitrd = "modular"',
        '[kernel.packaged]\napt = { x86_64 = "linux-image-test" }',
        '[initrd.modular]\ninit = "v1.0.0"\nbusybox = { apt = "busybox-static" }\nload = ["virtio_blk"]',
    ]
    for name in KERNELS:
        for arch in Arch:
            path = files / f"{name}-{arch}"
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f'[kernel.{name}.files.{arch}]\nurl = "{path.as_uri()}"\nsha256 = "{sha256}"')
    for name in INITRDS:
        of = "i-1" if name == "twin" else name
        layers = {arch: [tar({"bin/busybox": _busybox(of, arch)}, mode="w")] for arch in Arch}
        lines.append(f'[initrd.{name}]\ninit = "v1.0.0"\nbusybox = "{_push(host, f"busybox-{name}", layers)}"')
    return "\n".join(lines) + "\n"


def _kernel(name: str, arch: Arch) -> bytes:
    code = random.Random(f"{name} {arch}").randbytes(9000)
    return vmlinux(code=code) if arch is X86 else arm_image(code=code)


def _busybox(name: str, arch: Arch) -> bytes:
    """The headers of a static program and a table of applets, which is all that is read of it."""
    names = sorted([b"cat", b"mount", b"sh", *(b"applet%d" % number for number in range(60))])
    table = b"".join(applet + b"\0" for applet in names)
    return elf(machine=_MACHINES[arch]) + b"\xff" + name.encode() + b"\0" + table + b"\xff"


def _write_packages(files: Path, release: str) -> None:
    kernel = vmlinux(code=random.Random(release).randbytes(9000))
    modules = {
        f"./lib/modules/{_RELEASE}/kernel/{path}.ko": module(
            f"license=GPL\0name={Path(path).name}\0version={release}\0vermagic={_RELEASE} SMP \0".encode()
        )
        for path in _MODULES
    }
    boot = {f"./boot/vmlinuz-{_RELEASE}": bzimage(lz4_legacy(kernel), size=len(kernel))}
    (files / f"linux-image-test-{release}.deb").write_bytes(package(tar({**boot, **modules})))
    (files / f"busybox-static-{release}.deb").write_bytes(package(tar({"./bin/busybox": _busybox(release, X86)})))


def _push(host: str, name: str, layers: dict[Arch, list[bytes]], *, docker: bool = False) -> str:
    """Pushes an image, or an index where there are several architectures; returns a reference with its digest."""
    repository = Repository(host, name)
    manifests = {}
    for arch, parts in layers.items():
        manifest, blobs = image(parts, arch, docker=docker)
        for data in blobs:
            repository.push_blob(Digest.of(data), len(data), BytesIO(data))
        media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
        tag = "1" if len(layers) == 1 else Digest.of(manifest)
        manifests[arch] = (repository.push_manifest(manifest, media_type, tag), len(manifest))
    if len(manifests) == 1:
        (digest, _), *_ = manifests.values()
        return f"{host}/{name}:1@{digest}"
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": digest, "size": size, "platform": {"os": "linux", "architecture": arch}}
        for arch, (digest, size) in ((arch.debian, found) for arch, found in manifests.items())
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    return f"{host}/{name}:1@{repository.push_manifest(index, OCI_INDEX, '1')}"


def image(layers: list[bytes], arch: Arch = X86, *, docker: bool = False) -> tuple[bytes, list[bytes]]:
    """An OCI image (image-spec, manifest.md), or the same in Docker's terms: its manifest, and its blobs."""
    platform = {"architecture": arch.debian, "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
    config = json.dumps(platform).encode()
    value = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST if docker else OCI_MANIFEST,
        "config": descriptor(config, DOCKER_CONFIG if docker else OCI_CONFIG),
        "layers": [descriptor(layer, DOCKER_LAYER if docker else OCI_LAYER) for layer in layers],
    }
    return json.dumps(value).encode(), [config, *layers]


def descriptor(data: bytes, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": Digest.of(data), "size": len(data)}


# --- what other tools do to a content store ---


def put_blob(data_dir: Path, data: bytes) -> str:
    """Adds a blob as any tool would; returns its digest in hex."""
    blobs = Paths(data_dir).oci_cache / "blobs" / "sha256"
    if not blobs.exists():
        Layout(Paths(data_dir)).create()
    name = hashlib.sha256(data).hexdigest()
    (blobs / name).write_bytes(data)
    return name


def name_as_others(data_dir: Path, name: str, digest: str, size: int, media_type: str = OCI_MANIFEST) -> None:
    """Adds an entry to index.json that is not ours."""
    path = Paths(data_dir).oci_cache / "index.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    empty: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
    index = json.loads(path.read_text()) if path.exists() else empty
    entry = {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size, "annotations": {REF_NAME: name}}
    index["manifests"].append(entry)
    path.write_text(json.dumps(index))
    (path.parent / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def put_foreign_image(data_dir: Path, name: str, layer: bytes) -> list[str]:
    """An image of another tool; returns the digests, in hex, of all its parts, the manifest's first."""
    manifest, blobs = image([layer])
    digests = [put_blob(data_dir, data) for data in (manifest, *blobs)]
    name_as_others(data_dir, name, digests[0], len(manifest))
    return digests


def forget_name(data_dir: Path, name: str) -> None:
    """Removes every entry of index.json with that name."""
    path = Paths(data_dir).oci_cache / "index.json"
    index = json.loads(path.read_text())
    index["manifests"] = [e for e in index["manifests"] if e.get("annotations", {}).get(REF_NAME) != name]
    path.write_text(json.dumps(index))
