"""Origins on loopback that do as they are told, however bad: a web server and an OCI registry.

Each remembers every request with its headers, and answers it as tests/contract/answers.py says.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.contract.answers import REPOSITORY, Answer, Exchange, Request, content, status

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
HERE, ELSEWHERE = "127.0.0.1", "127.0.0.2"


class Origin:
    """A web server whose every answer is scripted; what has no script is not found. `tls` makes it speak https.

    `take` reads the body of a request of so many bytes; so many of the next connections as `hang_up` says end as soon
    as something comes on them.
    """

    def __init__(self, host: str = HERE, *, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[Request] = []
        self.take: Callable[[BufferedIOBase, int], bytes] = lambda stream, size: stream.read(size)
        self.hang_up = 0
        self._closing = threading.Event()
        self._server = _Server((host, port), self._handler())
        self._server.welcomes = self._welcomes
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._scheme = "https" if tls else "http"
        self.host = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def url(self, path: str = "/") -> str:
        return f"{self._scheme}://{self.host}{path}"

    def asked(self, pattern: str = "", method: str = "GET") -> list[Request]:
        """The requests of this method whose paths match."""
        return [request for request in self.requests if request.method == method and re.search(pattern, request.path)]

    def answer_to(self, request: Request) -> Answer:
        return self.answers.get(request.path.partition("?")[0]) or status(404)

    def buffer(self, size: int) -> None:
        """Lets the kernel take no more than about so many bytes that were not read yet."""
        self._server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _welcomes(self, connection: socket.socket) -> bool:
        if not self.hang_up:
            return True
        self.hang_up -= 1
        socket.socket.recv(connection, 1 << 16)  # what is left unread would turn the end into a reset
        return False

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # clients hang up on what they do not like
                    super().handle()

            def _any(self) -> None:
                self.close_connection = True
                sent = origin.take(self.rfile, int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, time.monotonic(), sent)
                origin.requests.append(request)
                origin.answer_to(request)(Exchange(self, request, origin._closing))

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _any

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the requests are on record."""

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    welcomes: Callable[[socket.socket], bool]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self.welcomes(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients hang up."""


class Registry(Origin):
    """A registry of one repository that gives out whatever it was given, under any name; `answers` come first.

    `guard` may answer in its stead, to ask who is there.
    """

    def __init__(self, host: str = HERE, *, tls: ssl.SSLContext | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[bytes, str]] = {}
        self.guard: Callable[[Request], Answer | None] = lambda request: None
        super().__init__(host, tls=tls)

    def forget(self) -> None:
        """Becomes an empty and honest registry. Its requests stay on record."""
        self.blobs.clear()
        self.manifests.clear()
        self.answers.clear()
        self.guard = lambda request: None

    def path(self, kind: str, name: str) -> str:
        return f"/v2/{REPOSITORY}/{kind}/{name}"

    def reference(self, target: str) -> str:
        return f"{self.host}/{REPOSITORY}{'@' if ':' in target else ':'}{target}"

    def add_blob(self, data: bytes, media_type: str = LAYER) -> dict[str, Any]:
        """Its descriptor."""
        self.blobs[digest_of(data)] = data
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    def add_manifest(self, value: object, media_type: str | None = None, *tags: str) -> dict[str, Any]:
        """Takes anything for a manifest, under its digest and these tags; returns its descriptor."""
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = media_type or (str(value["mediaType"]) if isinstance(value, dict) else IMAGE_MANIFEST)
        for name in (digest_of(raw), *tags):
            self.manifests[name] = raw, kind
        return {"mediaType": kind, "digest": digest_of(raw), "size": len(raw)}

    def add_image(self, *layers: bytes | dict[str, Any], tags: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
        """An image of these layers (or descriptors of layers), with `changes` to its manifest.

        Its configuration does not say what machine it is for.
        """
        described = [self.add_blob(layer) if isinstance(layer, bytes) else layer for layer in layers]
        config = self.add_blob(json.dumps({"os": "linux", "rootfs": {"type": "layers"}}).encode(), IMAGE_CONFIG)
        value = {"schemaVersion": 2, "mediaType": IMAGE_MANIFEST, "config": config, "layers": described, **changes}
        return self.add_manifest(value, None, *tags)

    def add_index(self, *entries: Mapping[str, Any], tags: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
        value = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": list(entries), **changes}
        return self.add_manifest(value, None, *tags)

    def answer_to(self, request: Request) -> Answer:
        if refusal := self.guard(request):
            return refusal
        path = request.path.partition("?")[0]
        if path in self.answers:
            return self.answers[path]
        name = path.rpartition("/")[2]
        if path == self.path("manifests", name) and name in self.manifests:
            raw, kind = self.manifests[name]
            return content(raw, kind, Docker_Content_Digest=digest_of(raw))
        if path == self.path("blobs", name) and name in self.blobs:
            return content(self.blobs[name])
        return status(404)


def tls(directory: Path, *names: str) -> tuple[Path, ssl.SSLContext]:
    """A new certificate for this host and these names, which nobody trusts yet, and what a server needs to show it."""
    directory.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    address = x509.IPAddress(ipaddress.ip_address(HERE))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HERE)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address, *map(x509.DNSName, names)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate, private = directory / "certificate.pem", directory / "key.pem"
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    return certificate, context


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def for_platform(descriptor: Mapping[str, Any], platform: str) -> dict[str, Any]:
    """An index entry for a platform such as linux/arm64/v8."""
    named = dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False))
    return {**descriptor, "platform": named}
