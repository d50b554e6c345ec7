"""What a proxy gets to see, and what it does not."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable

import pytest

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.files import NewFile
from systemfiles.sources.http import fetch
from systemfiles.sources.oci import Repository
from tests.contract.answers import REPOSITORY, Answer, basic, bearer, body, content, only_for, redirect
from tests.contract.hostile.world import BASIC, FILE, TAG, TOKEN, World, a_file, an_image
from tests.contract.origins import IMAGE_INDEX, Origin

NAMES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
changes: list[str] = []
watching = threading.Event()


def _watch(event: str, arguments: object) -> None:
    if watching.is_set() and event in ("os.putenv", "os.unsetenv"):
        changes.append(event)


@pytest.fixture
def proxy(world: World) -> Origin:
    """Somebody else's host, which the environment names for everything."""
    for name in NAMES:
        world.monkeypatch.setenv(name, world.other.url())
    return world.other


def with_a_login(world: World) -> None:
    world.login(world.origin.host)
    guarded = content(FILE)
    world.origin.answers["/file"] = lambda x: (
        guarded(x) if x.request.headers.get("authorization") == BASIC else basic()(x)
    )


def test_what_this_machine_serves_is_fetched_directly(proxy: Origin, world: World) -> None:
    with_a_login(world)
    a_file(world)
    assert proxy.requests == []
    assert world.leaks() == []


def test_what_another_serves_is_fetched_through_the_proxy(proxy: Origin, world: World) -> None:
    proxy.answers["http://files.example.com/file"] = content(FILE)
    world.url = "http://files.example.com/file"
    a_file(world)
    assert [request.path for request in proxy.requests] == ["http://files.example.com/file"]


def test_a_redirect_from_another_to_this_machine_is_followed_directly(proxy: Origin, world: World) -> None:
    with_a_login(world)
    proxy.answers["http://files.example.com/file"] = redirect(world.origin.url("/file"))
    world.url = "http://files.example.com/file"
    a_file(world)
    assert [request.path for request in proxy.requests] == ["http://files.example.com/file"]
    assert world.leaks() == []


@pytest.mark.parametrize("challenge", [basic, bearer], ids=["password", "token"])
def test_a_registry_on_this_machine_is_asked_directly(
    challenge: Callable[..., Answer], proxy: Origin, world: World
) -> None:
    world.login(world.registry.host, world.tokens.host)
    world.secrets[TOKEN] = {world.registry.host}
    world.tokens.answers["/token"] = body(json.dumps({"token": TOKEN}).encode())
    world.registry.guard = (
        only_for(BASIC, basic())
        if challenge is basic
        else only_for(f"Bearer {TOKEN}", bearer(world.tokens.url("/token")))
    )
    assert Repository(world.registry.host, REPOSITORY).manifest(TAG).media_type == IMAGE_INDEX
    an_image(world)
    assert proxy.requests == []
    assert world.leaks() == []


def test_no_request_changes_the_environment_which_all_threads_share(proxy: Origin, world: World) -> None:
    """Neither while it lasts: another thread would take `no_proxy` for everybody's, and put it back for good."""
    sys.addaudithook(_watch)
    watching.set()
    try:
        a_file(world)
        an_image(world)
    finally:
        watching.clear()
    assert changes == []


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
