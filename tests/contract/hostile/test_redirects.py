"""Where an origin sends us: not everywhere, and without a word of who we are."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from systemfiles.foundation.errors import SourceUnavailable
from tests.contract.answers import Answer, Exchange, basic, content, in_turn, redirect, repeated, status, verbatim
from tests.contract.hostile.bombs import gzip_bomb
from tests.contract.hostile.world import (
    BASIC,
    FILE,
    PASSWORD,
    USER,
    Check,
    Row,
    World,
    a_file,
    gives,
    nobody_else_was_asked,
    one_request_to_the_other_without_a_word_of_who_we_are,
    run_row,
)
from tests.contract.origins import tls


def moved(target: Callable[[World], str], sends: Answer | None = None) -> Check:
    """The origin, which wants a password, sends us on; what else it `sends` is for nobody."""

    def hostile(world: World) -> None:
        world.login(world.origin.host)
        head = b"HTTP/1.1 302 Found\r\nContent-Encoding: gzip\r\nLocation: %s\r\n\r\n"

        def answer(x: Exchange) -> None:
            if x.request.headers.get("authorization") != BASIC:
                basic()(x)
                return
            x.send(head % target(world).encode())
            if sends:
                sends(x)

        world.origin.answers["/file"] = answer

    return hostile


def from_https(target: str) -> Check:
    """The origin speaks https, and sends us to `target`, or to what its plain twin has, under this scheme."""

    def hostile(world: World) -> None:
        plain = world.origin.url("/file").partition(":")[2]
        world.https().answers["/file"] = redirect(target if ":" in target else f"{target}:{plain}")

    return hostile


def untrusted_https(world: World) -> None:
    world.https(trusted=False)
    world.monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tls(world.base / "other")[0]))


def now_trusted(world: World) -> None:
    world.monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(world.base / "certificate.pem"))


def two_hosts_with_a_password_each(world: World) -> None:
    world.login(world.origin.host)
    theirs = "Basic " + base64.b64encode(b"we:their-secret").decode()
    world.monkeypatch.setenv(
        "SYSTEMFILES_CREDENTIALS",
        f"{world.origin.host}=basic:{USER}:{PASSWORD} {world.other.host}=basic:we:their-secret",
    )
    world.secrets[theirs] = {world.other.host}
    world.origin.answers["/file"] = redirect(world.other.url("/file"))
    served = content(FILE)
    world.other.answers["/file"] = lambda x: (
        served(x) if x.request.headers.get("authorization") == theirs else basic()(x)
    )


def a_cookie(world: World) -> None:
    world.secrets["biscuit"] = set()
    world.origin.answers["/file"] = in_turn(
        status(503, Set_Cookie="session=biscuit; Path=/"),
        redirect(world.other.url("/file"), Set_Cookie="session=biscuit; Path=/"),
    )


def behind_a_backslash(world: World) -> None:
    """Who splits URLs at the @ reads a host that knows us, and connects to the other."""
    world.login(world.tokens.host)
    world.origin.answers["/file"] = redirect(f"http://{world.other.host}\\@{world.tokens.host}/file")


REDIRECTS = [
    Row("a redirect to itself", a_file, gives(redirect("/file")), SourceUnavailable, ["redirects more"], {"/file": 11}),
    Row("a redirect to a file", a_file, gives(redirect("file:///etc/hostname")), SourceUnavailable, ["file:///etc"]),
    Row("a redirect to data", a_file, gives(redirect("data:,x")), SourceUnavailable, ["data:,x"], {"/file": 1}),
    Row("a redirect to no URL", a_file, gives(redirect("http://[")), SourceUnavailable, ["http://["], {"/file": 1}),
    Row("a redirect to no port", a_file, gives(redirect("http://127.0.0.1:99999/")), SourceUnavailable, ["no URL"]),
    Row(
        "a redirect with a body without end",
        a_file,
        moved(lambda world: world.other.url("/file"), sends=repeated(b"", bytes(65536))),
    ),
    Row(
        "a redirect that is a bomb", a_file, moved(lambda world: world.other.url("/file"), sends=verbatim(gzip_bomb()))
    ),
    Row("a redirect to nowhere", a_file, gives(status(302)), SourceUnavailable, ["HTTP 302"], {"/file": 1}),
    Row("a redirect from https to http", a_file, from_https("http"), SourceUnavailable, ["from https to http"]),
    Row("a redirect from https to HTTP", a_file, from_https("HTTP"), SourceUnavailable, ["from https to http"]),
    Row("a redirect from https to a file", a_file, from_https("file:///etc/passwd"), SourceUnavailable, ["file:///"]),
    Row(
        "a certificate of nobody we trust", a_file, untrusted_https, SourceUnavailable, ["certificate"], {}, now_trusted
    ),
    Row(
        "a redirect to another host",
        a_file,
        moved(lambda world: world.other.url("/file")),
        then=one_request_to_the_other_without_a_word_of_who_we_are,
    ),
    Row("a redirect to another port", a_file, moved(lambda world: world.tokens.url("/file"))),
    Row(
        "a redirect with a name",
        a_file,
        moved(lambda world: f"http://a:b@{world.other.host}/file"),
        SourceUnavailable,
        ["no plain URL"],
        {},
        nobody_else_was_asked,
    ),
    Row(
        "a redirect to a host behind a backslash",
        a_file,
        behind_a_backslash,
        SourceUnavailable,
        ["no plain URL"],
        {"/file": 1},
        nobody_else_was_asked,
    ),
    Row("a redirect between two hosts that know us", a_file, two_hosts_with_a_password_each),
    Row("a cookie", a_file, a_cookie, then=one_request_to_the_other_without_a_word_of_who_we_are),
]


@pytest.mark.parametrize("row", REDIRECTS, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
