"""A release of two small kernels and two initrds, a real registry to publish it to, and hosts that fetch from there."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from systemfiles import SystemFiles
from systemfiles.content.artifacts import Artifact
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import load_catalog
from systemfiles.foundation.digest import Digest
from systemfiles.release.building import Origin, release
from systemfiles.release.dist import read_dist
from systemfiles.release.publishing import publish
from systemfiles.sources.oci import Repository
from systemfiles.sources.signatures import PrivateKey
from tests.retention.world import World, world

PAIRS = (("k-1", "i-1"), ("k-2", "i-2"))
ORIGIN = Origin("https://ci.example.com/systemfiles", None, 1_760_000_000)


@dataclass(frozen=True)
class Key:
    """A key as its owner has it: the file to sign with, and the half that hosts are given."""

    path: Path
    public: str

    @property
    def private(self) -> PrivateKey:
        return PrivateKey.read(self.path)

    @property
    def id(self) -> str:
        return self.private.public.id


def new_key(directory: Path, kind: str = "ed25519") -> Key:
    private: Any = (
        ed25519.Ed25519PrivateKey.generate() if kind == "ed25519" else ec.generate_private_key(ec.SECP256R1())
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{len([*directory.iterdir()])}.pem"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return Key(path, public.decode())


@dataclass
class Press:
    """A registry of one's own that the release is published to."""

    world: World
    dist: Path
    artifacts: tuple[Artifact, ...]
    place: str
    directory: Path
    _hosts: Iterator[int]

    @property
    def registry(self) -> str:
        return f"{self.world.host}/{self.place}"

    def elsewhere(self, name: str) -> Press:
        """Another registry."""
        directory = self.directory / name
        directory.mkdir()
        return Press(self.world, self.dist, self.artifacts, f"{self.place}-{name}", directory, self._hosts)

    def key(self, kind: str = "ed25519") -> Key:
        return new_key(self.directory / "keys", kind)

    def publish(self, *keys: Key, artifacts: tuple[Artifact, ...] | None = None) -> dict[str, str]:
        """Publishes; returns the reference with digest of each version."""
        made = self.artifacts if artifacts is None else artifacts
        found = publish(made, self.registry, [key.private for key in keys])
        return {each.reference.partition("@")[0].rpartition(":")[2]: each.reference for each in found}

    def repository(self, kind: str = "kernel") -> Repository:
        return Repository(self.world.host, f"{self.place}/{kind}")

    def index(self, version: str, kind: str = "kernel") -> dict[str, Any]:
        return dict(self.repository(kind).manifest(version).value)

    def blob(self, digest: str) -> Path:
        """Where the registry keeps the bytes of a blob or manifest."""
        hexadecimal = Digest.parse(digest).hex
        blobs = self.world.root / "registry" / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
        return blobs / hexadecimal[:2] / hexadecimal / "data"

    def host(
        self,
        *,
        trusted: tuple[Key, ...] = (),
        revoked: tuple[str, ...] = (),
        build: bool = False,
        registries: tuple[str, ...] | None = None,
        arch: Arch = Arch.X86_64,
    ) -> SystemFiles:
        """A host of its own, which takes what is published there."""
        data = self.directory / f"host-{next(self._hosts)}"
        catalog = data.with_suffix(".toml")
        catalog.write_text(self.world.catalog.read_text() + _settings(trusted, revoked))
        places = [self.registry] if registries is None else registries
        top = f"build = {str(build).lower()}\nregistries = {json.dumps([*places])}\n"
        catalog.write_text(top + catalog.read_text())
        return SystemFiles(data, catalog=catalog, arch=arch)


def _settings(trusted: tuple[Key, ...], revoked: tuple[str, ...]) -> str:
    if not trusted:
        return ""
    keys = [key.public for key in trusted]
    return f"[trust]\nkeys = {json.dumps(keys)}\nrevoked = {json.dumps([*revoked])}\n"


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as running:
        yield running


@pytest.fixture(scope="session")
def dist(small_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of both pairs for both architectures."""
    return make_release(small_world, tmp_path_factory.mktemp("release") / "dist")


def make_release(
    here: World, dist: Path, *, pairs: tuple[tuple[str, str], ...] = PAIRS, when: int = ORIGIN.when
) -> Path:
    targets = [(kernel, initrd, arch) for arch in Arch for kernel, initrd in pairs]
    origin = ORIGIN._replace(when=when)
    release(targets, load_catalog(here.catalog), dist.parent / "no lock", dist, origin)
    return dist


_places = count()


@pytest.fixture
def press(small_world: World, dist: Path, tmp_path: Path) -> Press:
    return Press(small_world, dist, read_dist(dist), f"press-{next(_places)}", tmp_path, count())


def entries(index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an index has for each architecture, by OCI's names."""
    return {entry["platform"]["architecture"]: entry for entry in index["manifests"]}


def delete(press: Press, digest: str) -> None:
    """Deletes a manifest of the kernels' repository."""
    url = f"http://{press.registry.replace('/', '/v2/', 1)}/kernel/manifests/{Digest.parse(digest)}"
    with urllib.request.urlopen(urllib.request.Request(url, method="DELETE")) as answer:
        assert answer.status == 202
