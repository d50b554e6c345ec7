"""Token servers: where a registry may send us for a token, what we say there, and what comes of it."""

from __future__ import annotations

import json

import pytest

from systemfiles.foundation.errors import SourceUnavailable
from tests.contract.answers import basic, bearer, body, in_turn, only_for, redirect, reset, silent, status, verbatim
from tests.contract.hostile.guards import GIVEN, guarded, nothing_more, the_other_did_not_learn_who_we_are
from tests.contract.hostile.images import BLOB_OF_ROOT, NO_BLOB
from tests.contract.hostile.world import (
    HTML,
    TOKEN,
    Check,
    Row,
    World,
    an_image,
    nobody_else_was_asked,
    run_row,
)
from tests.contract.origins import Origin


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


def token_server_behind_a_backslash(world: World) -> None:
    realm = f"http://{world.other.host}\\@{world.tokens.host}/token"
    world.registry.guard = only_for(f"Bearer {TOKEN}", bearer(realm))


def token_server_that_is_gone(world: World) -> None:
    gone = Origin()
    gone.close()
    world.registry.guard = only_for(f"Bearer {TOKEN}", bearer(gone.url("/token")))


def with_a_refresh_token(does: Check) -> Check:
    """What `docker login` left is no password; it buys a token, from whoever is of the registry's own domain."""

    def hostile(world: World) -> None:
        guarded(does, login=False)(world)
        world.secrets[REFRESH] = {world.tokens.host}
        config = {"auths": {world.registry.host: {"identitytoken": REFRESH}}}
        (world.base / "config.json").write_text(json.dumps(config))
        world.monkeypatch.setenv("DOCKER_CONFIG", str(world.base))

    return hostile


def token_for_a_refresh_token(world: World) -> None:
    world.tokens.answers["/token"] = lambda x: (
        body(GIVEN)(x) if x.request.method == "POST" and REFRESH.encode() in x.request.body else status(403)(x)
    )


def token_server_sends_a_refresh_token_on(world: World) -> None:
    world.tokens.answers["/token"] = redirect(world.other.url("/token"), 307)
    world.other.answers["/token"] = body(GIVEN)


def asked_twice_for_a_token(world: World) -> None:
    assert len(world.tokens.requests) == 2


REFRESH = "to-be-renewed"
TOKENS = "{tokens}, where it sends us for a token"
TOKEN_SERVERS = [
    Row(
        "a token server elsewhere",
        an_image,
        guarded(token_server_elsewhere),
        SourceUnavailable,
        ["{other}, where it sends us for a token, answers HTTP 401", "are for the registry's own domain"],
        NO_BLOB,
        the_other_did_not_learn_who_we_are,
    ),
    Row(
        "a token server behind a backslash",
        an_image,
        guarded(token_server_behind_a_backslash),
        SourceUnavailable,
        ["no plain URL"],
        NO_BLOB,
        nobody_else_was_asked,
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
        guarded(nothing_more, token=in_turn(status(503), status(429), body(GIVEN))),
    ),
    *(
        Row(f"a token server that {what}", an_image, does, SourceUnavailable, says, NO_BLOB)
        for what, does, says in (
            ("fails", guarded(nothing_more, token=status(500)), [f"{TOKENS}: HTTP 500"]),
            ("is busy for ever", guarded(nothing_more, token=status(503)), [f"{TOKENS}: HTTP 503"]),
            ("says nothing", guarded(nothing_more, token=silent), [f"{TOKENS}: it stayed silent"]),
            ("resets for ever", guarded(nothing_more, token=reset), [f"{TOKENS}: Connection reset by peer"]),
            ("is not there", guarded(token_server_that_is_gone), ["where it sends us for a token: Connection refused"]),
        )
    ),
    *(
        Row(
            f"a token server that {what}, then well",
            an_image,
            guarded(nothing_more, token=in_turn(answer, body(GIVEN))),
            then=asked_twice_for_a_token,
        )
        for what, answer in (("resets", reset), ("says nothing", silent), ("hangs up", verbatim()))
    ),
    Row("a refresh token", an_image, with_a_refresh_token(token_for_a_refresh_token), asked={BLOB_OF_ROOT: 1}),
    Row(
        "a refresh token and a token server elsewhere",
        an_image,
        with_a_refresh_token(token_server_elsewhere),
        SourceUnavailable,
        ["are for the registry's own domain"],
        NO_BLOB,
    ),
    Row(
        "a refresh token and a token server that sends us on",
        an_image,
        with_a_refresh_token(token_server_sends_a_refresh_token_on),
        SourceUnavailable,
        ["HTTP 307"],
        NO_BLOB,
        nobody_else_was_asked,
    ),
]


@pytest.mark.parametrize("row", TOKEN_SERVERS, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
