"""Whatever an origin does: the right bytes, or one typed error with its facts and nothing left behind.

One table. Each row says what is asked for, what the origin does, and what comes of it; for each row the origin is then
mended and the same call succeeds. What each origin was asked is on record, and no secret is ever told to another host.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import random
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from systemfiles import SystemFiles
from systemfiles.content.artifacts import Artifacts
from systemfiles.content.layout import Descriptor
from systemfiles.content.store import Store
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import load_catalog
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    DigestMismatch,
    InvalidArchive,
    InvalidKernel,
    NoSpace,
    SizeMismatch,
    SourceError,
    SourceRefused,
    SourceUnavailable,
    SystemFilesError,
)
from systemfiles.foundation.files import NewFile
from systemfiles.foundation.paths import Paths
from systemfiles.foundation.progress import Progress
from systemfiles.foundation.progress import silent as silent_progress
from systemfiles.provision.pull import Puller
from systemfiles.provision.rolling import Rolling
from systemfiles.provision.site import Site
from systemfiles.recipes.initrd import build_initrd
from systemfiles.sources import http, transport
from systemfiles.sources.http import fetch
from systemfiles.sources.oci import Repository
from systemfiles.sources.transport import Bounds
from tests.contract.origins import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    ELSEWHERE,
    IMAGE_INDEX,
    IMAGE_MANIFEST,
    LAYER,
    REPOSITORY,
    Answer,
    Exchange,
    Origin,
    Registry,
    basic,
    bearer,
    body,
    chunked,
    content,
    cut,
    digest_of,
    for_platform,
    in_turn,
    only_for,
    part,
    redirect,
    repeated,
    reset,
    silent,
    status,
    tls,
    verbatim,
)
from tests.unit.test_deb import ar, member, package
from tests.unit.test_kernelimage import bzimage, image, vmlinux
from tests.unit.test_kmod import module
from tests.unit.test_layers import directory, file, hardlink, symlink, tar
from tests.unit.test_layers import member as tar_member

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
    """A data directory and the hosts that it is filled from."""

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
            f"{secret} to {server.host} in {request.path} {request.headers}"
            for server in self.servers
            for request in server.requests
            for secret, hosts in self.secrets.items()
            if server.host not in hosts and secret in f"{request.path} {request.headers}"
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


def an_initrd(world: World) -> list[str]:
    """An image and an initrd on top of it; returns the names in that, as cpio(1) lists them."""
    with contextlib.ExitStack() as stack:
        layers = [stack.enter_context(path.open("rb")) for path in an_image(world)]
        out = io.BytesIO()
        build_initrd(layers, out, init="v1.0.0")
    listed = subprocess.run(["cpio", "-it", "--quiet"], input=gzip.decompress(out.getvalue()), capture_output=True)
    assert (listed.returncode, listed.stderr) == (0, b"")
    return listed.stdout.decode().splitlines()


Ask = Callable[[World], object]
Check = Callable[[World], None]


@dataclass(frozen=True)
class Row:
    """What the origin does (`does`), how it is asked, and what comes of it.

    `error` is None where the right bytes are got in spite of it; `says` is in the error's text ({origin}, {registry}
    and {other} stand for hosts); `asked` is how often whoever has it was asked for paths that match; `then` looks at
    whatever else matters.
    """

    what: str
    ask: Ask
    does: Check
    error: type[SystemFilesError] | None = None
    says: Sequence[str] = ()
    asked: dict[str, int] = field(default_factory=dict)
    then: Check = lambda world: None


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


# --- files ---

ZEROS = 20 << 20


def gzip_bomb(size: int = ZEROS) -> bytes:
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    return pack.compress(bytes(size)) + pack.flush()


def waited(seconds: float) -> Check:
    def check(world: World) -> None:
        first, second = world.origin.asked("/file")
        assert second.at - first.at >= seconds

    return check


def no_range_in(number: int) -> Check:
    def check(world: World) -> None:
        assert "range" not in world.origin.asked("/file")[number].headers

    return check


def resumed(world: World) -> None:
    again = world.origin.asked("/file")[1].headers
    assert again["range"] == f"bytes={CUT}-"
    assert again["if-range"].startswith('"')


def resumed_again(world: World) -> None:
    ranges = [request.headers.get("range") for request in world.origin.asked("/file")]
    assert ranges == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]


def busy_until_a_date(x: Exchange) -> None:
    status(429, Retry_After=formatdate(time.time() + 2, usegmt=True))(x)


def moved(target: Callable[[World], str], sends: Answer | None = None) -> Check:
    """The origin, which wants a password, sends us on; what else it `sends` is for nobody."""

    def hostile(world: World) -> None:
        world.login(world.origin.host)
        head = b"HTTP/1.1 302 Found\r\nContent-Encoding: gzip\r\nLocation: %s\r\n\r\n"

        def answer(x: Exchange) -> None:
            if x.request.headers.get("authorization") != BASIC:
                basic()(x)
                return
            x.send(head % target(world).encode())
            if sends:
                sends(x)

        world.origin.answers["/file"] = answer

    return hostile


def one_request_to_the_other_without_a_word_of_who_we_are(world: World) -> None:
    (request,) = world.other.asked("/file")
    assert not {"authorization", "cookie", "proxy-authorization"} & set(request.headers)


def from_https(target: str) -> Check:
    """The origin speaks https, and sends us to `target`, or to what its plain twin has, under this scheme."""

    def hostile(world: World) -> None:
        plain = world.origin.url("/file").partition(":")[2]
        world.https().answers["/file"] = redirect(target if ":" in target else f"{target}:{plain}")

    return hostile


def untrusted_https(world: World) -> None:
    world.https(trusted=False)
    world.monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tls(world.base / "other")[0]))


def now_trusted(world: World) -> None:
    world.monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(world.base / "certificate.pem"))


def with_a_login(answer: Answer) -> Check:
    def hostile(world: World) -> None:
        world.login(world.origin.host)
        gives(answer)(world)

    return hostile


def a_lying_mirror(world: World) -> None:
    world.login(world.origin.host)
    world.mirrors = {world.origin.url(): [world.other.url()]}
    world.other.answers["/file"] = content(OTHER)


def a_mirror_that_asks_who_we_are(world: World) -> None:
    a_lying_mirror(world)
    world.other.answers["/file"] = basic()


def two_hosts_with_a_password_each(world: World) -> None:
    world.login(world.origin.host)
    theirs = "Basic " + base64.b64encode(b"we:their-secret").decode()
    world.monkeypatch.setenv(
        "SYSTEMFILES_CREDENTIALS",
        f"{world.origin.host}=basic:{USER}:{PASSWORD} {world.other.host}=basic:we:their-secret",
    )
    world.secrets[theirs] = {world.other.host}
    world.origin.answers["/file"] = redirect(world.other.url("/file"))
    served = content(FILE)
    world.other.answers["/file"] = lambda x: (
        served(x) if x.request.headers.get("authorization") == theirs else basic()(x)
    )


def a_cookie(world: World) -> None:
    world.secrets["biscuit"] = set()
    world.origin.answers["/file"] = in_turn(
        status(503, Set_Cookie="session=biscuit; Path=/"),
        redirect(world.other.url("/file"), Set_Cookie="session=biscuit; Path=/"),
    )


def a_closed_port(world: World) -> None:
    gone = Origin()
    gone.close()
    world.url = gone.url("/file")


def back_at_the_origin(world: World) -> None:
    world.url = world.origin.url("/file")


LONG = "9" * 5000
FILES = [
    Row(
        "another file of the same size",
        a_file,
        gives(content(OTHER)),
        DigestMismatch,
        ["{origin}/file", digest_of(FILE), digest_of(OTHER), "it was discarded"],
        {"/file": 1},
    ),
    Row("a file one byte short", a_file, gives(content(FILE[:-1])), SizeMismatch, ["300000 bytes", "299999 bytes"]),
    Row("a file one byte longer", a_file, gives(content(FILE + b"x")), SizeMismatch, ["300000 bytes"]),
    Row("nothing at all", a_file, gives(content(b"")), SizeMismatch, ["0 bytes"]),
    Row("a web page with 200", a_file, gives(body(HTML, Content_Type="text/html")), SizeMismatch, ["54 bytes"]),
    Row("a web page, size unknown", a_file, of_unknown_size(body(HTML)), DigestMismatch, [digest_of(HTML)]),
    Row("a body that breaks off", a_file, gives(body(FILE[:1000], length=SIZE)), SourceUnavailable, [], {"/file": 3}),
    Row("less than it announces", a_file, of_unknown_size(body(FILE, length=SIZE + 1)), SourceUnavailable),
    Row("more than it announces", a_file, gives(body(FILE, length=1000)), SizeMismatch, ["1000 bytes"]),
    Row("chunks that break off", a_file, gives(chunked(FILE, ending=b"")), SourceUnavailable, [], {"/file": 3}),
    Row("half a chunk", a_file, gives(verbatim(CHUNKS + b"fffff\r\n" + FILE[:9])), SourceUnavailable),
    Row("chunks of no size", a_file, gives(verbatim(CHUNKS + b"x\r\n")), SourceUnavailable),
    Row("a negative chunk", a_file, gives(verbatim(CHUNKS + b"-5\r\n" + FILE)), SourceError),
    Row("an endless body", a_file, gives(repeated(OK + b"\r\n", bytes(65536))), SizeMismatch, ["300000 bytes"]),
    Row("endless chunks", a_file, gives(repeated(CHUNKS, b"10000\r\n" + bytes(65536) + b"\r\n")), SizeMismatch),
    Row(
        "an endless body, size unknown",
        a_file,
        of_unknown_size(repeated(OK + b"\r\n", bytes(65536))),
        SizeMismatch,
        [f"{LARGEST} bytes"],
    ),
    Row(
        "a trickling body",
        a_file,
        gives(repeated(OK + b"Content-Length: 300000\r\n\r\n", b"0123456789", 0.02)),
        SourceUnavailable,
        ["only"],
        {"/file": 3},
    ),
    Row("a trickling head", a_file, gives(repeated(OK + b"A: ", b"x", 0.02)), SourceUnavailable, [], {"/file": 3}),
    Row("a trickling frame", a_file, gives(repeated(CHUNKS + b"1;", b"x", 0.02)), SourceUnavailable),
    Row("one 100 Continue after another", a_file, gives(repeated(b"", b"HTTP/1.1 100 Go\r\n\r\n")), SourceUnavailable),
    Row("trailers without end", a_file, gives(repeated(CHUNKS + b"1\r\nx\r\n0\r\n", b"A: b\r\n")), SourceUnavailable),
    Row("headers without end", a_file, gives(repeated(OK, b"A: b\r\n")), SourceUnavailable),
    Row("a header without end", a_file, gives(repeated(OK + b"A: ", bytes(65536))), SourceUnavailable),
    Row("silence", a_file, gives(silent), SourceUnavailable, ["silent"], {"/file": 3}),
    Row("a reset connection", a_file, gives(reset), SourceUnavailable, [], {"/file": 3}),
    Row("a closed connection", a_file, gives(verbatim()), SourceUnavailable, [], {"/file": 3}),
    Row("another protocol", a_file, gives(verbatim(b"SSH-2.0-x\r\n\0\xff\r\n\r\n")), SourceUnavailable),
    Row("paint for the terminal", a_file, gives(verbatim(b"HTTP/1.1 404 \x1b[2J\x07well\r\n\r\n")), SourceUnavailable),
    Row("nobody listens", a_file, a_closed_port, SourceUnavailable, ["refused"], {}, back_at_the_origin),
    # redirects
    Row("a redirect to itself", a_file, gives(redirect("/file")), SourceUnavailable, ["redirects more"], {"/file": 11}),
    Row("a redirect to a file", a_file, gives(redirect("file:///etc/hostname")), SourceUnavailable, ["file:///etc"]),
    Row("a redirect to data", a_file, gives(redirect("data:,x")), SourceUnavailable, ["data:,x"], {"/file": 1}),
    Row("a redirect to no URL", a_file, gives(redirect("http://[")), SourceUnavailable, ["http://["], {"/file": 1}),
    Row("a redirect to no port", a_file, gives(redirect("http://127.0.0.1:99999/")), SourceUnavailable, ["no URL"]),
    Row(
        "a redirect with a body without end",
        a_file,
        moved(lambda world: world.other.url("/file"), sends=repeated(b"", bytes(65536))),
    ),
    Row(
        "a redirect that is a bomb", a_file, moved(lambda world: world.other.url("/file"), sends=verbatim(gzip_bomb()))
    ),
    Row("a redirect to nowhere", a_file, gives(status(302)), SourceUnavailable, ["HTTP 302"], {"/file": 1}),
    Row("a redirect from https to http", a_file, from_https("http"), SourceUnavailable, ["from https to http"]),
    Row("a redirect from https to HTTP", a_file, from_https("HTTP"), SourceUnavailable, ["from https to http"]),
    Row("a redirect from https to a file", a_file, from_https("file:///etc/passwd"), SourceUnavailable, ["file:///"]),
    Row(
        "a certificate of nobody we trust", a_file, untrusted_https, SourceUnavailable, ["certificate"], {}, now_trusted
    ),
    Row(
        "a redirect to another host",
        a_file,
        moved(lambda world: world.other.url("/file")),
        then=one_request_to_the_other_without_a_word_of_who_we_are,
    ),
    Row("a redirect to another port", a_file, moved(lambda world: world.tokens.url("/file"))),
    Row("a redirect with a name", a_file, moved(lambda world: f"http://a:b@{world.other.host}/file")),
    Row("a redirect between two hosts that know us", a_file, two_hosts_with_a_password_each),
    Row("a cookie", a_file, a_cookie, then=one_request_to_the_other_without_a_word_of_who_we_are),
    # answers that are none
    Row("401 for nobody", a_file, gives(basic()), SourceUnavailable, ["{origin}/file: HTTP 401"], {"/file": 1}),
    Row("401 for ever", a_file, with_a_login(basic()), SourceUnavailable, ["HTTP 401"], {"/file": 1}),
    Row("403", a_file, gives(status(403, HTML)), SourceUnavailable, ["{origin}/file: HTTP 403"], {"/file": 1}),
    Row("404", a_file, gives(status(404, HTML)), SourceUnavailable, ["{origin}/file: HTTP 404"], {"/file": 1}),
    Row("410", a_file, gives(status(410, HTML)), SourceUnavailable, ["{origin}/file: HTTP 410"], {"/file": 1}),
    Row("501", a_file, gives(status(501)), SourceUnavailable, ["HTTP 501"], {"/file": 1}),
    Row("204", a_file, gives(status(204)), SourceUnavailable, ["HTTP 204"], {"/file": 1}),
    Row("304", a_file, gives(status(304)), SourceUnavailable, ["HTTP 304"], {"/file": 1}),
    Row("an unknown status", a_file, gives(status(799)), SourceUnavailable, ["HTTP 799"], {"/file": 1}),
    Row("429 for a second", a_file, gives(in_turn(status(429, Retry_After="1"), content(FILE))), then=waited(1)),
    Row("429 until a date", a_file, gives(in_turn(busy_until_a_date, content(FILE))), then=waited(0.5)),
    Row("429 for an hour", a_file, gives(status(429, Retry_After="3600")), SourceUnavailable, ["429"], {"/file": 1}),
    Row("429 for longer than time", a_file, gives(status(429, Retry_After=LONG)), SourceUnavailable, [], {"/file": 1}),
    Row(
        "503 until the last date there is",
        a_file,
        gives(status(503, Retry_After="Fri, 31 Dec 9999 23:59:59 GMT")),
        SourceUnavailable,
        ["HTTP 503"],
        {"/file": 1},
    ),
    Row("429 until soon", a_file, gives(in_turn(status(429, Retry_After="soon"), content(FILE))), asked={"/file": 2}),
    Row("429 until yesterday", a_file, gives(in_turn(status(429, Retry_After="-5"), content(FILE)))),
    Row("429 for ever", a_file, gives(status(429)), SourceUnavailable, ["HTTP 429"], {"/file": 3}),
    Row("500, 503, then well", a_file, gives(in_turn(status(500), status(503), content(FILE))), asked={"/file": 3}),
    Row("500 for ever", a_file, gives(status(500, HTML)), SourceUnavailable, ["HTTP 500"], {"/file": 3}),
    # resumption
    Row("a cut connection", a_file, gives(in_turn(cut(FILE, CUT), content(FILE))), None, [], {"/file": 2}, resumed),
    Row("a connection that is cut twice", a_file, gives(in_turn(cut(FILE, CUT), cut(FILE, CUT), content(FILE)))),
    Row("Range ignored", a_file, gives(in_turn(cut(FILE, CUT), body(FILE))), None, [], {"/file": 2}, resumed),
    Row(
        "a cut connection without an ETag",
        a_file,
        gives(in_turn(body(FILE[:CUT], length=SIZE), body(FILE))),
        asked={"/file": 2},
        then=no_range_in(1),
    ),
    Row(
        "a cut connection with a weak ETag",
        a_file,
        gives(in_turn(cut(FILE, CUT, etag='W/"1"'), content(FILE))),
        asked={"/file": 2},
        then=no_range_in(1),
    ),
    Row(
        "another range than was asked for",
        a_file,
        gives(in_turn(cut(FILE, CUT), part(FILE[50_000:], f"bytes 50000-{SIZE - 1}/{SIZE}"), content(FILE))),
        asked={"/file": 3},
        then=no_range_in(2),
    ),
    *(
        Row(
            f"a range that is none ({value[:20]!r})",
            a_file,
            gives(in_turn(cut(FILE, CUT), part(FILE[CUT:], value), content(FILE))),
            asked={"/file": 3},
            then=no_range_in(2),
        )
        for value in ("", "bytes */300000", "100000-299999", f"bytes {LONG}-{LONG}/{LONG}", "bytes -1-5/6")
    ),
    Row(
        "a part of it unasked",
        a_file,
        gives(part(FILE[9:], f"bytes 9-{SIZE - 1}/{SIZE}")),
        SourceUnavailable,
        ["range"],
    ),
    Row(
        "less than the rest",
        a_file,
        gives(
            in_turn(
                cut(FILE, CUT, etag='"1"'),
                part(FILE[CUT : 2 * CUT], f"bytes {CUT}-{2 * CUT - 1}/{SIZE}", ETag='"1"'),
                content(FILE, etag='"1"'),
            )
        ),
        asked={"/file": 3},
        then=resumed_again,
    ),
    Row(
        "416 when it should go on",
        a_file,
        gives(in_turn(cut(FILE, CUT), status(416), content(FILE))),
        asked={"/file": 3},
        then=no_range_in(2),
    ),
    Row("416 at once", a_file, gives(status(416)), SourceUnavailable, ["HTTP 416"], {"/file": 1}),
    Row("another file in between", a_file, gives(in_turn(cut(OTHER, CUT), content(FILE))), asked={"/file": 2}),
    Row(
        "another file in between, and If-Range ignored",
        a_file,
        gives(in_turn(cut(OTHER, CUT), part(FILE[CUT:], f"bytes {CUT}-{SIZE - 1}/{SIZE}"), content(FILE))),
        asked={"/file": 3},
        then=no_range_in(2),
    ),
    Row(
        "a longer file in between, and If-Range ignored",
        a_file,
        gives(in_turn(cut(OTHER, CUT), part(FILE, f"bytes {CUT}-{SIZE + CUT - 1}/{SIZE + CUT}"), content(FILE))),
        asked={"/file": 3},
        then=no_range_in(2),
    ),
    Row(
        "another file every time, and If-Range ignored",
        a_file,
        gives(in_turn(*[cut(OTHER, CUT), part(FILE[CUT:], f"bytes {CUT}-{SIZE - 1}/{SIZE}")] * 2)),
        DigestMismatch,
        [digest_of(FILE)],
        {"/file": 4},
    ),
    # the rest
    Row("gzip", a_file, gives(body(gzip.compress(FILE), Content_Encoding="gzip")), SourceUnavailable, ["encoded"]),
    Row("an unknown encoding", a_file, gives(body(FILE, Content_Encoding="x\x1b")), SourceUnavailable, ["encoded"]),
    *(
        Row(f"a length that is none ({value[:9]!r})", a_file, gives(body(FILE, length=value)))
        for value in ("²".encode().decode("latin-1"), LONG, "-1", "0x10", "")
    ),
    Row("a mirror that lies", a_file, a_lying_mirror, then=one_request_to_the_other_without_a_word_of_who_we_are),
    Row(
        "a mirror that asks who we are",
        a_file,
        a_mirror_that_asks_who_we_are,
        then=one_request_to_the_other_without_a_word_of_who_we_are,
    ),
]


# --- kernels: the digest is right, the content is not ---


def promises(kernel: bytes, arch: str = "x86_64") -> Check:
    """The catalog pins these bytes, and the origin has them."""

    def hostile(world: World) -> None:
        world.kernel, world.arch = kernel, arch
        world.origin.answers["/kernel"] = content(kernel)

    return hostile


def zstd_bomb(size: int = ZEROS) -> bytes:
    """A frame of blocks that say "so many times this byte" (RFC 8878, 3.1.1.2.2)."""
    count = size >> 17
    blocks = [(((1 << 17) << 3 | 1 << 1 | (n == count - 1)).to_bytes(3, "little") + b"\0") for n in range(count)]
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(blocks)


def lz4_bomb(size: int = ZEROS) -> bytes:
    """Legacy blocks of one byte and a copy of it, 8 MiB long (LZ4 block format)."""
    full, rest = divmod((8 << 20) - 1 - 5 - 19, 255)
    block = b"\x1f\0\x01\0" + b"\xff" * full + bytes([rest]) + b"\x50" + bytes(5)
    return b"\x02\x21\x4c\x18" + (struct.pack("<I", len(block)) + block) * (size // (8 << 20) + 1)


def bzimage_that_says(payload: bytes, size: int) -> bytes:
    """A bzImage with this payload, which is said to unpack to `size` bytes: behind it, or in gzip's own trailer."""
    if payload.startswith(b"\x1f\x8b"):
        return bzimage(payload[:-4] + struct.pack("<I", size), size=None)
    return bzimage(payload, size=size)


def xz_of_4_gib(data: bytes) -> bytes:
    """A stream that wants a dictionary of 4 GiB (The .xz File Format, 3.1 and 5.3.1)."""
    stream = bytearray(lzma.compress(data, preset=0))
    header = stream[12 : 12 + (stream[12] + 1) * 4]
    assert header[2:4] == b"\x21\x01"  # LZMA2 and the length of its properties
    header[4] = 40
    header[-4:] = struct.pack("<I", zlib.crc32(header[:-4]))
    stream[12 : 12 + len(header)] = header
    return bytes(stream)


def deb_with(*names: str, kernel: bytes = b"") -> bytes:
    """A kernel package with these files, and a kernel that is sound."""
    data = kernel or vmlinux()
    return package(
        gzip.compress(tar(file("./boot/vmlinuz-6.1", data), *(file(name, b"x") for name in names))), "data.tar.gz"
    )


def deb_with_modules(release: str, *names: str) -> bytes:
    """A kernel package with modules that say they are of this release."""
    data = module(b"vermagic=%s SMP\0depends=\0" % release.encode())
    entries = [file("./boot/vmlinuz-6.1", vmlinux())]
    for name in names:
        info, _ = entry = file("a", data)
        info.pax_headers = {"path": f"./lib/modules/{release}/kernel/{name}"}
        entries.append(entry)
    return package(gzip.compress(tar(*entries)), "data.tar.gz")


def deb_with_a_size(size: int) -> bytes:
    info = tarfile.TarInfo("./boot/vmlinuz-6.1")
    info.size = size
    return package(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240), "data.tar")


SOUND = gzip.compress(tar(file("./boot/vmlinuz-6.1", vmlinux())))
KERNELS = [
    Row("a kernel of another digest", a_kernel, gives(content(OTHER)), DigestMismatch, ["{origin}/kernel"]),
    Row("a web page for a kernel", a_kernel, gives(body(HTML)), DigestMismatch, [digest_of(HTML)], {"/kernel": 1}),
    Row(
        "a kernel that breaks off",
        a_kernel,
        gives(body(b"\x7fELF", length=9999)),
        SourceUnavailable,
        ["provide|mirror"],
    ),
    Row("a kernel that is cut and resumed", a_kernel, gives(in_turn(cut(vmlinux(), 5000), content(vmlinux())))),
    Row("no kernel but a page", a_kernel, promises(HTML), InvalidKernel, ["HTML page", "{origin}/kernel"]),
    Row("another architecture's kernel", a_kernel, promises(image()), InvalidKernel, ["an arm64 Image"]),
    Row("another architecture's kernel here", a_kernel, promises(vmlinux(), "aarch64"), InvalidKernel, ["x86_64"]),
    Row("a kernel that is cut off", a_kernel, promises(vmlinux()[:-2000]), InvalidKernel, ["truncated"]),
    *(
        Row(
            f"a bomb in {name} that says {words}",
            a_kernel,
            promises(bzimage_that_says(bomb, size)),
            InvalidKernel,
            ["{origin}/kernel"],
        )
        for name, bomb in (
            ("gzip", gzip_bomb()),
            ("xz", lzma.compress(bytes(ZEROS), check=lzma.CHECK_CRC32)),
            ("zstd", zstd_bomb()),
            ("lz4", lz4_bomb()),
        )
        for words, size in (("how large it is", ZEROS), ("it is small", 1000))
    ),
    Row("an Image.gz that is a bomb", a_kernel, promises(gzip_bomb(), "aarch64"), InvalidKernel, ["64 times"]),
    Row(
        "a kernel that wants 4 GiB of dictionary",
        a_kernel,
        promises(bzimage(xz_of_4_gib(vmlinux()), size=len(vmlinux()))),
        InvalidKernel,
        ["damaged"],
    ),
    Row(
        "a package with two data members",
        a_kernel,
        promises(ar(member("debian-binary", b"2.0\n"), *[member("data.tar.gz", SOUND)] * 2)),
        InvalidArchive,
        ["2 data.tar members", "{origin}/kernel"],
    ),
    Row(
        "a package that wants 4 GiB of dictionary",
        a_kernel,
        promises(package(xz_of_4_gib(tar(file("./boot/vmlinuz-6.1", vmlinux()))))),
        InvalidArchive,
        ["{origin}/kernel"],
    ),
    Row("a package that is cut off", a_kernel, promises(deb_with()[:-700]), InvalidArchive, ["cut off"]),
    Row("a package with a file of 1 TiB", a_kernel, promises(deb_with_a_size(1 << 40)), InvalidArchive, ["more than"]),
    Row(
        "a package without a kernel",
        a_kernel,
        promises(package(tar(file("x")), "data.tar")),
        InvalidKernel,
        ["vmlinuz"],
    ),
    *(
        Row(f"a package with {what}", a_kernel, promises(data), InvalidArchive, ["{origin}/kernel"], {"/kernel": 1})
        for what, data in (
            ("a module that leads out of it", deb_with_modules("6.1", "../../../../evil.ko")),
            ("a module with a colon in its name", deb_with_modules("6.1", "a:b.ko")),
            ("a module with a newline in its name", deb_with_modules("6.1", "a\nb.ko")),
            ("two modules of one name", deb_with_modules("6.1", "x/a.ko", "y/a.ko")),
            ("a release that is a path", deb_with_modules("..", "a.ko")),
            ("a release with a newline", deb_with_modules("6.1\nx", "a.ko")),
        )
    ),
    Row(
        "a package with a bomb for a kernel",
        a_kernel,
        promises(deb_with(kernel=bzimage(lz4_bomb(), size=ZEROS))),
        InvalidKernel,
        ["{origin}/kernel"],
    ),
]


# --- images ---


def registry_has(build: Callable[[Registry], object]) -> Check:
    """The registry has nothing but what is built here."""

    def hostile(world: World) -> None:
        world.registry.forget()
        build(world.registry)

    return hostile


def manifest(raw: object, media_type: str = IMAGE_MANIFEST) -> Check:
    """The registry gives this out for the manifest."""
    return registry_has(lambda registry: registry.add_manifest(raw, media_type, TAG))


def changed(**changes: Any) -> Check:
    """An image whose manifest is changed."""
    return registry_has(lambda registry: registry.add_image(ROOT, tags=[TAG], **changes))


def layer(**changes: Any) -> Check:
    """An image whose layer's descriptor is changed."""
    return registry_has(lambda registry: registry.add_image({**registry.add_blob(ROOT), **changes}, tags=[TAG]))


def entry(**changes: Any) -> Check:
    """An index whose entry is changed."""

    def build(registry: Registry) -> None:
        registry.add_index({**for_platform(registry.add_image(ROOT), "linux/amd64"), **changes}, tags=[TAG])

    return registry_has(build)


def platforms(*names: str) -> Check:
    """An index of one image for each of these platforms."""

    def build(registry: Registry) -> None:
        images = [(registry.add_image(ROOT, annotations={"for": name}), name) for name in names]
        registry.add_index(*(for_platform(*pair) for pair in images), tags=[TAG])

    return registry_has(build)


def gives_layer(answer: Answer) -> Check:
    """The registry answers with this when it is asked for the layer."""

    def hostile(world: World) -> None:
        registry_has(lambda registry: registry.add_image(ROOT, tags=[TAG]))(world)
        world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = answer

    return hostile


def gives_manifest(answer: Callable[[bytes], Answer]) -> Check:
    """The registry answers with what `answer` makes of the manifest that the tag stands for."""

    def hostile(world: World) -> None:
        changed()(world)
        raw, _ = world.registry.manifests[TAG]
        world.registry.answers[world.registry.path("manifests", TAG)] = answer(raw)

    return hostile


def by_digest(build: Callable[[Registry, str], object]) -> Check:
    """The image is asked for by its digest; `build` changes what the registry has under that."""

    def hostile(world: World) -> None:
        world.registry.forget()
        world.target = world.registry.add_image(ROOT)["digest"]
        build(world.registry, world.target)

    return hostile


def other_manifest(registry: Registry, digest: str) -> None:
    other = registry.add_image(ROOT, annotations={"evil": "1"})["digest"]
    registry.manifests[digest] = registry.manifests[other]


def lying_header(registry: Registry, digest: str) -> None:
    raw, kind = registry.manifests[digest]
    lie = content(raw, kind, Docker_Content_Digest=digest_of(b""))
    registry.answers[registry.path("manifests", digest)] = lie


def index_of_other_bytes(registry: Registry) -> None:
    entry = registry.add_image(ROOT)
    registry.add_index(for_platform(entry, "linux/amd64"), tags=[TAG])
    registry.manifests[entry["digest"]] = registry.manifests[registry.add_image(ROOT, annotations={"a": "b"})["digest"]]


def index_of_itself(registry: Registry) -> None:
    digest = digest_of(b"itself")
    registry.add_index({"mediaType": IMAGE_INDEX, "digest": digest, "size": 500}, tags=[TAG])
    registry.manifests[digest] = registry.manifests[TAG]


def nested(depth: int) -> Callable[[Registry], None]:
    def build(registry: Registry) -> None:
        inner = for_platform(registry.add_image(ROOT), "linux/amd64")
        for _ in range(depth):
            inner = registry.add_index(inner)
        registry.manifests[TAG] = registry.manifests[inner["digest"]]

    return build


def second_of_two_indexes(registry: Registry) -> None:
    image = registry.add_image(ROOT)
    inner = [registry.add_index(for_platform(image, name)) for name in ("linux/s390x", "linux/amd64")]
    registry.add_index(*inner, tags=[TAG])


def many_indexes(registry: Registry) -> None:
    image = registry.add_image(ROOT)
    registry.add_index(*(registry.add_index(for_platform(image, f"os{n}/x")) for n in range(20)), tags=[TAG])


def docker_image(registry: Registry) -> None:
    config = "application/vnd.docker.container.image.v1+json"
    described = registry.add_blob(ROOT, "application/vnd.docker.image.rootfs.diff.tar.gzip")
    image = registry.add_image(described, mediaType=DOCKER_MANIFEST, config=registry.add_blob(b"{}", config))
    registry.add_index(for_platform(image, "linux/amd64"), mediaType=DOCKER_LIST, tags=[TAG])


def empty_layer_without_end(world: World) -> None:
    layer(digest=digest_of(b""), size=0)(world)
    endless = repeated(OK + b"\r\n", bytes(65536))
    world.registry.answers[world.registry.path("blobs", digest_of(b""))] = endless


def foreign_layer(world: World) -> None:
    layer(urls=[world.other.url("/file")], mediaType="application/vnd.oci.image.layer.nondistributable.v1.tar")(world)
    world.registry.blobs.pop(digest_of(ROOT))


def many_missing_layers(registry: Registry) -> None:
    missing = [{"mediaType": LAYER, "digest": f"sha256:{n:064x}", "size": 9} for n in range(10_000)]
    registry.add_image(*missing, tags=[TAG])


def nobody_else_was_asked(world: World) -> None:
    assert world.other.requests == []


def pulled(platform: str) -> Check:
    """That the image for this platform is in the store, and the only one."""

    def check(world: World) -> None:
        blobs = world.paths.oci_cache / "blobs" / "sha256"
        found = [json.loads(blob.read_bytes()) for blob in blobs.iterdir() if b"schemaVersion" in blob.read_bytes()]
        assert [manifest["annotations"]["for"] for manifest in found] == [platform]

    return check


def on_arm(does: Check) -> Check:
    def hostile(world: World) -> None:
        world.arch = "aarch64"
        does(world)

    return hostile


def few_blobs_were_asked_for(world: World) -> None:
    assert len(world.registry.asked("/blobs/")) < 100


BLOB_OF_ROOT = f"/blobs/{digest_of(ROOT)}"
TRAVERSAL = "sha256:../../../../../../../tmp/evil"
NO_BLOB = {"/blobs/": 0}
IMAGES = [
    # digests that are none
    Row("a layer whose digest is a path", an_image, layer(digest=TRAVERSAL), SourceUnavailable, ["broken"], NO_BLOB),
    Row(
        "a config whose digest is a path",
        an_image,
        changed(config={"mediaType": "x", "digest": TRAVERSAL, "size": 1}),
        SourceUnavailable,
        ["manifest is broken"],
        NO_BLOB,
    ),
    Row("an entry whose digest is a path", an_image, entry(digest=TRAVERSAL), SourceUnavailable, ["index is broken"]),
    Row("a digest with a newline", an_image, layer(digest=digest_of(ROOT) + "\n"), SourceUnavailable, ["broken"]),
    Row("a digest in capitals", an_image, layer(digest=digest_of(ROOT).upper()), SourceUnavailable, ["broken"]),
    Row("a digest of another kind", an_image, layer(digest=f"sha512:{'0' * 128}"), SourceUnavailable, ["broken"]),
    Row("a digest that is a number", an_image, layer(digest=5), SourceUnavailable, ["broken"], NO_BLOB),
    Row(
        "a digest in the header that is a path",
        an_image,
        gives_manifest(lambda raw: content(raw, IMAGE_MANIFEST, Docker_Content_Digest=TRAVERSAL)),
        DigestMismatch,
        ["/manifests/1", TRAVERSAL],
        NO_BLOB,
    ),
    Row(
        "another digest in the header, by tag",
        an_image,
        gives_manifest(lambda raw: content(raw, IMAGE_MANIFEST, Docker_Content_Digest=digest_of(b""))),
        DigestMismatch,
        [digest_of(b"")],
        NO_BLOB,
    ),
    Row("another digest in the header, by digest", an_image, by_digest(lying_header)),
    # manifests
    Row("another manifest, by digest", an_image, by_digest(other_manifest), DigestMismatch, [], NO_BLOB),
    Row("another manifest than the index says", an_image, registry_has(index_of_other_bytes), DigestMismatch),
    Row("a manifest of 5 MB", an_image, manifest(b" " * 5_000_000), SourceUnavailable, ["longer than 4194304 bytes"]),
    Row(
        "a manifest without end",
        an_image,
        gives_manifest(lambda raw: repeated(OK + b"\r\n", b"[" * 65536)),
        SourceUnavailable,
        ["longer than"],
    ),
    Row(
        "a manifest that trickles",
        an_image,
        gives_manifest(lambda raw: repeated(OK + b"\r\n", b" ", 0.02)),
        SourceUnavailable,
    ),
    Row(
        "a manifest that breaks off, then well",
        an_image,
        gives_manifest(lambda raw: in_turn(cut(raw, 9), content(raw, IMAGE_MANIFEST))),
        asked={"/manifests/1": 2},
    ),
    Row(
        "429 and 503 for a manifest, then well",
        an_image,
        gives_manifest(lambda raw: in_turn(status(429), status(503), content(raw, IMAGE_MANIFEST))),
        asked={"/manifests/1": 3},
    ),
    Row(
        "503 for a manifest for ever",
        an_image,
        gives_manifest(lambda raw: status(503)),
        SourceUnavailable,
        ["HTTP 503"],
    ),
    Row("404 for a manifest", an_image, gives_manifest(lambda raw: status(404)), SourceUnavailable, ["HTTP 404"]),
    Row("302 for a manifest", an_image, gives_manifest(lambda raw: status(302)), SourceUnavailable, ["HTTP 302"]),
    *(
        Row(f"a manifest that is {raw[:12]!r}", an_image, manifest(raw), SourceUnavailable, ["no manifest or index"])
        for raw in (
            b"",
            b"[]",
            b"null",
            b"5",
            b'"layers"',
            HTML,
            b"\xff\xfe\0",
            b'{"schemaVersion": 2}',
            b"[" * 100_000,
            b'{"layers":' * 100_000,
            b'{"schemaVersion": ' + b"9" * 5000 + b"}",
        )
    ),
    Row(
        "a manifest of schema version 1",
        an_image,
        manifest({"schemaVersion": 1, "fsLayers": []}, "application/vnd.docker.distribution.manifest.v1+prettyjws"),
        SourceUnavailable,
        ["v1+prettyjws"],
    ),
    Row(
        "a manifest of an unknown type",
        an_image,
        manifest({"schemaVersion": 2, "layers": []}, "application/vnd.unknown+json"),
        SourceUnavailable,
        ["vnd.unknown"],
    ),
    Row(
        "a manifest with blobs and images", an_image, changed(manifests=[]), SourceUnavailable, ["no manifest or index"]
    ),
    Row(
        "a manifest that says it is an index",
        an_image,
        changed(mediaType=IMAGE_INDEX),
        SourceUnavailable,
        ["image.index"],
    ),
    *(
        Row(
            f"a manifest whose type is {value!r:.20}",
            an_image,
            manifest({"schemaVersion": 2, "mediaType": value, "layers": []}),
            SourceUnavailable,
        )
        for value in (5, [IMAGE_MANIFEST], {"a": 1}, "\x1b[2J", "x" * 100_000)
    ),
    Row(
        "a manifest that came as something else",
        an_image,
        gives_manifest(lambda raw: content(raw, IMAGE_INDEX)),
        SourceUnavailable,
        ["came as", "image.index"],
    ),
    Row("a manifest from a plain file server", an_image, gives_manifest(lambda raw: content(raw))),
    Row(
        "a packed manifest",
        an_image,
        gives_manifest(lambda raw: body(gzip.compress(raw), Content_Encoding="gzip")),
        SourceUnavailable,
    ),
    Row("a manifest without layers", an_image, changed(layers=None), SourceUnavailable, ["broken"], NO_BLOB),
    Row("a manifest whose layers are text", an_image, changed(layers="abc"), SourceUnavailable, ["broken"], NO_BLOB),
    Row(
        "a manifest whose layers are a map", an_image, changed(layers={"a": 1}), SourceUnavailable, ["broken"], NO_BLOB
    ),
    Row("a manifest without a config", an_image, changed(config=None), SourceUnavailable, ["broken"], NO_BLOB),
    *(
        Row(
            f"a layer of {size!r:.9} bytes",
            an_image,
            layer(size=size),
            SourceUnavailable,
            ["broken|bytes long"],
            {BLOB_OF_ROOT: 0},
        )
        for size in (-1, 1 << 60, 1.5, "7", None, [1])
    ),
    # indexes
    Row("indexes in indexes", an_image, registry_has(nested(3))),
    Row("indexes in indexes without end", an_image, registry_has(nested(9)), SourceUnavailable, ["nested more than"]),
    Row("the first of two inner indexes has nothing for us", an_image, registry_has(second_of_two_indexes)),
    Row("more inner indexes than anyone looks into", an_image, registry_has(many_indexes), SourceUnavailable, ["16"]),
    Row("an index of itself", an_image, registry_has(index_of_itself), DigestMismatch, [digest_of(b"itself")]),
    Row(
        "an index without our platform",
        an_image,
        platforms("linux/arm64/v8", "windows/amd64", "unknown/unknown", "\x1b[2J/\n"),
        SourceUnavailable,
        ["nothing for linux/amd64", "linux/arm64/v8", "windows/amd64"],
        NO_BLOB,
    ),
    Row("an index of nothing", an_image, platforms(), SourceUnavailable, ["only nothing"]),
    Row("an index of attestations", an_image, platforms("unknown/unknown"), SourceUnavailable, ["only nothing"]),
    Row("an index of 10000 others", an_image, platforms(*(f"os{n}/x" for n in range(10_000))), SourceUnavailable),
    Row("an attestation first", an_image, platforms("unknown/unknown", "linux/amd64"), then=pulled("linux/amd64")),
    Row(
        "arm64 in all its variants",
        an_image,
        on_arm(platforms("linux/arm/v7", "linux/arm64/v9", "linux/arm64/v8", "linux/amd64")),
        then=pulled("linux/arm64/v8"),
    ),
    Row(
        "arm64 without a variant",
        an_image,
        on_arm(platforms("linux/arm64/v9", "unknown/unknown", "linux/arm64")),
        then=pulled("linux/arm64"),
    ),
    *(
        Row(
            f"an index of {value!r:.20}",
            an_image,
            manifest({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": value}, IMAGE_INDEX),
            SourceUnavailable,
            ["nothing for linux/amd64"],
        )
        for value in (None, 5, {"a": 1}, [1, None, "x"], [{"platform": 5}], [{"platform": {"os": ["linux"]}}])
    ),
    Row("an entry without a size", an_image, entry(size=None), SourceUnavailable, ["index is broken"]),
    # Docker's types, unknown types, repeated layers
    Row("Docker's manifests", an_image, registry_has(docker_image)),
    Row("a layer of an unknown type", an_image, layer(mediaType="application/vnd.unknown")),
    Row(
        "the same layer ten times",
        an_image,
        registry_has(lambda registry: registry.add_image(*[ROOT] * 10, tags=[TAG])),
        asked={BLOB_OF_ROOT: 1},
    ),
    # blobs
    Row("other bytes for a layer", an_image, gives_layer(content(bytes(len(ROOT)))), DigestMismatch, [digest_of(ROOT)]),
    Row("a web page for a layer", an_image, gives_layer(body(HTML)), SizeMismatch, [f"{len(ROOT)} bytes"]),
    Row("a layer without end", an_image, gives_layer(repeated(OK + b"\r\n", bytes(65536))), SizeMismatch),
    Row("a layer larger than it says", an_image, layer(size=len(ROOT) - 1), SizeMismatch, [f"{len(ROOT) - 1} bytes"]),
    Row("a layer smaller than it says", an_image, layer(size=len(ROOT) + 1), SizeMismatch, [f"{len(ROOT) + 1} bytes"]),
    Row("a layer that should be empty", an_image, layer(size=0), SizeMismatch, ["0 bytes"]),
    Row("a layer that should be empty, without end", an_image, empty_layer_without_end, SizeMismatch, [" 0 bytes"]),
    Row("a packed layer", an_image, gives_layer(body(ROOT, Content_Encoding="gzip")), SourceUnavailable, ["encoded"]),
    Row("a cut layer", an_image, gives_layer(in_turn(cut(ROOT, 99), content(ROOT))), asked={BLOB_OF_ROOT: 2}),
    Row("a layer cut for ever", an_image, gives_layer(cut(ROOT, 0)), SourceUnavailable, [], {BLOB_OF_ROOT: 3}),
    Row("404 for a layer", an_image, gives_layer(status(404)), SourceUnavailable, ["HTTP 404"], {BLOB_OF_ROOT: 1}),
    Row(
        "503 for a layer, then well",
        an_image,
        gives_layer(in_turn(status(503), content(ROOT))),
        asked={BLOB_OF_ROOT: 2},
    ),
    Row(
        "a layer that is elsewhere", an_image, foreign_layer, SourceUnavailable, ["HTTP 404"], {}, nobody_else_was_asked
    ),
    Row(
        "10000 layers that are missing",
        an_image,
        registry_has(many_missing_layers),
        SourceUnavailable,
        [],
        {},
        few_blobs_were_asked_for,
    ),
]


# --- who we are ---


def guarded(does: Check, *, token: Answer | None = None, realm: str = "", login: bool = True) -> Check:
    """A registry that wants a token; `token` is what its token server answers, `realm` where that is."""

    def hostile(world: World) -> None:
        if login:
            world.login(world.registry.host, world.tokens.host)
        world.secrets[TOKEN] = {world.registry.host}
        changed()(world)
        world.registry.guard = only_for(f"Bearer {TOKEN}", bearer(realm or world.tokens.url("/token")))
        issue = token or body(json.dumps({"token": TOKEN}).encode())
        world.tokens.answers["/token"] = lambda x: (
            issue(x) if x.request.headers.get("authorization") == BASIC else basic()(x)
        )
        does(world)

    return hostile


def nothing_more(world: World) -> None:
    pass


def guarded_by_a_password(login: str) -> Check:
    def hostile(world: World) -> None:
        if login:
            world.login(world.registry.host, secret=login)
        changed()(world)
        world.registry.guard = only_for(BASIC, basic())

    return hostile


def challenge(text: str) -> Check:
    def hostile(world: World) -> None:
        changed()(world)
        world.login(world.registry.host)
        world.registry.guard = lambda request: status(401, WWW_Authenticate=text)

    return hostile


def both_challenges(world: World) -> None:
    text = f'Bearer realm="{world.tokens.url("/token")}",service="x",scope="a:b:pull,push", Basic realm="y"'
    world.registry.guard = only_for(f"Bearer {TOKEN}", status(401, WWW_Authenticate=text))


def never_satisfied(world: World) -> None:
    realm = world.tokens.url("/token")
    world.registry.guard = lambda request: bearer(realm)


def token_expires(world: World) -> None:
    """The first token is good for one request."""
    realm, used = world.tokens.url("/token"), list[str]()
    tokens = iter(range(1000))
    world.tokens.answers["/token"] = lambda x: body(json.dumps({"token": f"t{next(tokens)}"}).encode())(x)

    def guard(request: Any) -> Answer | None:
        authorization = request.headers.get("authorization", "")
        if not authorization.startswith("Bearer ") or (used and authorization == used[0] and len(used) > 1):
            return bearer(realm)
        used.append(authorization)
        return None

    world.registry.guard = guard


def token_server_elsewhere(world: World) -> None:
    world.registry.guard = only_for(f"Bearer {TOKEN}", bearer(world.other.url("/token")))
    world.other.answers["/token"] = basic()


def generous_token_server_elsewhere(world: World) -> None:
    """It gives a token to everybody, as registries with public images do."""
    world.registry.guard = only_for(f"Bearer {TOKEN}", bearer(world.other.url("/token")))
    world.other.answers["/token"] = body(json.dumps({"access_token": TOKEN}).encode())


def token_server_sends_us_on(world: World) -> None:
    world.tokens.answers["/token"] = redirect(world.other.url("/token"))
    world.other.answers["/token"] = basic()


def layer_elsewhere(then: Answer) -> Check:
    def hostile(world: World) -> None:
        world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = redirect(world.other.url("/cdn"))
        world.other.answers["/cdn"] = then

    return hostile


def layer_at_a_thief(world: World) -> None:
    """It is sent from a host that asks who we are, with a token server of its own."""
    layer_elsewhere(bearer(world.origin.url("/token")))(world)
    world.origin.answers["/token"] = body(json.dumps({"token": "x"}).encode())


def layer_at_another_port(world: World) -> None:
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = redirect(world.origin.url("/cdn"))
    world.origin.answers["/cdn"] = content(ROOT)


def the_other_did_not_learn_who_we_are(world: World) -> None:
    assert world.other.requests
    assert all("authorization" not in request.headers for request in world.other.requests)


def the_origin_was_not_asked(world: World) -> None:
    assert world.origin.requests == []


def few_tokens(world: World) -> None:
    assert len(world.tokens.requests) <= 2


CREDENTIALS = [
    Row("a token", an_image, guarded(nothing_more), asked={BLOB_OF_ROOT: 1, "/manifests/1": 2}, then=few_tokens),
    Row("a token for nobody", an_image, guarded(nothing_more, login=False), SourceUnavailable, ["needs credentials"]),
    Row(
        "a token that is not enough",
        an_image,
        guarded(never_satisfied),
        SourceUnavailable,
        ["not accept"],
        {},
        few_tokens,
    ),
    Row("a token that expires", an_image, guarded(token_expires)),
    Row("a choice of two ways", an_image, guarded(both_challenges)),
    Row(
        "a token server elsewhere",
        an_image,
        guarded(token_server_elsewhere),
        SourceUnavailable,
        ["not accept"],
        NO_BLOB,
        the_other_did_not_learn_who_we_are,
    ),
    Row(
        "a generous token server elsewhere",
        an_image,
        guarded(generous_token_server_elsewhere),
        then=the_other_did_not_learn_who_we_are,
    ),
    Row(
        "a token server that sends us on",
        an_image,
        guarded(token_server_sends_us_on),
        SourceUnavailable,
        [],
        NO_BLOB,
        the_other_did_not_learn_who_we_are,
    ),
    *(
        Row(
            f"a token server at {realm[:30]!r}",
            an_image,
            guarded(nothing_more, realm=realm),
            SourceUnavailable,
            ["for a token|no URL"],
            NO_BLOB,
        )
        for realm in (
            "http://registry.example.com/token",
            "http://127.0.0.1.example.com/token",
            "http://127.example.com/token",
            "http://localhost.example.com/",
            "file:///etc/passwd",
            "http://[",
            "http://127.0.0.1:99999/",
            "//127.0.0.1/",
            "x" * 9000,
        )
    ),
    *(
        Row(
            f"a token server that gives {what}",
            an_image,
            guarded(nothing_more, token=answer),
            SourceUnavailable,
            ["gives none|answers HTTP"],
            NO_BLOB,
        )
        for what, answer in (
            ("a page", body(HTML)),
            ("nothing", body(b"")),
            ("a list", body(b"[]")),
            ("a number", body(b"5")),
            ("null", body(b"null")),
            ("no token", body(b'{"expires_in": 5}')),
            ("a token that is a number", body(b'{"token": 5}')),
            ("a token that is empty", body(b'{"token": "", "access_token": ""}')),
            ("a token with a newline", body(b'{"token": "a\\r\\nX-Evil: 1"}')),
            ("a token with a NUL", body(b'{"token": "a\\u0000"}')),
            ("depths", body(b"[" * 100_000)),
            ("404", status(404)),
            ("302", status(302)),
        )
    ),
    Row(
        "a token server that gives 2 MB",
        an_image,
        guarded(nothing_more, token=body(b" " * 2_000_000)),
        SourceUnavailable,
        ["longer than 1048576 bytes"],
    ),
    Row(
        "a token that no header may hold",
        an_image,
        guarded(nothing_more, token=body(b'{"token": "\\u4e00"}')),
        SourceUnavailable,
    ),
    Row(
        "a token server that fails, then well",
        an_image,
        guarded(nothing_more, token=in_turn(status(503), status(429), body(json.dumps({"token": TOKEN}).encode()))),
    ),
    Row(
        "a token server that fails", an_image, guarded(nothing_more, token=status(500)), SourceUnavailable, ["HTTP 500"]
    ),
    Row("a password", an_image, guarded_by_a_password(PASSWORD), asked={BLOB_OF_ROOT: 1}),
    Row("a password for nobody", an_image, guarded_by_a_password(""), SourceUnavailable, ["needs credentials"]),
    Row("a wrong password", an_image, guarded_by_a_password("guess"), SourceUnavailable, ["not accept"]),
    *(
        Row(
            f"a challenge that is {text[:20]!r}",
            an_image,
            challenge(text),
            SourceUnavailable,
            ["not accept|for a token"],
            NO_BLOB,
        )
        for text in ("", "Negotiate", "Bearer", 'Bearer realm="', "Basic" * 9000, "Bearer " + "a" * 60_000)
    ),
    Row(
        "a layer at another host",
        an_image,
        guarded(layer_elsewhere(content(ROOT))),
        then=the_other_did_not_learn_who_we_are,
    ),
    Row("a layer at another port", an_image, guarded(layer_at_another_port)),
    Row(
        "a layer at a thief",
        an_image,
        guarded(layer_at_a_thief),
        SourceUnavailable,
        ["HTTP 401"],
        {},
        the_origin_was_not_asked,
    ),
    Row(
        "a layer at a host that wants a password",
        an_image,
        guarded(layer_elsewhere(basic())),
        SourceUnavailable,
        ["HTTP 401"],
        {},
        the_other_did_not_learn_who_we_are,
    ),
]


# --- layers: what is in them is not what an initrd may hold ---


def layers(*archives: bytes) -> Check:
    """An image of a good root and these layers over it."""
    return registry_has(lambda registry: registry.add_image(ROOT, *archives, tags=[TAG]))


def with_path(name: str) -> bytes:
    """A layer with a name that only an extended header can hold."""
    info, data = file("a", b"x")
    info.pax_headers = {"path": name}
    return tar((info, data))


def nothing_outside(world: World) -> None:
    assert {path.name for path in world.base.iterdir()} <= {"data", "versions.toml", "certificate.pem", "key.pem"}


LAYERS = [
    *(
        Row(f"a layer with {what}", an_initrd, layers(archive), InvalidArchive, says, {}, nothing_outside)
        for what, archive, says in (
            ("a name with ..", tar(file("../../evil", b"x")), ["escapes"]),
            ("a name that ends with ..", tar(directory("a/..")), ["escapes"]),
            ("a hard link out of it", tar(hardlink("a", "../../etc/passwd")), ["escapes"]),
            ("a hard link to nothing", tar(hardlink("a", "etc/passwd")), ["hard link"]),
            ("a file in a file", tar(file("bin/busybox/x")), ["no directory"]),
            ("links in a circle", tar(symlink("a", "b"), symlink("b", "a"), file("a/x")), ["too many"]),
            ("a whiteout of nothing", tar(file("a/.wh..")), ["whiteout"]),
            ("files in a whiteout", tar(file(".wh.bin/busybox")), ["whiteout"]),
            ("a NUL in a name", with_path("a\0b"), ["escapes"]),
            ("a sparse file", tar(tar_member("a", tarfile.GNUTYPE_SPARSE)), []),
            ("a bomb in gzip", gzip_bomb(24 << 20), ["200 times"]),
            ("a bomb in zstd", zstd_bomb(24 << 20), ["200 times"]),
            ("an archive in xz", lzma.compress(tar(file("a"))), []),
            ("a page", HTML * 100, []),
            ("nothing", b"", []),
        )
    ),
    *(
        Row(f"a layer with {what}", an_initrd, layers(archive), then=nothing_outside)
        for what, archive in (
            ("absolute names", tar(file("/etc/evil", b"x"))),
            ("a directory that is a link out of it", tar(symlink("out", "/../../.."), file("out/evil", b"x"))),
            ("device nodes", tar(tar_member("dev/sda", tarfile.BLKTYPE), tar_member("p", tarfile.FIFOTYPE))),
            ("a name twice", tar(file("a", b"1"), symlink("a", "/etc"), file("a", b"2"))),
            ("a newline in a name", tar(file("a\nb", b"x"))),
            ("a whiteout of what is not there", tar(file("no/such/.wh.x"), file(".wh.y"))),
        )
    ),
    Row("a layer that removes busybox", an_initrd, layers(tar(file("bin/.wh.busybox"))), InvalidArchive, ["busybox"]),
    Row("a layer that hides everything", an_initrd, layers(tar(file(".wh..wh..opq"))), InvalidArchive, ["busybox"]),
]

TABLE = [*FILES, *KERNELS, *IMAGES, *CREDENTIALS, *LAYERS]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        running = Hosts(Origin(), Origin(), Registry(), Origin(ELSEWHERE))
        for server in (running.origin, running.tokens, running.registry, running.other):
            stack.callback(server.close)
        yield running


@pytest.fixture
def world(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Nobody's credentials, no proxies, and little patience."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("SYSTEMFILES_CREDENTIALS", "DOCKER_CONFIG", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(transport, "BOUNDS", BOUNDS)
    monkeypatch.setattr(http, "LARGEST", LARGEST)
    with contextlib.ExitStack() as stack:
        yield World(hosts, tmp_path, monkeypatch, stack)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.what)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
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
    hosts = {"{origin}": world.origin.url(""), "{registry}": world.registry.host, "{other}": world.other.host}
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


# --- one at a time ---


def test_what_cannot_fit_is_not_asked_for(world: World) -> None:
    world.size = 1 << 60
    with pytest.raises(NoSpace) as caught:
        a_file(world)
    assert caught.value.needed == 1 << 60
    assert world.origin.requests == []
    assert world.left() == {}


def test_whoever_watches_may_cancel_a_pull(world: World) -> None:
    layers = [gzip.compress(random.Random(seed).randbytes(50_000)) for seed in range(40)]
    world.registry.add_image(*layers, tags=[TAG])

    def cancel(subject: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(world, cancel)
    assert_nothing_is_left_but_intact_blobs(world)
    assert len(world.registry.asked("/blobs/")) < len(layers)
    an_image(world)
    assert_whole(world)


def test_where_one_layer_fails_those_in_flight_are_given_up(world: World) -> None:
    endless: dict[str, Any] = {"mediaType": LAYER, "digest": digest_of(b"endless"), "size": 1 << 28}
    wrong = world.registry.add_blob(b"wrong")
    world.registry.add_image(endless, wrong, tags=[TAG])
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 28)
    world.registry.answers[world.registry.path("blobs", endless["digest"])] = repeated(head, bytes(1 << 14), 0.05)
    started = threading.Event()

    def fails(x: Exchange) -> None:
        assert started.wait(10)
        status(404)(x)

    world.registry.answers[world.registry.path("blobs", wrong["digest"])] = fails
    with pytest.raises(SourceUnavailable, match="HTTP 404"):
        pull(world, lambda subject, done, total: started.set())
    assert_nothing_is_left_but_intact_blobs(world)


def test_what_was_pulled_is_not_asked_for_again(world: World) -> None:
    an_image(world)
    an_image(world)
    assert [len(world.registry.asked(f"/blobs/{digest}")) for digest in world.registry.blobs] == [1, 1]


def test_a_damaged_blob_is_pulled_again(world: World) -> None:
    (root,) = an_image(world)
    root.chmod(0o644)
    root.write_bytes(bytes(len(ROOT)))
    an_image(world)
    assert root.read_bytes() == ROOT
    assert len(world.registry.asked(BLOB_OF_ROOT)) == 2


def test_a_registry_mirror_that_lies_is_passed_over(world: World) -> None:
    """And what the registry may know of us, its mirror may not."""
    world.login(world.registry.host)
    mirror = Registry(ELSEWHERE)
    world.servers.append(mirror)
    world.target = digest_of(world.registry.manifests[TAG][0])
    mirror.manifests[world.target] = b"{}", IMAGE_MANIFEST
    world.monkeypatch.setenv("SYSTEMFILES_MIRRORS", f"{world.registry.host}/={mirror.host}/")
    catalog, store = load_catalog(), Store(world.paths, Artifacts(world.paths))
    site = Site(world.paths, catalog, store, Rolling(world.paths, catalog), silent_progress, None)
    Puller(site).pull(world.registry.reference(world.target), Arch.X86_64)
    mirror.close()
    assert len(mirror.requests) == 1
    assert len(world.registry.asked(BLOB_OF_ROOT)) == 1
    assert world.leaks() == []


@pytest.mark.parametrize("secret", ["basic:operator:correct-horse", "bearer:correct-horse"])
def test_a_secret_is_not_told_in_the_clear(secret: str, world: World) -> None:
    """Neither to whoever has it nor to the proxy in between."""
    world.monkeypatch.setenv("SYSTEMFILES_CREDENTIALS", f"files.example.com={secret}")
    world.origin.answers["http://files.example.com/file"] = content(FILE)
    with NewFile(world.paths.tmp) as out:
        proxies = {"http": world.origin.url()}
        fetch("http://files.example.com/file", out, subject="it", digest=Digest.of(FILE), proxies=proxies)
    (request,) = world.origin.requests
    assert "authorization" not in request.headers


# --- many at once ---

CALLERS = 16
ENSURE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from systemfiles import SystemFiles

data_dir, catalog, callers = sys.argv[1], sys.argv[2], int(sys.argv[3])
system = SystemFiles(data_dir, catalog=catalog, arch="x86_64")
print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(callers) as pool:
    made = list(pool.map(lambda _: system.ensure("k1", "i1"), range(callers)))
assert len(set(made)) == 1
"""


def slowly(answer: Answer) -> Answer:
    """So that all callers are there while the first is still waiting."""

    def slow(x: Exchange) -> None:
        x.closing.wait(0.3)
        answer(x)

    return slow


@pytest.mark.parametrize("processes", [1, 4], ids=["threads", "threads of several processes"])
def test_sixteen_callers_make_one_request_for_a_file_and_for_each_blob(processes: int, world: World) -> None:
    catalog = world.base / "versions.toml"
    pinned = f"{world.registry.reference(TAG)}@{digest_of(world.registry.manifests[TAG][0])}"
    catalog.write_text(
        f'schema = 1\n[initrd.i1]\ninit = "v1.0.0"\nbusybox = "{pinned}"\n[kernel.k1.files.x86_64]\n'
        f'url = "{world.origin.url("/kernel")}"\nsha256 = "{hashlib.sha256(world.kernel).hexdigest()}"\n'
    )
    world.origin.answers["/kernel"] = slowly(content(world.kernel))
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = slowly(content(ROOT))
    words = [sys.executable, "-c", ENSURE, str(world.paths.data_dir), str(catalog), str(CALLERS // processes)]
    running = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for process in running:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.communicate("go\n", timeout=60)
    assert [process.returncode for process in running] == [0] * processes
    assert len(world.origin.asked("/kernel")) == 1
    assert [len(world.registry.asked(f"/blobs/{digest}")) for digest in world.registry.blobs] == [1, 1]
    assert len(world.registry.asked("/manifests/")) == 2
    assert_whole(world)


def test_sixteen_pullers_make_one_request_for_each_blob(world: World) -> None:
    world.monkeypatch.setattr(transport, "BOUNDS", Bounds())
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = slowly(content(ROOT))
    with ThreadPoolExecutor(CALLERS) as pool:
        pulled = list(pool.map(lambda _: pull(world), range(CALLERS)))
    assert len({target.digest for target in pulled}) == 1
    assert [len(world.registry.asked(f"/blobs/{digest}")) for digest in world.registry.blobs] == [1, 1]
    assert_whole(world)


# --- pushes ---

CONTENT = b"a blob"
UPLOADS = f"/v2/{REPOSITORY}/blobs/uploads/"


@dataclass(frozen=True)
class Push:
    """What a registry does with an upload, and what comes of it."""

    what: str
    does: Check
    error: type[Exception] | None = None
    says: str = ""
    then: Check = lambda world: None


def accepts(world: World) -> None:
    """An honest registry that takes everything."""
    world.registry.answers[UPLOADS] = status(202, Location=f"{UPLOADS}1?state=x")
    world.registry.answers[f"{UPLOADS}1"] = status(201)
    world.registry.answers[world.registry.path("manifests", "new")] = status(201)


def uploads_to(location: Callable[[World], str]) -> Check:
    def hostile(world: World) -> None:
        accepts(world)
        world.registry.answers[UPLOADS] = status(202, Location=location(world))

    return hostile


def answers_upload(answer: Answer) -> Check:
    def hostile(world: World) -> None:
        accepts(world)
        world.registry.answers[f"{UPLOADS}1"] = answer

    return hostile


def asks_again_for_a_token(world: World) -> None:
    """A token is good for reading, and another is needed to write."""
    accepts(world)
    world.secrets[TOKEN] = {world.registry.host}
    world.tokens.answers["/token"] = body(json.dumps({"token": TOKEN}).encode())
    world.registry.answers[f"{UPLOADS}1"] = in_turn(bearer(world.tokens.url("/token")), status(201))


def all_of_it_arrived(world: World) -> None:
    (put,) = world.registry.asked("/uploads/1", "PUT")[-1:]
    assert put.body == CONTENT
    assert f"digest={digest_of(CONTENT)}".replace(":", "%3A") in put.path


def there_already(world: World) -> None:
    accepts(world)
    world.registry.add_blob(CONTENT)


def nothing_was_sent(world: World) -> None:
    assert world.registry.asked("", "POST") == world.registry.asked("", "PUT") == []


PUSHES = [
    Push("takes it", accepts, then=all_of_it_arrived),
    Push("has it already", there_already, then=nothing_was_sent),
    Push("asks for a token in between", asks_again_for_a_token, then=all_of_it_arrived),
    Push("wants it at another host", uploads_to(lambda world: world.other.url("/up")), SourceRefused, "elsewhere"),
    Push("wants it at another port", uploads_to(lambda world: world.origin.url("/up")), SourceRefused, "elsewhere"),
    Push("wants it in a file", uploads_to(lambda world: "file:///tmp/x"), SourceRefused, "file:///tmp/x"),
    Push("wants it at no URL", uploads_to(lambda world: "http://["), SourceRefused),
    Push("sends the upload on", answers_upload(redirect("/else", 307)), SourceRefused, "HTTP 307"),
    Push("does not allow it", answers_upload(status(403)), SourceRefused, "HTTP 403"),
    Push("fails", answers_upload(status(500)), SourceRefused, "HTTP 500"),
    Push("fails, then takes it", answers_upload(in_turn(status(503), status(201))), then=all_of_it_arrived),
    Push("breaks off, then takes it", answers_upload(in_turn(reset, status(201))), then=all_of_it_arrived),
    Push("breaks off", answers_upload(reset), SourceUnavailable, "could not be reached"),
    Push("says nothing", answers_upload(silent), SourceUnavailable, "silent for too long"),
    Push("asks for ever who we are", answers_upload(basic()), SourceRefused, "needs credentials"),
]


@pytest.mark.parametrize("push", PUSHES, ids=lambda push: push.what)
def test_a_registry_may_do_what_it_wants_with_an_upload(push: Push, world: World) -> None:
    def upload() -> None:
        repository = Repository(world.registry.host, REPOSITORY, environ={})
        repository.push_blob(Digest.of(CONTENT), len(CONTENT), io.BytesIO(CONTENT))

    push.does(world)
    if push.error is None:
        upload()
    else:
        with pytest.raises(push.error, match=push.says or None):
            upload()
    push.then(world)
    assert world.other.requests == world.origin.requests == []
    world.mend()
    accepts(world)
    upload()
    all_of_it_arrived(world)
    assert world.leaks() == []


@pytest.mark.parametrize("code", [302, 307, 404, 500])
def test_a_manifest_that_was_not_taken_is_no_success(code: int, world: World) -> None:
    repository = Repository(world.registry.host, REPOSITORY, environ={})
    path = world.registry.path("manifests", "new")
    world.registry.answers[path] = status(code, Location="/v2/")
    with pytest.raises(SourceRefused, match=f"manifest new: it answers HTTP {code}"):
        repository.push_manifest(b"{}", IMAGE_MANIFEST, "new")
    accepts(world)
    assert repository.push_manifest(b"{}", IMAGE_MANIFEST, "new") == digest_of(b"{}")
    assert world.registry.asked(path, "PUT")[-1].body == b"{}"
