"""The world around a data directory under test: origins on loopback, a catalog, and directories that hold something.

Everything is small and sound: kernels of 13 KB that a VMM would take, a package with two modules, a busybox that is
its table of applets. apt, the registry and the web server are real.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from systemfiles.foundation.digest import Digest
from systemfiles.sources.oci import Repository
from tests.registries import Registry, registry
from tests.unit.test_busybox import elf
from tests.unit.test_deb import package, tar
from tests.unit.test_kernelimage import bzimage, lz4_legacy, vmlinux
from tests.unit.test_kmod import module

ARCH = "x86_64"
OLD, NEW = "6.1.1-1", "6.1.2-1"
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
REF_NAME = "org.opencontainers.image.ref.name"
_RELEASE = "6.1.0-test"
_MODULES = ("arch/x86/crypto/aesni", "drivers/block/virtio_blk", "fs/erofs/erofs")
_CATALOG = """\
schema = 1
[profile.pinned]
kernel = "pinned-1"
initrd = "plain"
[profile.packaged]
kernel = "packaged"
initrd = "modular"
[kernel.pinned-1.files.x86_64]
url = "{web}/vmlinux"
sha256 = "{kernel}"
[kernel.packaged]
apt = {{ x86_64 = "linux-image-test" }}
[initrd.plain]
init = "v1.0.0"
busybox = "{busybox}"
[initrd.modular]
init = "v1.0.0"
busybox = {{ apt = "busybox-static" }}
load = ["virtio_blk"]
carry = ["erofs"]
"""
KERNELS = ("k-leased", "k-pinned", "k-named", "k-gone", "k-doomed", "k-new")
INITRDS = ("i-leased", "i-pinned", "i-gone")
"""What no profile names, each with a content, or a base image, of its own."""


@dataclass(frozen=True)
class World:
    """Where everything is. `root` also holds the prepared data directories, one below `bases` for each name."""

    root: Path
    host: str
    image: str

    @property
    def requests(self) -> list[str]:
        """The paths that the web server was asked for."""
        return (self.root / "web.log").read_text().splitlines()

    @property
    def registry(self) -> Registry:
        return Registry(self.host, self.root / "registry" / "log")

    @property
    def catalog(self) -> Path:
        return self.root / "versions.toml"

    @property
    def kernel(self) -> Path:
        """A kernel to add."""
        return self.root / "local" / "vmlinux"

    def apt(self, version: str) -> Path:
        """An apt.conf(5) under which the archive's newest packages have this version."""
        return self.root / "web" / version / "apt.conf"

    def base(self, name: str) -> Path:
        return self.root / "bases" / name


@contextlib.contextmanager
def world(root: Path) -> Iterator[World]:
    """Serves everything from `root` until the block ends."""
    for directory in ("web", "local", "bases"):
        (root / directory).mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        web = stack.enter_context(_web_server(root / "web", root / "web.log"))
        host = stack.enter_context(registry(root / "registry")).host
        (root / "web" / "vmlinux").write_bytes(vmlinux())
        (root / "local" / "vmlinux").write_bytes(vmlinux(code=random.Random(2).randbytes(150_000)))
        for version in (OLD, NEW):
            _archive(root / "web" / version, f"{web}/{version}", version)
        busybox = _push(host, "busybox", [_layer(_busybox("old"))])
        layers = [random.Random(number).randbytes(40_000 * number) for number in range(1, 7)]
        image = _push(host, "image", [*layers, layers[0]])
        kernel = hashlib.sha256(vmlinux()).hexdigest()
        catalog = _CATALOG.format(web=web, kernel=kernel, busybox=busybox)
        (root / "versions.toml").write_text("\n".join([catalog, *_unnamed(root / "web", web, host)]))
        yield World(root, host, image)


def _unnamed(directory: Path, web: str, host: str) -> Iterator[str]:
    """The catalog's entries of what no profile names; their origins have it."""
    for name in KERNELS:
        kernel = vmlinux(code=random.Random(name).randbytes(9000))
        (directory / name).write_bytes(kernel)
        sha256 = hashlib.sha256(kernel).hexdigest()
        yield f'[kernel.{name}.files.{ARCH}]\nurl = "{web}/{name}"\nsha256 = "{sha256}"'
    for name in INITRDS:
        busybox = _push(host, f"busybox-{name}", [_layer(_busybox(name))])
        yield f'[initrd.{name}]\ninit = "v1.0.0"\nbusybox = "{busybox}"'


@contextlib.contextmanager
def _web_server(directory: Path, log: Path) -> Iterator[str]:
    log.touch()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Writes the path alone."""
            with log.open("a") as out:
                out.write(f"{self.path}\n")

    server = _Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: the dead hang up."""


def _archive(directory: Path, url: str, version: str) -> None:
    """A flat apt repository, sources.list(5), with a kernel's and busybox's package of this version."""
    directory.mkdir()
    kernel = vmlinux(code=random.Random(version).randbytes(200_000))
    image = bzimage(lz4_legacy(kernel), size=len(kernel))
    modules = {f"./lib/modules/{_RELEASE}/kernel/{path}.ko": _module(Path(path).name, version) for path in _MODULES}
    packages = {
        "linux-image-test": package(tar({f"./boot/vmlinuz-{_RELEASE}": image, **modules})),
        "busybox-static": package(tar({"./bin/busybox": _busybox(version)})),
    }
    stanzas = []
    for name, data in packages.items():
        (directory / f"{name}.deb").write_bytes(data)
        stanzas.append(
            f"Package: {name}\nArchitecture: amd64\nVersion: {version}\nFilename: ./{name}.deb\n"
            f"Size: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
        )
    listing = "\n".join(stanzas).encode()
    (directory / "Packages").write_bytes(listing)
    digest = hashlib.sha256(listing).hexdigest()
    (directory / "Release").write_text(f"Date: {formatdate(usegmt=True)}\nSHA256:\n {digest} {len(listing)} Packages\n")
    (directory / "sources.list").write_text(f"deb [trusted=yes] {url} ./\n")
    (directory / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{directory}/sources.list";\nDir::Etc::sourceparts "/dev/null";\n'
        'Acquire::Retries "0";\nAcquire::http::Proxy::127.0.0.1 "DIRECT";\n'
    )


def _module(name: str, version: str) -> bytes:
    return module(f"license=GPL\0name={name}\0version={version}\0vermagic={_RELEASE} SMP \0".encode())


def _busybox(version: str) -> bytes:
    """The headers of a static program and a table of applets, which is all that is read of it."""
    names = sorted([b"cat", b"mount", b"sh", *(b"applet%d" % number for number in range(60))])
    return elf() + b"\xff" + version.encode() + b"\0" + b"".join(name + b"\0" for name in names) + b"\xff"


def _layer(binary: bytes) -> bytes:
    return tar({"bin/busybox": binary}, mode="w")


# --- images ---


def image(layers: list[bytes]) -> tuple[bytes, dict[str, bytes]]:
    """An OCI image (image-spec, manifest.md): its manifest, and its blobs by digest."""
    platform = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}
    config = json.dumps(platform).encode()
    blobs = {_digest(data): data for data in (config, *layers)}
    value = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "config": _descriptor(config, IMAGE_CONFIG),
        "layers": [_descriptor(layer, LAYER) for layer in layers],
    }
    return json.dumps(value).encode(), blobs


def _push(host: str, name: str, layers: list[bytes]) -> str:
    manifest, blobs = image(layers)
    repository = Repository(host, name)
    for digest, data in blobs.items():
        repository.push_blob(Digest(digest), len(data), BytesIO(data))
    digest = repository.push_manifest(manifest, IMAGE_MANIFEST, "1")
    return f"{host}/{name}:1@{digest}"


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _descriptor(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}


def add_foreign_image(data_dir: Path) -> None:
    """What another tool may have in the layout: an image of its own, and fields that nobody here knows."""
    layout = data_dir / "system" / "oci-cache"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    manifest, parts = image([b"a layer of someone else"])
    for digest, data in {**parts, _digest(manifest): manifest}.items():
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
    index_path = layout / "index.json"
    empty: dict[str, Any] = {"schemaVersion": 2, "manifests": []}
    index = json.loads(index_path.read_text()) if index_path.exists() else empty
    entry = _descriptor(manifest, IMAGE_MANIFEST)
    index["manifests"] += [
        {**entry, "annotations": {REF_NAME: "someone's:image"}, "platform": {"os": "plan9", "architecture": "mips"}},
        {**entry, "x-unknown": [1, {"two": None}]},
    ]
    index["x-of-others"] = "kept"
    index_path.write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


# --- data directories ---


def copy_data_dir(source: Path, target: Path) -> None:
    """A copy of a disk that keeps hard links, modes and times, with stamps as if its files had been hashed there."""
    target.mkdir()
    copied: dict[int, Path] = {}
    for directory, names, files in os.walk(source):
        here = target / Path(directory).relative_to(source)
        for name in names:
            (here / name).mkdir()
            shutil.copystat(Path(directory, name), here / name)
        for name in files:
            path = Path(directory, name)
            inode = path.stat().st_ino
            if inode in copied:
                os.link(copied[inode], here / name)
            else:
                copied[inode] = Path(shutil.copy2(path, here / name))
    for stamps in target.glob("*/system/*/*/*/stamp.json"):
        found = {}
        for name, (*_, sha256) in json.loads(stamps.read_text()).items():
            stat = (stamps.parent / name).stat()
            found[name] = [stat.st_dev, stat.st_ino, stat.st_mtime_ns, sha256]
        stamps.write_text(json.dumps(found))


def overwrite(path: Path) -> None:
    """Damages a file in place, under all its names, as a broken disk would: same size, same time."""
    stat = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as out:
        out.write(struct.pack("<Q", 0xBAD))
    path.chmod(stat.st_mode)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
