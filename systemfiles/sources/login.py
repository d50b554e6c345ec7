"""Who may read and write one repository: what its registry asks for, and what it is told.

A registry answers 401 and says how it wants to know us (RFC 9110, 11.6.1): by Basic credentials, or by a Bearer token
from a server it names (distribution, "Token Authentication Specification" and "OAuth2 Token Authentication"). Tokens
are bought once and shared among threads.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from urllib.parse import urlencode, urlsplit

import requests

from systemfiles.foundation.errors import SourceRefused
from systemfiles.sources.credentials import Credential
from systemfiles.sources.transport import Answered, Attempts, Transport, host_of, is_loopback

_LARGEST_TOKEN = 1 << 20
_FORM = "application/x-www-form-urlencoded"
_SCHEME = re.compile(r"(?:^|,)\s*([A-Za-z]+)(?:\s+(?=[A-Za-z_]+=)|\s*$)")
_PARAMETER = re.compile(r'([A-Za-z_]{1,32})="([^"]*)"')


class Login:
    """What one repository's registry is told about us. `base` is the URL below which the repository is."""

    def __init__(self, name: str, base: str, credential: Credential | None, transport: Transport) -> None:
        self.authorization: str | None = None
        """The header that is good for now, for the registry's own host alone."""
        self.actions = "pull"
        self._name = name
        self._host = host_of(base)
        self._clear = base.startswith("http:") and not is_loopback(self._host)
        self._credential = None if self._clear else credential
        self._transport = transport
        self._lock = threading.Lock()

    def answer(self, challenge: str, used: str | None) -> None:
        """Gets what the registry asked for (RFC 9110, 11.6.1; the docker token protocol)."""
        with self._lock:
            if self.authorization != used:
                return  # another thread has a new one already
            offered = _challenges(challenge)
            header = self._credential.header if self._credential else None
            if header and (header.startswith("Bearer") or ("basic" in offered and "bearer" not in offered)):
                self.authorization = header
            elif "bearer" in offered:
                self.authorization = f"Bearer {self._fetch_token(offered['bearer'])}"
            else:
                raise self.refusal()

    def _fetch_token(self, challenge: Mapping[str, str]) -> str:
        realm = challenge.get("realm", "")
        host = host_of(realm)
        in_the_clear = self._clear or (is_loopback(self._host) and is_loopback(host))
        if not realm.startswith(("https://", "http://") if in_the_clear else "https://"):
            raise SourceRefused(self._name, f"it sends us to {realm[:200]!r} for a token")
        scope = challenge.get("scope") or f"repository:{self._name.partition('/')[2]}:{self.actions}"
        query = {"service": challenge.get("service", ""), "scope": scope}
        # a registry may send us anywhere for a token; our password goes only to a host of the same domain
        credential = self._credential if _same_domain(host, self._host) else None
        try:
            with self._ask_for_token(realm, host, query, credential) as response:
                raw = read_whole(self._transport, response, _LARGEST_TOKEN, Attempts(self._transport.bounds).deadline)
        except Answered as error:
            if error.temporary:
                raise
            if error.status in (requests.codes.unauthorized, requests.codes.forbidden):
                raise self.refusal() from None
            raise SourceRefused(self._name, f"{host}, where it sends us for a token, answers {error}") from None
        try:
            answer = json.loads(raw)
            token = answer.get("token") or answer["access_token"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token or not token.isprintable():
            raise SourceRefused(self._name, f"{host}, where it sends us for a token, gives none")
        return token

    def _ask_for_token(
        self, realm: str, host: str, query: Mapping[str, str], credential: Credential | None
    ) -> AbstractContextManager[requests.Response]:
        """GET with Basic credentials, or anonymous; POST where `docker login` left a refresh token."""
        if credential and credential.refresh:
            form = {**query, "grant_type": "refresh_token", "client_id": "systemfiles"}
            body = urlencode({**form, "refresh_token": credential.refresh}).encode()
            return self._transport.open("POST", realm, headers={"Content-Type": _FORM}, body=body)
        header = credential.header if credential else None
        url = f"{realm}{'&' if urlsplit(realm).query else '?'}{urlencode(query)}"
        return self._transport.open("GET", url, authorization=lambda hop: header if host_of(hop) == host else None)

    def refusal(self) -> SourceRefused:
        problem = "it needs credentials, and we have none for it"
        if self._credential:
            problem = "it does not accept our credentials"
        elif self._clear:
            problem = "it needs credentials, and none are sent over plain http"
        return SourceRefused(self._name, problem, hint="docker login, or $SYSTEMFILES_CREDENTIALS (see the README)")


def read_whole(transport: Transport, response: requests.Response, limit: int, deadline: float) -> bytes:
    """The body of a small answer. Raises SourceRefused when it is longer than `limit`, Interrupted."""
    data = bytearray()
    for piece in transport.body(response, deadline):
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
