"""Who we are: passwords and tokens of registries, and who gets to know them on the way to a layer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from systemfiles.foundation.errors import SourceUnavailable
from tests.contract.answers import Answer, basic, bearer, body, content, only_for, redirect, status
from tests.contract.hostile.guards import guarded, nothing_more, the_other_did_not_learn_who_we_are
from tests.contract.hostile.images import BLOB_OF_ROOT, NO_BLOB, changed
from tests.contract.hostile.world import (
    BASIC,
    PASSWORD,
    ROOT,
    TOKEN,
    Check,
    Row,
    World,
    an_image,
    nobody_else_was_asked,
    run_row,
)
from tests.contract.origins import digest_of


def guarded_by_a_password(login: str) -> Check:
    def hostile(world: World) -> None:
        if login:
            world.login(world.registry.host, secret=login)
        changed()(world)
        world.registry.guard = only_for(BASIC, basic())

    return hostile


def challenge(text: str) -> Check:
    def hostile(world: World) -> None:
        changed()(world)
        world.login(world.registry.host)
        world.registry.guard = lambda request: status(401, WWW_Authenticate=text)

    return hostile


def both_challenges(world: World) -> None:
    text = f'Bearer realm="{world.tokens.url("/token")}",service="x",scope="a:b:pull,push", Basic realm="y"'
    world.registry.guard = only_for(f"Bearer {TOKEN}", status(401, WWW_Authenticate=text))


def never_satisfied(world: World) -> None:
    realm = world.tokens.url("/token")
    world.registry.guard = lambda request: bearer(realm)


def token_expires(world: World) -> None:
    """The first token is good for one request."""
    realm, used = world.tokens.url("/token"), list[str]()
    tokens = iter(range(1000))
    world.tokens.answers["/token"] = lambda x: body(json.dumps({"token": f"t{next(tokens)}"}).encode())(x)

    def guard(request: Any) -> Answer | None:
        authorization = request.headers.get("authorization", "")
        if not authorization.startswith("Bearer ") or (used and authorization == used[0] and len(used) > 1):
            return bearer(realm)
        used.append(authorization)
        return None

    world.registry.guard = guard


def layer_elsewhere(then: Answer) -> Check:
    def hostile(world: World) -> None:
        world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = redirect(world.other.url("/cdn"))
        world.other.answers["/cdn"] = then

    return hostile


def layer_behind_a_backslash(world: World) -> None:
    location = f"http://{world.other.host}\\@{world.registry.host}/cdn"
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = redirect(location)


def layer_at_a_thief(world: World) -> None:
    """It is sent from a host that asks who we are, with a token server of its own."""
    layer_elsewhere(bearer(world.origin.url("/token")))(world)
    world.origin.answers["/token"] = body(json.dumps({"token": "x"}).encode())


def layer_at_another_port(world: World) -> None:
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = redirect(world.origin.url("/cdn"))
    world.origin.answers["/cdn"] = content(ROOT)


def the_origin_was_not_asked(world: World) -> None:
    assert world.origin.requests == []


def few_tokens(world: World) -> None:
    assert len(world.tokens.requests) <= 2


CREDENTIALS = [
    Row("a token", an_image, guarded(nothing_more), asked={BLOB_OF_ROOT: 1, "/manifests/1": 2}, then=few_tokens),
    Row("a token for nobody", an_image, guarded(nothing_more, login=False), SourceUnavailable, ["needs credentials"]),
    Row(
        "a token that is not enough",
        an_image,
        guarded(never_satisfied),
        SourceUnavailable,
        ["not accept"],
        {},
        few_tokens,
    ),
    Row("a token that expires", an_image, guarded(token_expires)),
    Row("a choice of two ways", an_image, guarded(both_challenges)),
    Row("a password", an_image, guarded_by_a_password(PASSWORD), asked={BLOB_OF_ROOT: 1}),
    Row("a password for nobody", an_image, guarded_by_a_password(""), SourceUnavailable, ["needs credentials"]),
    Row("a wrong password", an_image, guarded_by_a_password("guess"), SourceUnavailable, ["not accept"]),
    *(
        Row(
            f"a challenge that is {text[:20]!r}",
            an_image,
            challenge(text),
            SourceUnavailable,
            ["not accept|for a token"],
            NO_BLOB,
        )
        for text in ("", "Negotiate", "Bearer", 'Bearer realm="', "Basic" * 9000, "Bearer " + "a" * 60_000)
    ),
    Row(
        "a layer at another host",
        an_image,
        guarded(layer_elsewhere(content(ROOT))),
        then=the_other_did_not_learn_who_we_are,
    ),
    Row(
        "a layer at a host behind a backslash",
        an_image,
        guarded(layer_behind_a_backslash),
        SourceUnavailable,
        ["no plain URL"],
        {BLOB_OF_ROOT: 1},
        nobody_else_was_asked,
    ),
    Row("a layer at another port", an_image, guarded(layer_at_another_port)),
    Row(
        "a layer at a thief",
        an_image,
        guarded(layer_at_a_thief),
        SourceUnavailable,
        ["HTTP 401"],
        {},
        the_origin_was_not_asked,
    ),
    Row(
        "a layer at a host that wants a password",
        an_image,
        guarded(layer_elsewhere(basic())),
        SourceUnavailable,
        ["HTTP 401"],
        {},
        the_other_did_not_learn_who_we_are,
    ),
]


@pytest.mark.parametrize("row", CREDENTIALS, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
