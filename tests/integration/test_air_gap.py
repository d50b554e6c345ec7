"""A host without the internet: the default profile through mirrors, its kernels over HTTP, its busybox from a registry.

The catalog has the names and the origins of the shipped one, with the digests of what the mirrors have: Debian's kernel
packages and Debian's busybox, the latter as an image with the platforms and attestations that real ones have.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from systemfiles import SystemFiles
from systemfiles.content.descriptors import IMAGE_CONFIG, image_config, manifest
from systemfiles.content.descriptors import Descriptor as Part
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import load_catalog
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.manifests import IMAGE_INDEX, IMAGE_MANIFEST
from systemfiles.recipes.busybox import applets
from systemfiles.sources.oci import Repository
from tests.boot import qemu
from tests.boot.guest import Host, shell
from tests.boot.qemu import Q35, VIRT, Machine
from tests.conftest import ARCHES, Provisioned
from tests.integration.support import CLOSED, Completed, Mirror, completed, done_tasks, tree
from tests.registries import PASSWORD, USER, Registry, docker_config, registry

KERNEL, INITRD = "ch-v6.16.9", "v1.0.0"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
PLATFORMS = {"x86_64": {"architecture": "amd64"}, "aarch64": {"architecture": "arm64", "variant": "v8"}}
ATTESTATION = {"os": "unknown", "architecture": "unknown"}


@dataclass(frozen=True)
class AirGap:
    """Mirrors on loopback, and a data directory that is filled from them alone."""

    data_dir: Path
    catalog: Path
    environ: Mapping[str, str]
    files: Mirror
    images: Registry

    def doit(self) -> Completed:
        words = ["profile=cloud-hypervisor", f"arch={','.join(ARCHES)}", f"data_dir={self.data_dir}"]
        return completed([sys.executable, "-m", "doit", *words], env=self.environ)

    def system(self, arch: str) -> SystemFiles:
        return SystemFiles(self.data_dir, catalog=self.catalog, profile="cloud-hypervisor", arch=arch)


@pytest.fixture(scope="module", params=["none", "htpasswd", "token"])
def air_gap(
    request: pytest.FixtureRequest,
    provisioned: Provisioned,
    archive: Mirror,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[AirGap]:
    base = tmp_path_factory.mktemp("air-gap")
    with registry(base / "registry", auth=request.param) as images:
        login = _login(base, images.host, request.param)
        hub = Repository(images.host, "hub/library/busybox", environ=login)
        catalog = base / "versions.toml"
        catalog.write_text(_kernels(archive) + _initrd(_push(hub, provisioned)))
        environ = {
            **os.environ,
            **login,
            "SYSTEMFILES_CATALOG": str(catalog),
            "SYSTEMFILES_MIRRORS": f"https://github.com/={archive.url}github/ docker.io/={images.host}/hub/",
            "https_proxy": CLOSED,
            "no_proxy": "127.0.0.1",
        }
        archive.forget()
        yield AirGap(base / "data", catalog, environ, archive, images)


def _login(base: Path, host: str, auth: str) -> dict[str, str]:
    """Where the user's password is: in docker's configuration for one kind of registry, in netrc for the other."""
    (base / "home").mkdir()
    environ = {"HOME": str(base / "home"), "DOCKER_CONFIG": str(base / "home")}
    if auth == "htpasswd":
        docker_config(base / "home", host)
    elif auth == "token":
        (base / "home" / ".netrc").write_text(f'machine 127.0.0.1 login {USER} password "{PASSWORD}"\n')
        (base / "home" / ".netrc").chmod(0o600)
    return environ


def _kernels(archive: Mirror) -> str:
    """The shipped kernel's entry with the digests of Debian's packages, which the mirror has in its place."""
    text = "schema = 1\n"
    for arch, file in load_catalog(environ={}).kernel[KERNEL].files.items():
        package = archive.package(f"kernel {arch}")
        archive.serve(file.url.replace("https://github.com/", "/github/"), package)
        text += f'[kernel."{KERNEL}".files.{arch}]\nurl = "{file.url}"\nsha256 = "{package.name}"\n'
    return text


def _initrd(busybox: Digest) -> str:
    """The shipped initrd's entry for another image and, since Debian's kernels are modular, with modules."""
    image = str(load_catalog(environ={}).initrd[INITRD].busybox).partition("@")[0]
    return (
        f'[initrd."{INITRD}"]\ninit = "{INITRD}"\nbusybox = "{image}@{busybox}"\n'
        'load = ["virtio_pci", "virtio_blk", "overlay"]\ncarry = ["ext4"]\n'
    )


def _push(hub: Repository, provisioned: Provisioned) -> Digest:
    """Pushes an index of a busybox for each platform, with an attestation before each; returns the index's digest."""
    entries = []
    for arch, platform in PLATFORMS.items():
        layer = _push_blob(hub, _layer(provisioned.busybox(arch)), LAYER)
        image = manifest(_push_blob(hub, image_config(Arch.parse(arch), [layer]), IMAGE_CONFIG), [layer], {})
        hub.push_manifest(image, IMAGE_MANIFEST, Digest.of(image))
        described = Part(IMAGE_MANIFEST, Digest.of(image), len(image)).to_json()
        entries += [{**described, "platform": ATTESTATION}, {**described, "platform": {"os": "linux", **platform}}]
    index = json.dumps({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": entries}).encode()
    return hub.push_manifest(index, IMAGE_INDEX, "1.37.0-musl")


def _push_blob(hub: Repository, data: bytes, media_type: str) -> Part:
    hub.push_blob(Digest.of(data), len(data), io.BytesIO(data))
    return Part(media_type, Digest.of(data), len(data))


def _layer(busybox: bytes) -> bytes:
    """As in Docker Hub's image: one file under the name that sorts first, and hard links to it."""
    first, *others = (f"bin/{name}" for name in sorted({"busybox", *applets(busybox)}))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        member = tarfile.TarInfo(first)
        member.size, member.mode = len(busybox), 0o755
        tar.addfile(member, io.BytesIO(busybox))
        for name in others:
            link = tarfile.TarInfo(name)
            link.type, link.linkname, link.mode = tarfile.LNKTYPE, first, 0o755
            tar.addfile(link)
    return gzip.compress(packed.getvalue(), mtime=0)


def test_the_default_profile_comes_through_mirrors_each_file_once_and_is_then_up_to_date(air_gap: AirGap) -> None:
    ran = air_gap.doit()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {f"kernel:{KERNEL}:{arch}" for arch in ARCHES} <= done_tasks(ran.stdout)
    for arch in ARCHES:
        files = air_gap.system(arch).resolve()
        assert files.kernel.version == KERNEL
        assert files.initrd.version.startswith(f"{INITRD}-")
    assert air_gap.files.requests == [f"kernel {arch}" for arch in sorted(ARCHES)]
    asked = air_gap.images.requests("GET", "/hub/library/busybox/blobs/")
    assert len(asked) == len(set(asked)) == 2 * len(ARCHES)
    again = air_gap.doit()
    assert again.stdout.startswith("-- everything is up to date"), again.stdout + again.stderr
    assert air_gap.images.requests("GET", "/blobs/") == asked
    assert not tree(air_gap.data_dir / "tmp")


@pytest.mark.boot
@pytest.mark.parametrize("air_gap", ["token"], indirect=True)
@pytest.mark.parametrize("machine", [Q35, VIRT], ids=str)
def test_what_came_through_mirrors_boots(
    air_gap: AirGap, machine: Machine, provisioned: Provisioned, tmp_path: Path
) -> None:
    assert air_gap.doit().returncode == 0
    disks = Host(provisioned, tmp_path).disks(machine, shell("echo up and running"))
    outcome = qemu.boot(machine, air_gap.system(machine.arch).resolve(), disks)
    assert "up and running" in outcome.lines, outcome.console
    assert outcome.exit == 0
    assert outcome.clean, outcome.console
