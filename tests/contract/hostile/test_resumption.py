"""Connections that are cut, and what an origin may make of the rest."""

from __future__ import annotations

import pytest

from systemfiles.foundation.errors import DigestMismatch, SourceUnavailable
from tests.contract.answers import body, content, cut, in_turn, part, status
from tests.contract.hostile.world import CUT, FILE, OTHER, SIZE, Check, Row, World, a_file, gives, run_row
from tests.contract.origins import digest_of


def no_range_in(number: int) -> Check:
    def check(world: World) -> None:
        assert "range" not in world.origin.asked("/file")[number].headers

    return check


def resumed(world: World) -> None:
    again = world.origin.asked("/file")[1].headers
    assert again["range"] == f"bytes={CUT}-"
    assert again["if-range"].startswith('"')


def resumed_again(world: World) -> None:
    ranges = [request.headers.get("range") for request in world.origin.asked("/file")]
    assert ranges == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]


LONG = "9" * 5000
RESUMPTION = [
    Row("a cut connection", a_file, gives(in_turn(cut(FILE, CUT), content(FILE))), None, [], {"/file": 2}, resumed),
    Row("a connection that is cut twice", a_file, gives(in_turn(cut(FILE, CUT), cut(FILE, CUT), content(FILE)))),
    Row("Range ignored", a_file, gives(in_turn(cut(FILE, CUT), body(FILE))), None, [], {"/file": 2}, resumed),
    Row(
        "a cut connection without an ETag",
        a_file,
        gives(in_turn(body(FILE[:CUT], length=SIZE), body(FILE))),
        asked={"/file": 2},
        then=no_range_in(1),
    ),
    Row(
        "a cut connection with a weak ETag",
        a_file,
        gives(in_turn(cut(FILE, CUT, etag='W/"1"'), content(FILE))),
        asked={"/file": 2},
        then=no_range_in(1),
    ),
    Row(
        "another range than was asked for",
        a_file,
        gives(in_turn(cut(FILE, CUT), part(FILE[50_000:], f"bytes 50000-{SIZE - 1}/{SIZE}"), content(FILE))),
        asked={"/file": 3},
        then=no_range_in(2),
    ),
    *(
        Row(
            f"a range that is none ({value[:20]!r})",
            a_file,
            gives(in_turn(cut(FILE, CUT), part(FILE[CUT:], value), content(FILE))),
            asked={"/file": 3},
            then=no_range_in(2),
        )
        for value in ("", "bytes */300000", "100000-299999", f"bytes {LONG}-{LONG}/{LONG}", "bytes -1-5/6")
    ),
    Row(
        "a part of it unasked",
        a_file,
        gives(part(FILE[9:], f"bytes 9-{SIZE - 1}/{SIZE}")),
        SourceUnavailable,
        ["range"],
    ),
    Row(
        "less than the rest",
        a_file,
        gives(
            in_turn(
                cut(FILE, CUT, etag='"1"'),
                part(FILE[CUT : 2 * CUT], f"bytes {CUT}-{2 * CUT - 1}/{SIZE}", ETag='"1"'),
                content(FILE, etag='"1"'),
            )
        ),
        asked={"/file": 3},
        then=resumed_again,
    ),
    Row(
        "416 when it should go on",
        a_file,
        gives(in_turn(cut(FILE, CUT), status(416), content(FILE))),
        asked={"/file": 3},
        then=no_range_in(2),
    ),
    Row("416 at once", a_file, gives(status(416)), SourceUnavailable, ["HTTP 416"], {"/file": 1}),
    Row("another file in between", a_file, gives(in_turn(cut(OTHER, CUT), content(FILE))), asked={"/file": 2}),
    Row(
        "another file in between, and If-Range ignored",
        a_file,
        gives(in_turn(cut(OTHER, CUT), part(FILE[CUT:], f"bytes {CUT}-{SIZE - 1}/{SIZE}"), content(FILE))),
        asked={"/file": 3},
        then=no_range_in(2),
    ),
    Row(
        "a longer file in between, and If-Range ignored",
        a_file,
        gives(in_turn(cut(OTHER, CUT), part(FILE, f"bytes {CUT}-{SIZE + CUT - 1}/{SIZE + CUT}"), content(FILE))),
        asked={"/file": 3},
        then=no_range_in(2),
    ),
    Row(
        "another file every time, and If-Range ignored",
        a_file,
        gives(in_turn(*[cut(OTHER, CUT), part(FILE[CUT:], f"bytes {CUT}-{SIZE - 1}/{SIZE}")] * 2)),
        DigestMismatch,
        [digest_of(FILE)],
        {"/file": 4},
    ),
]


@pytest.mark.parametrize("row", RESUMPTION, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
