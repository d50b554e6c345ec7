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
from systemfiles.sources.transport import Answered, Interrupted, Transport, Unreachable, host_of, is_loopback

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

    def answer(self, challenge: str, shown: str | None) -> str | None:
        """Gets what the registry asked for instead of what it was `shown`; None when another thread got one meanwhile.

        Raises SourceRefused, Interrupted, Unreachable.
        """
        with self._lock:
            if self.authorization != shown:
                return None
            offered = _challenges(challenge)
            header = self._credential.header if self._credential else None
            if header and (header.startswith("Bearer") or ("basic" in offered and "bearer" not in offered)):
                self.authorization = header
            elif "bearer" in offered:
                self.authorization = f"Bearer {self._fetch_token(offered['bearer'])}"
            else:
                raise self.refusal()
            return self.authorization

    def _fetch_token(self, challenge: Mapping[str, str]) -> str:
        realm = challenge.get("realm", "")
        host = host_of(realm)
        in_the_clear = self._clear or (is_loopback(self._host) and is_loopback(host))
        if not realm.startswith(("https://", "http://") if in_the_clear else "https://"):
            raise SourceRefused(self._name, f"it sends us to {realm[:200]!r} for a token")
        query = {"service": challenge.get("service", ""), "scope": self._scope(challenge.get("scope", ""))}
        # a registry may send us anywhere for a token; our password goes only to a host of the same domain
        ours = _same_domain(host, self._host)
        server = f"{host}, where it sends us for a token"
        try:
            with self._ask_for_token(realm, host, query, self._credential if ours else None) as response:
                deadline = self._transport.attempts(self._name).deadline
                raw = read_whole(self._transport, response, _LARGEST_TOKEN, deadline)
        except (Interrupted, Unreachable) as error:
            msg = f"{server}: {error}"
            raise type(error)(msg) from error
        except Answered as error:
            if error.temporary:
                msg = f"{server}: {error}"
                raise Interrupted(msg) from error
            if error.status in (requests.codes.unauthorized, requests.codes.forbidden) and ours:
                raise self.refusal() from None
            whose = "" if ours or not self._credential else " (our credentials are for the registry's own domain)"
            raise SourceRefused(self._name, f"{server}, answers {error}{whose}") from None
        try:
            answer = json.loads(raw)
            token = answer.get("token") or answer["access_token"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token or not token.isprintable():
            raise SourceRefused(self._name, f"{host}, where it sends us for a token, gives none")
        return token

    def _scope(self, asked: str) -> str:
        """What the token must be good for: what is asked for now, and what threads beside this one do."""
        prefix = f"repository:{self._name.partition('/')[2]}:"
        if asked and not asked.startswith(prefix):
            return asked
        actions = {*filter(None, asked.removeprefix(prefix).split(",")), *self.actions.split(",")}
        return prefix + ",".join(sorted(actions))

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
    name, own = (re.sub(r":[0-9]+$", "", text) for text in (host, registry))
    parent = own.partition(".")[2]
    is_name = not own.startswith("[") and not parent.replace(".", "").isdigit()
    return name == own or (is_name and "." in parent and f".{name}".endswith(f".{parent}"))
