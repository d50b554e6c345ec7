"""OCI registries, as the distribution-spec has them, read and written by a client that verifies every byte.

A manifest is kept as the bytes it came in; what is asked for by digest must have that digest, and what a tag gives is
pinned by the digest of its bytes. Tokens belong to one repository of one registry and go to no other host.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import urlencode, urljoin, urlsplit

import requests

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import DigestMismatch, InvalidDigest, SourceRefused, UsageError
from systemfiles.foundation.files import NewFile
from systemfiles.foundation.progress import Progress, silent
from systemfiles.sources.credentials import credential_for
from systemfiles.sources.http import download
from systemfiles.sources.manifests import INDEXES, MANIFESTS, Manifest, parse_manifest
from systemfiles.sources.transport import (
    Answered,
    Attempts,
    Interrupted,
    Transport,
    following,
    host_of,
    is_loopback,
    printable,
)

DOCKER_HUB = "docker.io"
_HUB_HOST = "registry-1.docker.io"
LARGEST_MANIFEST = 4 << 20
_ACCEPTED = {"Accept": ", ".join((*MANIFESTS, *INDEXES, "*/*"))}  # a registry denies what it has as something else
_LARGEST_TOKEN = 1 << 20

# distribution-spec, "Pulling manifests"
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")
_SCHEME = re.compile(r"(?:^|,)\s*([A-Za-z]+)(?:\s+(?=[A-Za-z_]+=)|\s*$)")
_PARAMETER = re.compile(r'([A-Za-z_]{1,32})="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Reference:
    """`registry/repository[:tag][@digest]`, with docker's short forms for docker.io."""

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises UsageError."""
        name, _, pinned = text.partition("@")
        head, slash, tail = name.partition("/")
        if slash and (set(".:[") & set(head) or head == "localhost"):
            registry, rest = head, tail
        else:
            registry, rest = DOCKER_HUB, name if slash else f"library/{name}"
        repository, _, tag = rest.partition(":")
        valid = _HOST.fullmatch(registry) and _REPOSITORY.fullmatch(repository) and len(repository) <= 255
        if not valid or (":" in rest and not _TAG.fullmatch(tag)):
            msg = f"{text[:200]!r} is not an image reference"
            raise UsageError(msg, details=[("expected", "registry/repository[:tag][@sha256:digest]")])
        try:
            digest = Digest.parse(pinned) if "@" in text else None
        except InvalidDigest as error:
            msg = f"{text[:200]!r} is not an image reference"
            raise UsageError(msg, details=[("because", error.summary)]) from None
        return cls(registry, repository, tag or None, digest)

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest, else the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        pinned = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{pinned}"


class Repository:
    """One repository of one registry. Safe to share among threads."""

    def __init__(
        self,
        registry: str,
        repository: str,
        *,
        transport: Transport | None = None,
        plain_http: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        host = _HUB_HOST if registry == DOCKER_HUB else registry
        scheme = "http" if plain_http or is_loopback(host) else "https"
        self.name = f"{registry}/{repository}"
        self._base = f"{scheme}://{host}/v2/{repository}/"
        self._host = host_of(self._base)
        self._transport = transport or Transport()
        self._credential = credential_for(registry, registry=True, **({} if environ is None else {"environ": environ}))
        self._authorization: str | None = None
        self._actions = "pull"
        self._lock = threading.Lock()

    def manifest(self, target: str) -> Manifest:
        """The manifest or index that a tag or digest names, verified when it is a digest.

        Raises DigestMismatch, SourceRefused, Answered, Interrupted, Unreachable.
        """
        url = urljoin(self._base, f"manifests/{target}")
        attempts = Attempts(self._transport.bounds)
        while True:
            try:
                raw, headers = self._get_manifest(url, attempts)
                break
            except (Interrupted, Answered) as error:
                if not attempts.another(error):
                    raise
        got = Digest.of(raw)
        # without a digest of our own, what the registry says of its bytes must at least be true
        expected = target if ":" in target else headers.get("Docker-Content-Digest", "")
        if expected.startswith("sha256:") and expected != got:
            raise DigestMismatch(url, expected=printable(expected), got=got, consequence="it was discarded")
        media_type = headers.get("Content-Type", "").partition(";")[0].strip()
        return parse_manifest(raw, media_type, subject=f"{self.name}@{got}")

    def _get_manifest(self, url: str, attempts: Attempts) -> tuple[bytes, Mapping[str, str]]:
        with self._open("GET", url, headers=_ACCEPTED) as response:
            return self._read(response, LARGEST_MANIFEST, attempts), response.headers

    def blob(self, digest: Digest, size: int, out: NewFile, *, subject: str, progress: Progress = silent) -> None:
        """Fills `out` with a blob, verified. Raises as `manifest`, and SizeMismatch."""
        url = urljoin(self._base, f"blobs/{digest}")
        download(self._open, self._transport, url, out, subject=subject, digest=digest, size=size, progress=progress)

    def has_blob(self, digest: Digest) -> bool:
        """Whether the registry has this blob."""
        return self._exists(f"blobs/{digest}")

    def has_manifest(self, target: str) -> bool:
        """Whether the registry has a manifest under this tag or digest."""
        return self._exists(f"manifests/{target}")

    def push_blob(self, digest: Digest, size: int, content: BinaryIO) -> None:
        """Uploads a blob in one request (distribution-spec, "POST then PUT"), unless it is there.

        `content` is at its beginning. Raises as `manifest`.
        """
        if self.has_blob(digest):
            return
        self._actions = "pull,push"
        with self._open("POST", urljoin(self._base, "blobs/uploads/"), headers={"Content-Length": "0"}) as response:
            location = following(response.url, response.headers.get("Location", ""))
        if host_of(location) != self._host:
            raise SourceRefused(self.name, f"it wants the upload elsewhere, at {location[:200]!r}")
        separator = "&" if urlsplit(location).query else "?"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        url = f"{location}{separator}{urlencode({'digest': digest})}"
        with self._open("PUT", url, headers=headers, body=content):
            return

    def push_manifest(self, raw: bytes, media_type: str, target: str) -> Digest:
        """Puts a manifest under a tag or its digest; returns its digest. Raises as `manifest`."""
        self._actions = "pull,push"
        url = urljoin(self._base, f"manifests/{target}")
        with self._open("PUT", url, headers={"Content-Type": media_type}, body=raw):
            return Digest.of(raw)

    def _exists(self, path: str) -> bool:
        try:
            with self._open("HEAD", urljoin(self._base, path), headers=_ACCEPTED):
                return True
        except Answered as error:
            if error.status == requests.codes.not_found:
                return False
            raise

    @contextmanager
    def _open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: BinaryIO | bytes | None = None,
    ) -> Iterator[requests.Response]:
        with ExitStack() as stack:
            yield self._answer(stack, method, url, headers, body)

    def _answer(
        self,
        stack: ExitStack,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        body: BinaryIO | bytes | None,
    ) -> requests.Response:
        """The answer to one request, with a token got on the way when the registry asks for one."""
        used = self._authorization
        try:
            return stack.enter_context(self._send(method, url, headers, body))
        except Answered as error:
            # where a redirect led us, nobody may ask for what we tell this registry
            if error.status != requests.codes.unauthorized or host_of(error.url) != self._host:
                raise
            self._authorize(error.headers.get("WWW-Authenticate", ""), used)
        if body is not None and not isinstance(body, bytes):
            body.seek(0)
        try:
            return stack.enter_context(self._send(method, url, headers, body))
        except Answered as error:
            if error.status == requests.codes.unauthorized and host_of(error.url) == self._host:
                raise self._no_credentials() from None
            raise

    def _send(
        self, method: str, url: str, headers: Mapping[str, str] | None, body: BinaryIO | bytes | None
    ) -> AbstractContextManager[requests.Response]:
        return self._transport.open(
            method,
            url,
            headers=headers,
            authorization=lambda hop: self._authorization if host_of(hop) == self._host else None,
            body=body,
        )

    def _authorize(self, challenge: str, used: str | None) -> None:
        """Gets what the registry asked for (RFC 9110, 11.6.1; the docker token protocol)."""
        with self._lock:
            if self._authorization != used:
                return  # another thread has a new one already
            offered = _challenges(challenge)
            credential = self._credential
            if credential and (credential.token or ("basic" in offered and "bearer" not in offered)):
                self._authorization = credential.header
            elif "bearer" in offered:
                self._authorization = f"Bearer {self._fetch_token(offered['bearer'])}"
            else:
                raise self._no_credentials()

    def _fetch_token(self, challenge: Mapping[str, str]) -> str:
        realm = challenge.get("realm", "")
        host = host_of(realm)
        in_the_clear = is_loopback(self._host) and is_loopback(host) and realm.startswith("http://")
        if not realm.startswith("https://") and not in_the_clear:
            raise SourceRefused(self.name, f"it sends us to {realm[:200]!r} for a token")
        scope = challenge.get("scope") or f"repository:{self.name.partition('/')[2]}:{self._actions}"
        query = urlencode({"service": challenge.get("service", ""), "scope": scope})
        # a registry may send us anywhere for a token; our password goes only to a host of the same domain
        credential = self._credential if _same_domain(host, self._host) else None
        authorization = credential.header if credential else None
        url = f"{realm}{'&' if urlsplit(realm).query else '?'}{query}"
        try:
            with self._transport.open(
                "GET", url, authorization=lambda hop: authorization if host_of(hop) == host else None
            ) as response:
                raw = self._read(response, _LARGEST_TOKEN, Attempts(self._transport.bounds))
        except Answered as error:
            if error.temporary:
                raise
            if error.status in (requests.codes.unauthorized, requests.codes.forbidden):
                raise self._no_credentials() from None
            raise SourceRefused(self.name, f"{host}, where it sends us for a token, answers {error}") from None
        try:
            answer = json.loads(raw)
            token = answer.get("token") or answer["access_token"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token or not token.isprintable():
            raise SourceRefused(self.name, f"{host}, where it sends us for a token, gives none")
        return token

    def _no_credentials(self) -> SourceRefused:
        problem = (
            "it does not accept our credentials"
            if self._credential
            else "it needs credentials, and we have none for it"
        )
        return SourceRefused(self.name, problem, hint="docker login, or $SYSTEMFILES_CREDENTIALS (see the README)")

    def _read(self, response: requests.Response, limit: int, attempts: Attempts) -> bytes:
        data = bytearray()
        for piece in self._transport.body(response, attempts.deadline):
            data += piece
            if len(data) > limit:
                raise SourceRefused(response.url, f"its answer is longer than {limit} bytes")
        return bytes(data)


def _challenges(header: str) -> dict[str, dict[str, str]]:
    """The parameters of each scheme that a WWW-Authenticate header offers (RFC 9110, 11.6.1); one may offer several."""
    _, *parts = _SCHEME.split(header)
    return {
        scheme.lower(): {name.lower(): value for name, value in _PARAMETER.findall(rest)}
        for scheme, rest in zip(parts[::2], parts[1::2], strict=True)
    }


def _same_domain(host: str, registry: str) -> bool:
    """Whether `host` is the registry's own, or one beside or above it: auth.docker.io for registry-1.docker.io."""
    name, own = (text.rsplit(":", 1)[0] for text in (host, registry))
    parent = own.partition(".")[2]
    return name == own or (
        "." in parent and not parent.replace(".", "").isdigit() and f".{name}".endswith(f".{parent}")
    )
