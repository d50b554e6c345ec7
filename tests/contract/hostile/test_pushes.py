"""Registries that take an upload as they like."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceRefused, SourceUnavailable
from systemfiles.sources.oci import Repository
from tests.contract.answers import (
    REPOSITORY,
    Answer,
    basic,
    bearer,
    body,
    in_turn,
    only_for,
    redirect,
    reset,
    silent,
    status,
)
from tests.contract.hostile.world import BASIC, TOKEN, Check, World
from tests.contract.origins import IMAGE_MANIFEST, digest_of

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


def asks_for_a_token(world: World) -> None:
    """A password is good for everything but the upload itself."""
    accepts(world)
    world.secrets[TOKEN] = {world.registry.host}
    world.tokens.answers["/token"] = body(json.dumps({"token": TOKEN}).encode())
    to_write = only_for(f"Bearer {TOKEN}", bearer(world.tokens.url("/token")))
    to_read = only_for(BASIC, basic())
    world.registry.guard = lambda request: to_write(request) if request.method == "PUT" else to_read(request)


def asks_who_we_are_and_we_are_nobody(world: World) -> None:
    accepts(world)
    world.monkeypatch.delenv("SYSTEMFILES_CREDENTIALS")


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
    Push("asks for a token in between", asks_for_a_token, then=all_of_it_arrived),
    Push("wants it at another host", uploads_to(lambda world: world.other.url("/up")), SourceRefused, "elsewhere"),
    Push("wants it at another port", uploads_to(lambda world: world.origin.url("/up")), SourceRefused, "elsewhere"),
    Push(
        "wants it at a host behind a backslash",
        uploads_to(lambda world: f"http://{world.other.host}\\@{world.registry.host}{UPLOADS}1"),
        SourceRefused,
        "no plain URL",
    ),
    Push(
        "wants it with a name",
        uploads_to(lambda world: f"http://a:b@{world.registry.host}{UPLOADS}1"),
        SourceRefused,
        "no plain URL",
    ),
    Push("wants it in a file", uploads_to(lambda world: "file:///tmp/x"), SourceRefused, "file:///tmp/x"),
    Push("wants it at no URL", uploads_to(lambda world: "http://["), SourceRefused),
    Push("sends the upload on", answers_upload(redirect("/else", 307)), SourceRefused, "HTTP 307"),
    Push("does not allow it", answers_upload(status(403)), SourceRefused, "HTTP 403"),
    Push("fails", answers_upload(status(500)), SourceRefused, "HTTP 500"),
    Push("fails, then takes it", answers_upload(in_turn(status(503), status(201))), then=all_of_it_arrived),
    Push("breaks off, then takes it", answers_upload(in_turn(reset, status(201))), then=all_of_it_arrived),
    Push("breaks off", answers_upload(reset), SourceUnavailable, "could not be reached"),
    Push("says nothing", answers_upload(silent), SourceUnavailable, "silent for too long"),
    Push("asks for ever who we are", answers_upload(basic()), SourceRefused, "not accept our credentials"),
    Push("asks who we are, and we are nobody", asks_who_we_are_and_we_are_nobody, SourceRefused, "needs credentials"),
]


@pytest.mark.parametrize("push", PUSHES, ids=lambda push: push.what)
def test_a_registry_may_do_what_it_wants_with_an_upload(push: Push, world: World) -> None:
    def upload() -> None:
        repository = Repository(world.registry.host, REPOSITORY)
        repository.push_blob(Digest.of(CONTENT), len(CONTENT), io.BytesIO(CONTENT))

    world.login(world.registry.host, world.tokens.host)
    world.registry.guard = only_for(BASIC, basic())
    push.does(world)
    if push.error is None:
        upload()
    else:
        with pytest.raises(push.error, match=push.says or None):
            upload()
    push.then(world)
    assert world.other.requests == world.origin.requests == []
    assert world.leaks() == []
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
