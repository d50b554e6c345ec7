"""A registry that wants a token, and whoever may learn the password for it."""

from __future__ import annotations

import json

from tests.contract.answers import Answer, basic, bearer, body, only_for
from tests.contract.hostile.images import changed
from tests.contract.hostile.world import BASIC, TOKEN, Check, World

GIVEN = json.dumps({"token": TOKEN}).encode()


def guarded(does: Check, *, token: Answer | None = None, realm: str = "", login: bool = True) -> Check:
    """A registry that wants a token; `token` is what its token server answers, `realm` where that is."""

    def hostile(world: World) -> None:
        if login:
            world.login(world.registry.host, world.tokens.host)
        world.secrets[TOKEN] = {world.registry.host}
        changed()(world)
        world.registry.guard = only_for(f"Bearer {TOKEN}", bearer(realm or world.tokens.url("/token")))
        issue = token or body(GIVEN)
        world.tokens.answers["/token"] = lambda x: (
            issue(x) if x.request.headers.get("authorization") == BASIC else basic()(x)
        )
        does(world)

    return hostile


def nothing_more(world: World) -> None:
    pass


def the_other_did_not_learn_who_we_are(world: World) -> None:
    assert world.other.requests
    assert all("authorization" not in request.headers for request in world.other.requests)
