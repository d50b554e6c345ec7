"""Who may learn a password or a token: the registry's own domain, and nobody in the clear."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from systemfiles.foundation.errors import SourceRefused
from systemfiles.foundation.manifests import IMAGE_MANIFEST
from systemfiles.sources.login import _same_domain
from systemfiles.sources.oci import Reference, Repository
from systemfiles.sources.transport import Unreachable
from tests.contract.answers import REPOSITORY, basic, bearer, body, only_for, status
from tests.contract.origins import Origin, Registry, tls

USER, PASSWORD, TOKEN = "operator", "correct-horse", "a-token"
NAMES = (
    "registry.example.com",
    "auth.example.com",
    "example.com",
    "evilexample.com",
    "registry.example.com.evil.example",
    "registry.io",
    "evil.io",
    "a.b.example.com",
    "x.b.example.com",
)


def _resolve_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **options: Any) -> Any:
        return real("127.0.0.1" if host.lower() in NAMES else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.fixture
def everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Registry, Origin]]:
    """A registry and a token server under all names there are; https, since names are not loopback."""
    certificate, context = tls(tmp_path, *NAMES)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    _resolve_names(monkeypatch)
    with contextlib.closing(Registry(tls=context)) as registry, contextlib.closing(Origin(tls=context)) as tokens:
        registry.add_image(b"layer", tags=["1"])
        tokens.answers["/token"] = body(json.dumps({"token": TOKEN}).encode())
        yield registry, tokens


@pytest.mark.parametrize(
    ("host", "registry", "same"),
    [
        ("registry.example.com", "registry.example.com", True),
        ("registry.example.com:5001", "registry.example.com:5000", True),
        ("auth.example.com", "registry.example.com:5000", True),
        ("example.com:5000", "registry.example.com", True),
        ("evil.com", "registry.com", False),
        ("com", "registry.com", False),
        ("[2001:db8::1]:5001", "[2001:db8::1]:5000", True),
        ("[2001:db8::1]", "[2001:db8::1]:5000", True),
        ("[2001:db8::bad]:5000", "[2001:db8::1]:5000", False),
        ("[2001:db8::bad]", "[2001:db8::1]", False),
        ("[2001::1]:5000", "[2001:db8::1]:5000", False),
        ("[::ffff:10.0.0.2]", "[::ffff:10.0.0.1]", False),
        ("10.0.0.1:5001", "10.0.0.1:5000", True),
        ("10.0.0.2", "10.0.0.1", False),
        ("11.0.0.1", "10.0.0.1", False),
        ("127.0.0.2:5000", "127.0.0.1:5000", False),
    ],
)
def test_an_address_is_of_no_domain_but_its_own(host: str, registry: str, same: bool) -> None:
    assert _same_domain(host, registry) == same


@pytest.mark.parametrize(
    ("name", "realm", "told"),
    [
        ("registry.example.com", "registry.example.com", True),
        ("registry.example.com", "auth.example.com", True),
        ("registry.example.com", "AUTH.Example.Com", True),
        ("registry.example.com", "example.com", True),
        ("a.b.example.com", "x.b.example.com", True),
        ("a.b.example.com", "example.com", False),
        ("registry.example.com", "evilexample.com", False),
        ("registry.example.com", "registry.example.com.evil.example", False),
        ("registry.example.com", "127.0.0.1", False),
        ("registry.io", "registry.io", True),
        ("registry.io", "evil.io", False),
    ],
)
def test_a_password_goes_to_token_servers_of_the_registrys_own_domain(
    everybody: tuple[Registry, Origin], name: str, realm: str, told: bool
) -> None:
    registry, tokens = everybody
    port, token_port = (server.host.rpartition(":")[2] for server in everybody)
    host = f"{name}:{port}"
    registry.guard = only_for(f"Bearer {TOKEN}", bearer(f"https://{realm}:{token_port}/token"))
    environ = {"SYSTEMFILES_CREDENTIALS": f"{host}=basic:{USER}:{PASSWORD}"}
    assert Repository(host, REPOSITORY, environ=environ).manifest("1").media_type == IMAGE_MANIFEST
    (request,) = tokens.requests
    assert ("authorization" in request.headers) == told


def test_a_token_of_ones_own_goes_to_its_registry_and_to_no_token_server(
    everybody: tuple[Registry, Origin],
) -> None:
    registry, tokens = everybody
    host = f"registry.example.com:{registry.host.rpartition(':')[2]}"
    realm = f"https://auth.example.com:{tokens.host.rpartition(':')[2]}/token"
    for challenge in (bearer(realm), basic(), status(401)):
        registry.guard = only_for("Bearer my-own", challenge)
        environ = {"SYSTEMFILES_CREDENTIALS": f"{host}=bearer:my-own"}
        assert Repository(host, REPOSITORY, environ=environ).manifest("1").media_type == IMAGE_MANIFEST
    assert tokens.requests == []


def test_a_refresh_token_buys_a_token_where_the_registry_says_so_and_is_shown_to_nobody_else(
    everybody: tuple[Registry, Origin], tmp_path: Path
) -> None:
    registry, tokens = everybody
    port, token_port = (server.host.rpartition(":")[2] for server in everybody)
    host = f"registry.example.com:{port}"
    (tmp_path / "config.json").write_text(json.dumps({"auths": {host: {"identitytoken": "to-be-renewed"}}}))
    environ = {"DOCKER_CONFIG": str(tmp_path)}
    tokens.answers["/token"] = body(json.dumps({"access_token": TOKEN}).encode())
    registry.guard = only_for(f"Bearer {TOKEN}", bearer(f"https://auth.example.com:{token_port}/token"))
    assert Repository(host, REPOSITORY, environ=environ).manifest("1").media_type == IMAGE_MANIFEST
    (request,) = tokens.requests
    assert request.method == "POST"
    assert dict(parse_qsl(request.body.decode())) == {
        "grant_type": "refresh_token",
        "client_id": "systemfiles",
        "service": "test",
        "scope": f"repository:{REPOSITORY}:pull",
        "refresh_token": "to-be-renewed",
    }
    registry.guard = only_for(f"Bearer {TOKEN}", bearer(f"https://evil.io:{token_port}/token"))
    Repository(host, REPOSITORY, environ=environ).manifest("1")
    registry.guard = only_for("", basic())
    with pytest.raises(SourceRefused, match="does not accept"):
        Repository(host, REPOSITORY, environ=environ).manifest("1")
    told = [request for server in everybody for request in server.requests if "to-be-renewed" in str(request)]
    assert told == [request]


@pytest.fixture
def in_the_clear(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Registry, Origin]]:
    """A registry and a token server that speak plain http under the names there are."""
    _resolve_names(monkeypatch)
    with contextlib.closing(Registry()) as registry, contextlib.closing(Origin()) as tokens:
        registry.add_image(b"layer", tags=["1"])
        tokens.answers["/token"] = body(json.dumps({"token": TOKEN}).encode())
        yield registry, tokens


def plain(name: str, registry: Registry, **environ: str) -> Repository:
    reference = Reference.parse(f"http://{name}:{registry.host.rpartition(':')[2]}/{REPOSITORY}")
    return Repository(reference.registry, reference.repository, plain_http=reference.plain_http, environ=environ)


def test_where_a_reference_says_http_the_registry_is_asked_in_it(in_the_clear: tuple[Registry, Origin]) -> None:
    registry, tokens = in_the_clear
    assert plain("registry.example.com", registry).manifest("1").media_type == IMAGE_MANIFEST
    realm = f"http://auth.example.com:{tokens.host.rpartition(':')[2]}/token"
    registry.guard = only_for(f"Bearer {TOKEN}", bearer(realm))
    assert plain("registry.example.com", registry).manifest("1").media_type == IMAGE_MANIFEST


def test_no_password_leaves_the_host_in_plain_http(in_the_clear: tuple[Registry, Origin]) -> None:
    registry, tokens = in_the_clear
    port = registry.host.rpartition(":")[2]
    realm = f"http://auth.example.com:{tokens.host.rpartition(':')[2]}/token"
    login = {"SYSTEMFILES_CREDENTIALS": f"registry.example.com:{port}=basic:{USER}:{PASSWORD}"}
    for challenge in (basic(), bearer(realm)):
        registry.guard = only_for("", challenge)
        with pytest.raises(SourceRefused, match="none are sent over plain http"):
            plain("registry.example.com", registry, **login).manifest("1")
    seen = [*registry.requests, *tokens.requests]
    assert [request.headers["authorization"] for request in seen if "authorization" in request.headers] == [
        f"Bearer {TOKEN}"
    ]


def test_without_http_in_front_a_registry_is_asked_by_https_alone(in_the_clear: tuple[Registry, Origin]) -> None:
    registry, _ = in_the_clear
    host = f"registry.example.com:{registry.host.rpartition(':')[2]}"
    with pytest.raises(Unreachable, match="does not speak TLS"):
        Repository(host, REPOSITORY, environ={}).manifest("1")
    assert registry.requests == []


def test_nobody_has_a_password_when_the_environment_is_empty(
    everybody: tuple[Registry, Origin], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, _ = everybody
    host = f"registry.example.com:{registry.host.rpartition(':')[2]}"
    monkeypatch.setenv("SYSTEMFILES_CREDENTIALS", f"{host}=basic:{USER}:{PASSWORD}")
    registry.guard = only_for("", basic())
    with pytest.raises(SourceRefused, match="needs credentials"):
        Repository(host, REPOSITORY, environ={}).manifest("1")
    with pytest.raises(SourceRefused, match="does not accept"):
        Repository(host, REPOSITORY).manifest("1")
