"""OCI registries, as the distribution-spec has them, read and written by a client that verifies every byte.

A manifest is kept as the bytes it came in; what is asked for by digest must have that digest, and what a tag gives is
pinned by the digest of its bytes. Tokens belong to one repository of one registry and go to no other host. Plain http
is spoken on loopback, and where a reference begins with `http://`; no credential ever leaves this host in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import requests

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    DigestMismatch,
    InvalidDigest,
    SourceRefused,
    SourceUnavailable,
    UsageError,
)
from systemfiles.foundation.files import NewFile
from systemfiles.foundation.manifests import IMAGE_INDEX, IMAGE_MANIFEST, INDEXES, MANIFESTS, Manifest, parse_manifest
from systemfiles.foundation.progress import Progress, silent
from systemfiles.foundation.units import printable
from systemfiles.sources.credentials import credential_for
from systemfiles.sources.http import download
from systemfiles.sources.login import Login, read_whole
from systemfiles.sources.transport import (
    Answered,
    Attempts,
    Interrupted,
    Transport,
    Unreachable,
    following,
    host_of,
    is_loopback,
)
from systemfiles.sources.upload import Upload

T = TypeVar("T")

DOCKER_HUB = "docker.io"
_HUB_HOST = "registry-1.docker.io"
LARGEST_MANIFEST = 4 << 20
_LOGINS = 5  # other threads may get tokens meanwhile, which are not good for what this one asks
_ACCEPTED = {"Accept": ", ".join((*MANIFESTS, *INDEXES, "*/*"))}  # a registry denies what it has as something else
_IN_THE_CLEAR = "http://"
_NO_LIST = (requests.codes.bad_request, requests.codes.not_found, requests.codes.method_not_allowed)

# distribution-spec, "Pulling manifests"
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True)
class Reference:
    """`registry/repository[:tag][@digest]`, with docker's short forms for docker.io.

    With `http://` before it, the registry is asked in plain http.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None
    plain_http: bool = False

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises UsageError."""
        name, _, pinned = text.removeprefix(_IN_THE_CLEAR).partition("@")
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
        return cls(registry, repository, tag or None, digest, text.startswith(_IN_THE_CLEAR))

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest, else the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        pinned = f"@{self.digest}" if self.digest else ""
        scheme = _IN_THE_CLEAR if self.plain_http else ""
        return f"{scheme}{self.registry}/{self.repository}{tag}{pinned}"


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
        credential = credential_for(registry, registry=True, **({} if environ is None else {"environ": environ}))
        self._login = Login(self.name, self._base, credential, self._transport)

    def manifest(self, target: str) -> Manifest:
        """The manifest or index that a tag or digest names, verified when it is a digest.

        Raises DigestMismatch, SourceRefused, Answered, Interrupted, Unreachable.
        """
        return self._manifest(f"manifests/{target}", target)

    def _manifest(self, path: str, target: str) -> Manifest:
        url = urljoin(self._base, path)
        raw, headers = self._patiently(lambda attempts: self._get_small(url, attempts))
        got = Digest.of(raw)
        # without a digest of our own, what the registry says of its bytes must at least be true
        expected = target if ":" in target else headers.get("Docker-Content-Digest", "")
        if expected.startswith("sha256:") and expected != got:
            raise DigestMismatch(url, expected=printable(expected), got=got, consequence="it was discarded")
        media_type = headers.get("Content-Type", "").partition(";")[0].strip()
        return parse_manifest(raw, media_type, subject=f"{self.name}@{got}")

    def referrers(self, digest: Digest) -> list[Mapping[str, Any]]:
        """The descriptors of what refers to a manifest (distribution-spec, "Listing Referrers"): their first page.

        Where the registry keeps no such list, it is the one under the tag that clients keep instead. Raises as
        `manifest`, and without a list by either way there is none.
        """
        for path in (f"referrers/{digest}", f"manifests/{_listing(digest)}"):
            try:
                found = self._manifest(path, "")
            except (Answered, SourceRefused) as error:
                if isinstance(error, Answered) and error.status not in _NO_LIST:
                    raise
                continue  # some registries answer with a page of their own
            entries = found.value.get("manifests")
            return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        return []

    def small_blob(self, digest: Digest, *, limit: int = LARGEST_MANIFEST) -> bytes:
        """The bytes of a blob of at most `limit`, verified. Raises as `manifest`."""
        url = urljoin(self._base, f"blobs/{digest}")
        raw, _ = self._patiently(lambda attempts: self._get_small(url, attempts, limit))
        if (got := Digest.of(raw)) != digest:
            raise DigestMismatch(url, expected=digest, got=got, consequence="it was discarded")
        return raw

    def _get_small(
        self, url: str, attempts: Attempts, limit: int = LARGEST_MANIFEST
    ) -> tuple[bytes, Mapping[str, str]]:
        with self._open("GET", url, headers=_ACCEPTED) as response:
            raw = read_whole(self._transport, response, limit, attempts.deadline)
            return raw, response.headers

    def blob(self, digest: Digest, size: int, out: NewFile, *, subject: str, progress: Progress = silent) -> None:
        """Fills `out` with a blob, verified. Raises as `manifest`, and SizeMismatch."""
        url = urljoin(self._base, f"blobs/{digest}")
        download(self._open, self._transport, url, out, subject=subject, digest=digest, size=size, progress=progress)

    def has_blob(self, digest: Digest) -> bool:
        """Whether the registry has this blob. Raises as `manifest`."""
        return self._exists(f"blobs/{digest}")

    def has_manifest(self, target: str) -> bool:
        """Whether the registry has a manifest under this tag or digest. Raises as `manifest`."""
        return self._exists(f"manifests/{target}")

    def push_blob(self, digest: Digest, size: int, content: BinaryIO) -> bool:
        """Uploads a blob in one request (distribution-spec, "POST then PUT"); False when it was there.

        `content` is at its beginning. Raises SourceRefused, SourceUnavailable.
        """

        def send(attempts: Attempts) -> None:
            self._upload(digest, size, Upload(content, size, self._transport.bounds, attempts.deadline))

        self._login.actions = "pull,push"
        with self.insisting(f"blob {digest}"):
            there = self.has_blob(digest)
            if not there:
                self._patiently(send)
        return not there

    def _upload(self, digest: Digest, size: int, content: Upload) -> None:
        with self._open("POST", urljoin(self._base, "blobs/uploads/"), headers={"Content-Length": "0"}) as response:
            location = following(response.url, response.headers.get("Location", ""))
        if host_of(location) != self._host:
            raise SourceRefused(self.name, f"it wants the upload elsewhere, at {location[:200]!r}")
        separator = "&" if urlsplit(location).query else "?"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        url = f"{location}{separator}{urlencode({'digest': digest})}"
        content.seek(0)
        with self._open("PUT", url, headers=headers, body=content if size else b""):
            return

    def push_manifest(self, raw: bytes, media_type: str, target: str) -> Digest:
        """Puts a manifest under a tag or its digest; returns its digest. Raises SourceRefused, SourceUnavailable."""
        self._push_manifest(raw, media_type, target)
        return Digest.of(raw)

    def attach(self, raw: bytes, subject: Digest, listed: Mapping[str, Any]) -> Digest:
        """Puts a manifest that refers to `subject`; `listed` is its descriptor among those. Raises as `push_manifest`.

        A registry that keeps no list of referrers is given one under a tag (distribution-spec, "Referrers Tag Schema");
        two clients that attach at once may lose an entry of that.
        """
        digest = Digest.of(raw)
        if "OCI-Subject" not in self._push_manifest(raw, IMAGE_MANIFEST, digest):
            with self.insisting(f"referrers of {subject}"):
                others = self.referrers(subject)
            if digest not in [entry.get("digest") for entry in others]:
                index = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": [*others, listed]}
                self._push_manifest(json.dumps(index).encode(), IMAGE_INDEX, _listing(subject))
        return digest

    def _push_manifest(self, raw: bytes, media_type: str, target: str) -> Mapping[str, str]:
        url = urljoin(self._base, f"manifests/{target}")

        def send(attempts: Attempts) -> Mapping[str, str]:
            with self._open("PUT", url, headers={"Content-Type": media_type}, body=raw) as response:
                return response.headers

        self._login.actions = "pull,push"
        with self.insisting(f"manifest {target}"):
            return self._patiently(send)

    def _exists(self, path: str) -> bool:
        def ask(attempts: Attempts) -> bool:
            try:
                with self._open("HEAD", urljoin(self._base, path), headers=_ACCEPTED):
                    return True
            except Answered as error:
                if error.status == requests.codes.not_found:
                    return False
                raise

        return self._patiently(ask)

    def _patiently(self, action: Callable[[Attempts], T]) -> T:
        """Tries again for as long as that may help."""
        attempts = self._transport.attempts(self.name)
        while True:
            try:
                return action(attempts)
            except (Interrupted, Answered) as error:
                if not attempts.another(error):
                    raise

    @contextmanager
    def insisting(self, subject: str) -> Iterator[None]:
        """For what can be had from this registry only: raises SourceRefused and SourceUnavailable for what it did."""
        try:
            yield
        except Answered as error:
            raise SourceRefused(self.name, f"{subject}: it answers {error}") from error
        except (Interrupted, Unreachable) as error:
            raise SourceUnavailable(self.name, tried=[(subject, str(error))], wanted="reached") from error

    @contextmanager
    def _open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Upload | bytes | None = None,
    ) -> Iterator[requests.Response]:
        with ExitStack() as stack:
            yield self._answer(stack, method, url, headers, body)

    def _answer(
        self,
        stack: ExitStack,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        body: Upload | bytes | None,
    ) -> requests.Response:
        """The answer to one request, with a token got on the way when the registry asks for one."""
        bought: str | None = None
        for _ in range(_LOGINS):
            shown = self._login.authorization
            try:
                return stack.enter_context(self._send(method, url, headers, body, shown))
            except Answered as error:
                # where a redirect led us, nobody may ask for what we tell this registry
                if error.status != requests.codes.unauthorized or host_of(error.url) != self._host:
                    raise
                challenge = error.headers.get("WWW-Authenticate", "")
            if shown is not None and shown == bought:
                break  # it was got for just this
            bought = self._login.answer(challenge, shown)
            if isinstance(body, Upload):
                body.seek(0)
        raise self._login.refusal()

    def _send(
        self, method: str, url: str, headers: Mapping[str, str] | None, body: Upload | bytes | None, shown: str | None
    ) -> AbstractContextManager[requests.Response]:
        return self._transport.open(
            method,
            url,
            headers=headers,
            authorization=lambda hop: shown if host_of(hop) == self._host else None,
            body=body,
        )


def _listing(digest: Digest) -> str:
    """The tag under which clients list the referrers of a manifest."""
    return f"sha256-{digest.hex}"
