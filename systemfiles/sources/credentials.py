"""Who we are to which host. A credential belongs to one host and is never shown to another.

Looked up in this order: `$SYSTEMFILES_CREDENTIALS` (pairs `host=basic:USER:PASSWORD` or `host=bearer:TOKEN`, separated
by spaces), for registries the docker config (`$DOCKER_CONFIG/config.json` or ~/.docker/config.json: credential
helpers, then `auths`), and netrc (`$NETRC` or ~/.netrc).
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import netrc
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from systemfiles.foundation.errors import UsageError

log = logging.getLogger(__name__)

VARIABLE = "SYSTEMFILES_CREDENTIALS"
_HELPER_SECONDS = 20
_REFRESH_USER = "<token>"  # docker's sign that a helper's secret is a refresh token
_DOCKER_HUB = "index.docker.io"  # docker's own name for docker.io in its config, as https://index.docker.io/v1/


@dataclass(frozen=True, slots=True)
class Credential:
    """A user and password, a bearer token, or a registry's refresh token. Its repr shows none of them."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    refresh: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Refuses what cannot be sent, as a ValueError: JSON may hold half a character; the environment, any bytes."""
        self.refresh.encode()
        for text in (self.user, self.password, self.token):
            text.encode("utf-8", "surrogateescape")

    @property
    def header(self) -> str | None:
        """The value of an Authorization header (RFC 7617, RFC 6750); a refresh token only buys others."""
        if self.refresh:
            return None
        if self.token:
            return f"Bearer {self.token}"
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode("utf-8", "surrogateescape")).decode()


def credential_for(host: str, *, registry: bool = False, environ: Mapping[str, str] = os.environ) -> Credential | None:
    """The credential for `host` (with its port, if that is not the usual one); None for an anonymous request.

    Raises UsageError when `$SYSTEMFILES_CREDENTIALS` cannot be read.
    """
    found = _from_environment(host, environ)
    if found is None and registry:
        found = _from_docker(host, environ)
    return found or _from_netrc(host, environ)


def _from_environment(host: str, environ: Mapping[str, str]) -> Credential | None:
    for pair in environ.get(VARIABLE, "").split():
        name, _, rest = pair.partition("=")
        kind, _, secret = rest.partition(":")
        if kind not in ("basic", "bearer") or not secret:
            msg = f"${VARIABLE}: the entry for {name!r} cannot be read"
            raise UsageError(msg, hint="write host=basic:USER:PASSWORD or host=bearer:TOKEN, separated by spaces")
        if name == host:
            user, _, password = secret.partition(":")
            return Credential(token=secret) if kind == "bearer" else Credential(user, password)
    return None


def _from_docker(host: str, environ: Mapping[str, str]) -> Credential | None:
    directory = Path(environ.get("DOCKER_CONFIG") or Path(environ.get("HOME", "/")) / ".docker")
    try:
        config: Any = json.loads((directory / "config.json").read_bytes())
        auths, helpers = config.get("auths") or {}, config.get("credHelpers") or {}
        for name in (name for name in {**helpers, **auths} if _host_of_key(name) == host):
            helper = helpers.get(name) or config.get("credsStore")
            if helper and (found := _ask_helper(str(helper), name)):
                return found
            if name in auths and (found := _from_auth(auths[name])):
                return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): going on without it", directory / "config.json", type(error).__name__)
    return None


def _host_of_key(key: str) -> str:
    """The registry that a key of docker's config means: some logins write a URL there."""
    name = re.sub(r"^https?://", "", key).partition("/")[0]
    return "docker.io" if name == _DOCKER_HUB else name


def _from_auth(entry: Mapping[str, str]) -> Credential | None:
    if entry.get("identitytoken"):
        return Credential(refresh=entry["identitytoken"])
    if entry.get("username"):
        return Credential(entry["username"], entry.get("password", ""))
    if not entry.get("auth"):
        return None
    try:
        user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
    except binascii.Error as error:
        msg = "auth is not base64"
        raise ValueError(msg) from error
    return Credential(user, password)


def _ask_helper(helper: str, server: str) -> Credential | None:
    """The docker-credential-helpers protocol: the server's name on stdin, JSON on stdout."""
    if not helper.replace("-", "").replace("_", "").isalnum():
        return None
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=server,
            capture_output=True,
            text=True,
            check=True,
            timeout=_HELPER_SECONDS,
        )
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
        return Credential(refresh=secret) if user == _REFRESH_USER else Credential(user, secret)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("docker-credential-%s gave nothing for %s (%s)", helper, server, type(error).__name__)
        return None


def _from_netrc(host: str, environ: Mapping[str, str]) -> Credential | None:
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "/")) / ".netrc")
    try:
        entry = netrc.netrc(str(path)).hosts.get(host.rsplit(":", 1)[0])
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read (%s): going on without it", path, type(error).__name__)
        return None
    return Credential(entry[0], entry[2] or "") if entry and entry[0] else None
