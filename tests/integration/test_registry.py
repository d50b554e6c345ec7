"""A real registry server, read and written: what we pull and push is what skopeo and oras pull and push.

With every way a registry may ask who is there: not at all, for a password, and for a token.
"""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oras.client  # type: ignore[import-untyped]
import pytest

from systemfiles.content.artifacts import Artifacts
from systemfiles.content.descriptors import Descriptor, manifest
from systemfiles.content.layout import Layout
from systemfiles.content.store import Store
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import load_catalog
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceRefused, SourceUnavailable
from systemfiles.foundation.manifests import DOCKER_LIST, DOCKER_MANIFEST, IMAGE_INDEX, IMAGE_MANIFEST
from systemfiles.foundation.paths import Paths
from systemfiles.foundation.progress import silent
from systemfiles.provision.pull import Puller
from systemfiles.provision.rolling import Rolling
from systemfiles.provision.site import Site
from systemfiles.sources.oci import Repository
from tests.integration.support import Completed, completed, tree
from tests.registries import PASSWORD, USER, Registry, docker_config, registry

NAME = "library/app"
TITLE = "org.opencontainers.image.title"
PLATFORMS = {Arch.X86_64: "amd64", Arch.AARCH64: "arm64"}


@dataclass(frozen=True)
class Kind:
    """The media types of one family."""

    manifest: str
    index: str
    config: str
    layer: str


OCI = Kind(
    IMAGE_MANIFEST,
    IMAGE_INDEX,
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.oci.image.layer.v1.tar+gzip",
)
DOCKER = Kind(
    DOCKER_MANIFEST,
    DOCKER_LIST,
    "application/vnd.docker.container.image.v1+json",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
)


@dataclass(frozen=True)
class Server:
    """A running registry and somebody who may use it."""

    registry: Registry
    auth: str
    config: Path

    @property
    def repository(self) -> Repository:
        return Repository(self.registry.host, NAME, environ={"DOCKER_CONFIG": str(self.config)})

    def name(self, target: str) -> str:
        return f"{self.registry.host}/{NAME}{'@' if ':' in target else ':'}{target}"

    def their_pull(self, digest: Digest, base: Path) -> dict[str, bytes]:
        """The manifest and the blobs of an image as skopeo pulls them."""
        self.skopeo("copy", "--preserve-digests", f"docker://{self.name(digest)}", f"dir:{base / 'theirs'}")
        return blobs_in(base / "theirs")

    def oras(self) -> Any:
        client = oras.client.OrasClient(
            hostname=self.registry.host, insecure=True, auth_backend="basic" if self.auth == "htpasswd" else "token"
        )
        if self.auth != "none":
            client.auth.set_basic_auth(USER, PASSWORD)
        return client

    def skopeo(self, *words: str | Path) -> Completed:
        verify = ("--tls-verify=false",) if words[0] == "inspect" else ("--src-tls-verify=false",)
        secret = ("--authfile", self.config / "config.json") if self.auth != "none" else ()
        command = ["skopeo", "--insecure-policy", "--override-arch=amd64", words[0], *verify, *secret, *words[1:]]
        ran = completed([str(word) for word in command])
        assert ran.returncode == 0, ran.stderr
        return ran


@pytest.fixture(scope="module", params=["none", "htpasswd", "token"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("registry")
    with registry(base / "registry", auth=request.param) as running:
        yield Server(running, request.param, docker_config(base / "docker", running.host))


@pytest.fixture
def login(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, and the user's own environment."""
    monkeypatch.setenv("DOCKER_CONFIG", str(server.config))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("SYSTEMFILES_CREDENTIALS", raising=False)
    return server


def push(repository: Repository, kind: Kind, *tags: str) -> dict[Arch, Digest]:
    """Pushes an index of two images of three layers each, one of which they share; returns the images' digests."""
    images = {arch: push_image(repository, kind, arch) for arch in PLATFORMS}
    entries = [
        {**images[arch].to_json(), "platform": {"os": "linux", "architecture": name}}
        for arch, name in PLATFORMS.items()
    ]
    raw = json.dumps({"schemaVersion": 2, "mediaType": kind.index, "manifests": entries}, indent=3).encode()
    for tag in tags:
        assert repository.push_manifest(raw, kind.index, tag) == Digest.of(raw)
    return {arch: image.digest for arch, image in images.items()}


def push_image(repository: Repository, kind: Kind, arch: Arch) -> Descriptor:
    layers = [layer_of(seed) for seed in ("shared", str(arch), f"{arch} again")]
    config = json.dumps(
        {
            "architecture": PLATFORMS[arch],
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [Digest.of(gzip.decompress(layer)) for layer in layers]},
        }
    ).encode()
    blobs = [(config, kind.config), *((layer, kind.layer) for layer in layers)]
    described = []
    for number, (data, media_type) in enumerate(blobs):
        repository.push_blob(Digest.of(data), len(data), io.BytesIO(data))
        annotations = {TITLE: f"layer-{number}"} if kind is OCI and number else {}
        described.append(Descriptor(media_type, Digest.of(data), len(data), annotations).to_json())
    value = {"schemaVersion": 2, "mediaType": kind.manifest, "config": described[0], "layers": described[1:]}
    raw = json.dumps(value, indent=3).encode()  # not as anyone else would write it: bytes are kept as they are
    digest = repository.push_manifest(raw, kind.manifest, Digest.of(raw))
    repository.push_manifest(raw, kind.manifest, f"only-{PLATFORMS[arch]}")
    return Descriptor(kind.manifest, digest, len(raw))


def layer_of(seed: str) -> bytes:
    return gzip.compress(random.Random(seed).randbytes(200_000), mtime=0)


def pull(base: Path, reference: str, arch: Arch) -> Descriptor:
    """Pulls into the data directory below `base`, under the name "ours"."""
    paths, catalog = Paths(base / "data"), load_catalog(environ={})
    store = Store(paths, Artifacts(paths))
    pulled = Puller(Site(paths, catalog, store, Rolling(paths, catalog), silent, None)).pull(reference, arch)
    store.layout.name("ours", pulled)
    return pulled


def copied_out(base: Path) -> dict[str, bytes]:
    """What skopeo finds under the name "ours" in the data directory below `base`."""
    layout = base / "data" / "system" / "oci-cache"
    ok("skopeo", "--insecure-policy", "copy", "--preserve-digests", f"oci:{layout}:ours", f"dir:{base / 'ours'}")
    return blobs_in(base / "ours")


def ok(*command: str | Path) -> None:
    ran = completed([str(word) for word in command])
    assert ran.returncode == 0, ran.stdout + ran.stderr


def blobs_in(directory: Path) -> dict[str, bytes]:
    """The manifest and the blobs of a directory that skopeo copied to."""
    return {name: (directory / name).read_bytes() for name in tree(directory) if name != "version"}


@pytest.mark.parametrize("arch", PLATFORMS, ids=str)
@pytest.mark.parametrize("by", ["tag", "digest"])
def test_what_we_pulled_skopeo_copies_out_and_finds_equal_to_its_own_pull(
    login: Server, arch: Arch, by: str, tmp_path: Path
) -> None:
    images = push(login.repository, OCI, "1")
    target = "1" if by == "tag" else login.repository.manifest("1").digest
    assert pull(tmp_path, login.name(target), arch).digest == images[arch]
    theirs = login.their_pull(images[arch], tmp_path)
    assert copied_out(tmp_path) == theirs
    assert len(theirs) == 5
    assert Digest.of(theirs.pop("manifest.json")) == images[arch]
    assert [Digest.of(data).hex for data in theirs.values()] == list(theirs)


@pytest.mark.parametrize("arch", PLATFORMS, ids=str)
def test_what_we_pulled_of_dockers_kind_others_can_read_and_do_not_collect(
    login: Server, arch: Arch, tmp_path: Path
) -> None:
    images = push(login.repository, DOCKER, "docker")
    pull(tmp_path, login.name("docker"), arch)
    theirs, ours = login.their_pull(images[arch], tmp_path), copied_out(tmp_path)
    before, after = json.loads(theirs.pop("manifest.json")), json.loads(ours.pop("manifest.json"))
    assert ours == theirs
    for key in ("digest", "size"):
        assert after["config"][key] == before["config"][key]
        assert [layer[key] for layer in after["layers"]] == [layer[key] for layer in before["layers"]]
    types = {after["mediaType"], after["config"]["mediaType"], *(layer["mediaType"] for layer in after["layers"])}
    assert types == {OCI.manifest, OCI.config, OCI.layer}
    assert after["annotations"] == {"io.systemfiles.converted-from": images[arch]}

    layout = tmp_path / "data" / "system" / "oci-cache"
    there = tree(layout)
    ok("umoci", "gc", "--layout", layout)
    assert tree(layout) == there
    # and what the digest is the digest of is kept as it came
    assert json.loads(Layout(Paths(tmp_path / "data")).read(images[arch])) == before


def test_each_blob_is_asked_for_once_and_what_two_images_share_is_not_asked_for_again(
    login: Server, tmp_path: Path
) -> None:
    push(login.repository, OCI, "1")
    before = len(login.registry.requests("GET", "/blobs/"))
    for _ in range(2):
        for arch in PLATFORMS:
            pull(tmp_path, login.name("1"), arch)
    asked = login.registry.requests("GET", "/blobs/")[before:]
    assert len(asked) == len(set(asked)) == 2 * 4 - 1


@pytest.mark.parametrize("kind", [OCI, DOCKER], ids=["OCI", "Docker"])
def test_what_we_pushed_skopeo_inspects_and_copies(login: Server, kind: Kind, tmp_path: Path) -> None:
    images = push(login.repository, kind, "2")
    found = json.loads(login.skopeo("inspect", f"docker://{login.name('2')}").stdout)
    assert (found["Os"], found["Architecture"], len(found["Layers"])) == ("linux", "amd64", 3)
    raw = login.skopeo("inspect", "--raw", f"docker://{login.name('2')}").stdout.encode()
    assert Digest.of(raw) == login.repository.manifest("2").digest

    copy = tmp_path / "copy"
    login.skopeo("copy", "--all", "--preserve-digests", f"docker://{login.name('2')}", f"dir:{copy}")
    blobs = blobs_in(copy)
    assert blobs["manifest.json"] == raw
    assert {Digest.of(data) for data in blobs.values()} >= {*images.values(), Digest.of(layer_of("shared"))}
    assert len(blobs) == 1 + 2 + 2 + 5


def test_what_we_pushed_oras_pulls(login: Server, tmp_path: Path) -> None:
    files = {name: random.Random(name).randbytes(100_000) for name in ("vmlinux", "initrd")}
    repository = login.repository
    for data in (b"{}", *files.values()):
        repository.push_blob(Digest.of(data), len(data), io.BytesIO(data))
    layers = [
        Descriptor("application/octet-stream", Digest.of(data), len(data), {TITLE: name})
        for name, data in files.items()
    ]
    config = Descriptor("application/vnd.oci.empty.v1+json", Digest.of(b"{}"), 2)
    repository.push_manifest(manifest(config, layers, {}), IMAGE_MANIFEST, "artifact")
    pulled = login.oras().pull(target=login.name("artifact"), outdir=str(tmp_path))
    assert {Path(file).name: Path(file).read_bytes() for file in pulled} == files


@pytest.mark.parametrize("server", ["none", "htpasswd"], indirect=True)  # its pushes fail where there are tokens
def test_what_oras_pushed_we_pull(login: Server, tmp_path: Path) -> None:
    data = layer_of("artifact")
    (tmp_path / "artifact").write_bytes(data)
    login.oras().push(target=login.name("oras"), files=[str(tmp_path / "artifact")], disable_path_validation=True)
    pull(tmp_path, login.name("oras"), Arch.X86_64)
    assert copied_out(tmp_path)[Digest.of(data).hex] == data


def test_what_skopeo_pushed_we_pull(login: Server, tmp_path: Path) -> None:
    images = push(login.repository, OCI, "4")
    source, target = f"docker://{login.name('4')}", f"docker://{login.registry.host}/other/app:1"
    login.skopeo("copy", "--all", "--preserve-digests", "--dest-tls-verify=false", source, target)
    pulled = pull(tmp_path, f"{login.registry.host}/other/app:1", Arch.AARCH64)
    assert pulled.digest == images[Arch.AARCH64]


def test_a_blob_that_is_there_is_not_sent_again(login: Server) -> None:
    push(login.repository, OCI, "5")
    before = len(login.registry.requests("PUT", "/blobs/"))
    push(login.repository, OCI, "5")
    assert len(login.registry.requests("PUT", "/blobs/")) == before
    assert login.repository.has_blob(Digest.of(layer_of("shared")))
    assert not login.repository.has_blob(Digest.of(b"never seen"))
    assert login.repository.has_manifest("5")
    assert not login.repository.has_manifest("never-seen")


def test_an_image_that_is_not_there_is_unavailable(login: Server, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="could not be fetched") as caught:
        pull(tmp_path, login.name("never-seen"), Arch.X86_64)
    assert [(where, why) for where, why in caught.value.tried] == [(login.name("never-seen"), "HTTP 404 Not Found")]


@pytest.mark.parametrize("password", [None, "wrong"])
def test_who_may_not_read_is_told_so_at_once(login: Server, password: str | None, tmp_path: Path) -> None:
    push(login.repository, OCI, "6")
    environ: dict[str, Any] = {"HOME": str(tmp_path)}
    if password:
        environ["SYSTEMFILES_CREDENTIALS"] = f"{login.registry.host}=basic:{USER}:{password}"
    stranger = Repository(login.registry.host, NAME, environ=environ)
    if login.auth == "none":
        assert stranger.manifest("6").media_type == IMAGE_INDEX
        return
    with pytest.raises(SourceRefused, match="does not accept" if password else "needs credentials") as caught:
        stranger.manifest("6")
    assert "docker login" in str(caught.value)
