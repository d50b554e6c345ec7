"""Files: wrong bytes, bodies without an end, answers that are none, and mirrors that lie."""

from __future__ import annotations

import gzip
import time
from email.utils import formatdate

import pytest

from systemfiles.foundation.errors import DigestMismatch, SizeMismatch, SourceError, SourceUnavailable
from tests.contract.answers import (
    Answer,
    Exchange,
    basic,
    body,
    chunked,
    content,
    in_turn,
    repeated,
    reset,
    silent,
    status,
    verbatim,
)
from tests.contract.hostile.world import (
    CHUNKS,
    FILE,
    HTML,
    LARGEST,
    OK,
    OTHER,
    SIZE,
    Check,
    Row,
    World,
    a_file,
    gives,
    of_unknown_size,
    one_request_to_the_other_without_a_word_of_who_we_are,
    run_row,
)
from tests.contract.origins import Origin, digest_of


def waited(seconds: float) -> Check:
    def check(world: World) -> None:
        first, second = world.origin.asked("/file")
        assert second.at - first.at >= seconds

    return check


def busy_until_a_date(x: Exchange) -> None:
    status(429, Retry_After=formatdate(time.time() + 2, usegmt=True))(x)


def with_a_login(answer: Answer) -> Check:
    def hostile(world: World) -> None:
        world.login(world.origin.host)
        gives(answer)(world)

    return hostile


def a_lying_mirror(world: World) -> None:
    world.login(world.origin.host)
    world.mirrors = {world.origin.url(): [world.other.url()]}
    world.other.answers["/file"] = content(OTHER)


def a_mirror_that_asks_who_we_are(world: World) -> None:
    a_lying_mirror(world)
    world.other.answers["/file"] = basic()


def a_closed_port(world: World) -> None:
    gone = Origin()
    gone.close()
    world.url = gone.url("/file")


def back_at_the_origin(world: World) -> None:
    world.url = world.origin.url("/file")


LONG = "9" * 5000
FILES = [
    Row(
        "another file of the same size",
        a_file,
        gives(content(OTHER)),
        DigestMismatch,
        ["{origin}/file", digest_of(FILE), digest_of(OTHER), "it was discarded"],
        {"/file": 1},
    ),
    Row("a file one byte short", a_file, gives(content(FILE[:-1])), SizeMismatch, ["300000 bytes", "299999 bytes"]),
    Row("a file one byte longer", a_file, gives(content(FILE + b"x")), SizeMismatch, ["300000 bytes"]),
    Row("nothing at all", a_file, gives(content(b"")), SizeMismatch, ["0 bytes"]),
    Row("a web page with 200", a_file, gives(body(HTML, Content_Type="text/html")), SizeMismatch, ["54 bytes"]),
    Row("a web page, size unknown", a_file, of_unknown_size(body(HTML)), DigestMismatch, [digest_of(HTML)]),
    Row("a body that breaks off", a_file, gives(body(FILE[:1000], length=SIZE)), SourceUnavailable, [], {"/file": 3}),
    Row("less than it announces", a_file, of_unknown_size(body(FILE, length=SIZE + 1)), SourceUnavailable),
    Row("more than it announces", a_file, gives(body(FILE, length=1000)), SizeMismatch, ["1000 bytes"]),
    Row("chunks that break off", a_file, gives(chunked(FILE, ending=b"")), SourceUnavailable, [], {"/file": 3}),
    Row("half a chunk", a_file, gives(verbatim(CHUNKS + b"fffff\r\n" + FILE[:9])), SourceUnavailable),
    Row("chunks of no size", a_file, gives(verbatim(CHUNKS + b"x\r\n")), SourceUnavailable),
    Row("a negative chunk", a_file, gives(verbatim(CHUNKS + b"-5\r\n" + FILE)), SourceError),
    Row("an endless body", a_file, gives(repeated(OK + b"\r\n", bytes(65536))), SizeMismatch, ["300000 bytes"]),
    Row("endless chunks", a_file, gives(repeated(CHUNKS, b"10000\r\n" + bytes(65536) + b"\r\n")), SizeMismatch),
    Row(
        "an endless body, size unknown",
        a_file,
        of_unknown_size(repeated(OK + b"\r\n", bytes(65536))),
        SizeMismatch,
        [f"{LARGEST} bytes"],
    ),
    Row(
        "a trickling body",
        a_file,
        gives(repeated(OK + b"Content-Length: 300000\r\n\r\n", b"0123456789", 0.02)),
        SourceUnavailable,
        ["only"],
        {"/file": 3},
    ),
    Row("a trickling head", a_file, gives(repeated(OK + b"A: ", b"x", 0.02)), SourceUnavailable, [], {"/file": 3}),
    Row("a trickling frame", a_file, gives(repeated(CHUNKS + b"1;", b"x", 0.02)), SourceUnavailable),
    Row("one 100 Continue after another", a_file, gives(repeated(b"", b"HTTP/1.1 100 Go\r\n\r\n")), SourceUnavailable),
    Row("trailers without end", a_file, gives(repeated(CHUNKS + b"1\r\nx\r\n0\r\n", b"A: b\r\n")), SourceUnavailable),
    Row("headers without end", a_file, gives(repeated(OK, b"A: b\r\n")), SourceUnavailable),
    Row("a header without end", a_file, gives(repeated(OK + b"A: ", bytes(65536))), SourceUnavailable),
    Row("silence", a_file, gives(silent), SourceUnavailable, ["silent"], {"/file": 3}),
    Row("a reset connection", a_file, gives(reset), SourceUnavailable, ["reset by peer"], {"/file": 3}),
    Row("a closed connection", a_file, gives(verbatim()), SourceUnavailable, [], {"/file": 3}),
    Row("another protocol", a_file, gives(verbatim(b"SSH-2.0-x\r\n\0\xff\r\n\r\n")), SourceUnavailable),
    Row("paint for the terminal", a_file, gives(verbatim(b"HTTP/1.1 404 \x1b[2J\x07well\r\n\r\n")), SourceUnavailable),
    Row("nobody listens", a_file, a_closed_port, SourceUnavailable, ["refused"], {}, back_at_the_origin),
    # answers that are none
    Row("401 for nobody", a_file, gives(basic()), SourceUnavailable, ["{origin}/file: HTTP 401"], {"/file": 1}),
    Row("401 for ever", a_file, with_a_login(basic()), SourceUnavailable, ["HTTP 401"], {"/file": 1}),
    Row("403", a_file, gives(status(403, HTML)), SourceUnavailable, ["{origin}/file: HTTP 403"], {"/file": 1}),
    Row("404", a_file, gives(status(404, HTML)), SourceUnavailable, ["{origin}/file: HTTP 404"], {"/file": 1}),
    Row("410", a_file, gives(status(410, HTML)), SourceUnavailable, ["{origin}/file: HTTP 410"], {"/file": 1}),
    Row("501", a_file, gives(status(501)), SourceUnavailable, ["HTTP 501"], {"/file": 1}),
    Row("204", a_file, gives(status(204)), SourceUnavailable, ["HTTP 204"], {"/file": 1}),
    Row("304", a_file, gives(status(304)), SourceUnavailable, ["HTTP 304"], {"/file": 1}),
    Row("an unknown status", a_file, gives(status(799)), SourceUnavailable, ["HTTP 799"], {"/file": 1}),
    Row("429 for a second", a_file, gives(in_turn(status(429, Retry_After="1"), content(FILE))), then=waited(1)),
    Row("429 until a date", a_file, gives(in_turn(busy_until_a_date, content(FILE))), then=waited(0.5)),
    Row("429 for an hour", a_file, gives(status(429, Retry_After="3600")), SourceUnavailable, ["429"], {"/file": 1}),
    Row("429 for longer than time", a_file, gives(status(429, Retry_After=LONG)), SourceUnavailable, [], {"/file": 1}),
    Row(
        "503 until the last date there is",
        a_file,
        gives(status(503, Retry_After="Fri, 31 Dec 9999 23:59:59 GMT")),
        SourceUnavailable,
        ["HTTP 503"],
        {"/file": 1},
    ),
    Row("429 until soon", a_file, gives(in_turn(status(429, Retry_After="soon"), content(FILE))), asked={"/file": 2}),
    Row("429 until yesterday", a_file, gives(in_turn(status(429, Retry_After="-5"), content(FILE)))),
    Row("429 for ever", a_file, gives(status(429)), SourceUnavailable, ["HTTP 429"], {"/file": 3}),
    Row("500, 503, then well", a_file, gives(in_turn(status(500), status(503), content(FILE))), asked={"/file": 3}),
    Row("500 for ever", a_file, gives(status(500, HTML)), SourceUnavailable, ["HTTP 500"], {"/file": 3}),
    # the rest
    Row("gzip", a_file, gives(body(gzip.compress(FILE), Content_Encoding="gzip")), SourceUnavailable, ["encoded"]),
    Row("an unknown encoding", a_file, gives(body(FILE, Content_Encoding="x\x1b")), SourceUnavailable, ["encoded"]),
    *(
        Row(f"a length that is none ({value[:9]!r})", a_file, gives(body(FILE, length=value)))
        for value in ("²".encode().decode("latin-1"), LONG, "-1", "0x10", "")
    ),
    Row("a mirror that lies", a_file, a_lying_mirror, then=one_request_to_the_other_without_a_word_of_who_we_are),
    Row(
        "a mirror that asks who we are",
        a_file,
        a_mirror_that_asks_who_we_are,
        then=one_request_to_the_other_without_a_word_of_who_we_are,
    ),
]


@pytest.mark.parametrize("row", FILES, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
