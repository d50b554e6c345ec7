"""A world of hostile hosts, and what may be asked of them: the right bytes, or one typed error and nothing left behind.

Each table of this package has rows that say what is asked for, what the origin does, and what comes of it; for each row
the origin is then mended and the same call succeeds. What each host was asked is on record, and no secret is ever told
to one that it is not for.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from systemfiles import SystemFiles
from systemfiles.content.artifacts import Artifacts
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.store import Store
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import load_catalog
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceUnavailable, SystemFilesError
from systemfiles.foundation.files import NewFile
from systemfiles.foundation.paths import Paths
from systemfiles.foundation.progress import Progress
from systemfiles.foundation.progress import silent as silent_progress
from systemfiles.provision.pull import Puller
from systemfiles.provision.rolling import Rolling
from systemfiles.provision.site import Site
from systemfiles.recipes.initrd import build_initrd
from systemfiles.sources.http import fetch
from systemfiles.sources.transport import Bounds
from tests.contract.answers import Answer, content
from tests.contract.origins import Origin, Registry, for_platform, tls
from tests.unit.test_kernelimage import image, vmlinux
from tests.unit.test_layers import directory, file, tar

BOUNDS = Bounds(connect=1, read=0.4, total=5, slowest=2000, attempts=3, pause=0.01, longest_pause=2)
SLACK = 10  # seconds that the slowest row may take on a busy machine
LARGEST = 4 << 20
USER, PASSWORD, TOKEN = "operator", "correct-horse", "token-of-the-registry"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"

SIZE = 300_000
FILE, OTHER = (random.Random(seed).randbytes(SIZE) for seed in (1, 2))
CUT = 100_000

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n"
APPLETS = sorted({"sh", "mount", "cat", *(f"applet{n}" for n in range(60))})
BUSYBOX = b"\x7fELF\0" + b"".join(name.encode() + b"\0" for name in APPLETS)
ROOT = gzip.compress(tar(directory("bin"), file("bin/busybox", BUSYBOX, mode=0o755)), mtime=0)
TAG = "1"


@dataclass(frozen=True)
class Hosts:
    """All who may be asked: an origin, a registry, a token server, and somebody else's host."""

    origin: Origin
    tokens: Origin
    registry: Registry
    other: Origin


class World:
    """A data directory and the hosts that it is filled from.

    `secrets` says which hosts may learn each; `made` is what the last initrd holds: names and their types and modes.
    """

    def __init__(self, hosts: Hosts, base: Path, monkeypatch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> None:
        self.base = base
        self.paths = Paths(base / "data")
        self.monkeypatch = monkeypatch
        self.origin, self.tokens, self.registry, self.other = hosts.origin, hosts.tokens, hosts.registry, hosts.other
        self.servers = [self.origin, self.tokens, self.registry, self.other]
        for server in self.servers:
            server.requests.clear()
        self._stack = stack
        self.secrets: dict[str, set[str]] = {}
        self.made: dict[str, str] = {}
        self.url = self.origin.url("/file")
        self.size: int | None = SIZE
        self.mirrors: dict[str, list[str]] = {}
        self.arch = "x86_64"
        self.kernel = vmlinux()
        self.target = TAG
        self.mend()

    def mend(self) -> None:
        """Every host is honest and has what it should have, under the name that is asked for."""
        self.kernel = image() if self.arch == "aarch64" else vmlinux()
        for server in self.servers:
            server.answers.clear()
            server.answers["/file"] = content(FILE)
            server.answers["/kernel"] = content(self.kernel)
        self.registry.forget()
        entries = [
            for_platform(self.registry.add_image(ROOT, annotations={"for": platform}), platform)
            for platform in ("unknown/unknown", "linux/amd64", "linux/arm64/v8")
        ]
        index = self.registry.add_index(*entries, tags=[TAG])
        if self.target != TAG:
            self.target = index["digest"]

    def login(self, host: str, *others: str, secret: str = PASSWORD) -> None:
        """The user has a password for `host`; nobody but it and `others` may learn that."""
        self.monkeypatch.setenv("SYSTEMFILES_CREDENTIALS", f"{host}=basic:{USER}:{secret}")
        self.secrets[secret] = self.secrets[BASIC] = {host, *others}

    def https(self, *, trusted: bool = True) -> Origin:
        """One more origin, which speaks https."""
        certificate, context = tls(self.base)
        if trusted:
            self.monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        server = Origin(tls=context)
        self.servers.append(server)
        self._stack.callback(server.close)
        server.answers["/file"] = content(FILE)
        self.url = server.url("/file")
        return server

    def leaks(self) -> list[str]:
        """Every time that a secret was told to somebody it is not for."""
        return [
            f"{secret} to {server.host} in {request.path} {request.headers} {request.body!r}"
            for server in self.servers
            for request in server.requests
            for secret, hosts in self.secrets.items()
            if server.host not in hosts and secret in f"{request.path} {request.headers} {request.body!r}"
        ]

    def left(self) -> dict[str, bytes]:
        """Every file in the data directory but locks, as the disk has it."""
        files = {str(path.relative_to(self.paths.data_dir)): path for path in self.paths.data_dir.rglob("*")}
        return {
            name: path.read_bytes()
            for name, path in files.items()
            if (path.is_symlink() or not path.is_dir()) and not name.startswith("locks/")
        }


# --- what may be asked for ---


def a_file(world: World) -> None:
    """fetch(): the bytes of a URL."""
    with NewFile(world.paths.tmp) as out:
        fetch(world.url, out, subject="it", digest=Digest.of(FILE), size=world.size, mirrors=world.mirrors)
        assert out.path.read_bytes() == FILE


def a_kernel(world: World) -> None:
    """What `systemfiles provision --kernel k1` does, with a catalog that pins whatever the world's kernel is."""
    catalog = world.base / "versions.toml"
    catalog.write_text(
        f"schema = 1\n[kernel.k1.files.{world.arch}]\n"
        f'url = "{world.origin.url("/kernel")}"\nsha256 = "{hashlib.sha256(world.kernel).hexdigest()}"\n'
    )
    system = SystemFiles(world.paths.data_dir, catalog=catalog, arch=world.arch)
    system.provisioner().kernels.provide("k1", system.arch)
    assert system.kernel_path("k1").read_bytes() == world.kernel


def pull(world: World, progress: Progress = silent_progress) -> Descriptor:
    catalog, store = load_catalog(environ={}), Store(world.paths, Artifacts(world.paths))
    site = Site(world.paths, catalog, store, Rolling(world.paths, catalog), progress, None)
    return Puller(site).pull(world.registry.reference(world.target), Arch.parse(world.arch))


def an_image(world: World) -> list[Path]:
    """Puller.pull(): an image into the content store; returns its layers."""
    pulled = pull(world)
    blobs = world.paths.oci_cache / "blobs" / "sha256"
    manifest = json.loads((blobs / pulled.digest.hex).read_bytes())
    for described in (manifest["config"], *manifest["layers"]):
        assert (blobs / described["digest"][7:]).stat().st_size == described["size"]
    return [blobs / layer["digest"][7:] for layer in manifest["layers"]]


def an_initrd(world: World) -> None:
    """An image and an initrd on top of it, which cpio(1) lists for `world.made`."""
    with contextlib.ExitStack() as stack:
        layers = [stack.enter_context(path.open("rb")) for path in an_image(world)]
        out = io.BytesIO()
        build_initrd(layers, out, init="v1.0.0")
    listed = subprocess.run(["cpio", "-itv", "--quiet"], input=gzip.decompress(out.getvalue()), capture_output=True)
    assert (listed.returncode, listed.stderr) == (0, b"")
    # mode, links, owner, group, size (of a device: two numbers), month, day, time or year, name with its newlines
    head = r"^([-dlbcps][-rwxsStT]{9}) +\d+ \S+ +\S+ +[\d, ]+ \w{3} +\d+ +[\d:]+ "
    _, *parts = re.split(head, listed.stdout.decode(), flags=re.MULTILINE)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    world.made = {name.removesuffix("\n").partition(" -> ")[0]: mode for mode, name in pairs}


Ask = Callable[[World], object]
Check = Callable[[World], None]


@dataclass(frozen=True)
class Row:
    """What the origin does (`does`), how it is asked, and what comes of it.

    `error` is None where the right bytes are got in spite of it; `says` is in the error's text ({origin}, {registry},
    {tokens} and {other} stand for hosts); `asked` is how often whoever has it was asked for paths that match; `then`
    looks at whatever else matters.
    """

    what: str
    ask: Ask
    does: Check
    error: type[SystemFilesError] | None = None
    says: Sequence[str] = ()
    asked: dict[str, int] = field(default_factory=dict)
    then: Check = lambda world: None

    def __str__(self) -> str:
        return self.what


def gives(answer: Answer) -> Check:
    """The origin answers with this, whatever it is asked for."""

    def hostile(world: World) -> None:
        world.origin.answers.update({"/file": answer, "/kernel": answer})

    return hostile


def of_unknown_size(answer: Answer) -> Check:
    def hostile(world: World) -> None:
        world.size = None
        gives(answer)(world)

    return hostile


def one_request_to_the_other_without_a_word_of_who_we_are(world: World) -> None:
    (request,) = world.other.asked("/file")
    assert not {"authorization", "cookie", "proxy-authorization"} & set(request.headers)


def nobody_else_was_asked(world: World) -> None:
    assert world.other.requests == []


def run_row(row: Row, world: World) -> None:
    """Does what the row says, asserts what it promises, mends the origin and asks again."""
    row.does(world)
    begun = time.monotonic()
    if row.error is None:
        row.ask(world)
        assert_whole(world)
    else:
        with pytest.raises(row.error) as caught:
            row.ask(world)
        assert_says(caught.value, row, world)
        assert_nothing_is_left_but_intact_blobs(world)
    assert time.monotonic() - begun < SLACK
    asked = world.registry if row.ask in (an_image, an_initrd) else world.origin
    assert {pattern: len(asked.asked(pattern)) for pattern in row.asked} == row.asked
    row.then(world)
    assert world.leaks() == []

    world.mend()
    row.ask(world)
    assert_whole(world)
    assert world.leaks() == []


def assert_says(error: SystemFilesError, row: Row, world: World) -> None:
    assert isinstance(error, row.error or SystemFilesError)
    text = str(error)
    hosts = {
        "{origin}": world.origin.url(""),
        "{registry}": world.registry.host,
        "{tokens}": world.tokens.host,
        "{other}": world.other.host,
    }
    for fact in row.says:
        for stand_in, host in hosts.items():
            fact = fact.replace(stand_in, host)
        assert any(choice in text for choice in fact.split("|")), text
    assert all(line.isprintable() for line in text.splitlines()), text
    assert len(text) < 3000
    if isinstance(error, SourceUnavailable):
        assert error.tried
        assert error.hint or row.ask is a_file


def assert_nothing_is_left_but_intact_blobs(world: World) -> None:
    for name, data in world.left().items():
        directory, _, last = name.rpartition("/")
        if directory == "system/oci-cache/blobs/sha256":
            assert hashlib.sha256(data).hexdigest() == last
        elif name == "system/oci-cache/index.json":
            assert json.loads(data)["manifests"] == []
        else:
            assert name == "system/oci-cache/oci-layout"


def assert_whole(world: World) -> None:
    """Every blob is what its name says, and no work is left lying about."""
    for name, data in world.left().items():
        assert not name.startswith("tmp/")
        if name.startswith("system/oci-cache/blobs/sha256/"):
            assert hashlib.sha256(data).hexdigest() == name.rpartition("/")[2]
