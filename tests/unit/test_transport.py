"""The rules of every request: what a host is, how often and when to try again, where one may be sent to."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from hypothesis import example, given
from hypothesis import strategies as st
from urllib3.util import parse_url

from systemfiles.foundation.errors import SourceRefused
from systemfiles.foundation.units import printable
from systemfiles.sources.transport import (
    BOUNDS,
    Answered,
    Bounds,
    Interrupted,
    Transport,
    Unreachable,
    following,
    host_of,
    is_loopback,
    reason,
)
from tests.contract.answers import (
    Answer,
    Exchange,
    body,
    content,
    in_turn,
    redirect,
    repeated,
    reset,
    status,
    verbatim,
)
from tests.contract.origins import Origin

QUICK = Bounds(connect=1, read=0.3, total=2, attempts=3, pause=0.01)


@pytest.fixture
def origin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Origin]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with contextlib.closing(Origin()) as running:
        yield running


# hosts


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Example.COM/x", "example.com"),
        ("https://example.com:443/x", "example.com"),
        ("http://example.com:80", "example.com"),
        ("http://example.com:443", "example.com:443"),
        ("https://example.com:8443/x?y#z", "example.com:8443"),
        ("HTTPS://EXAMPLE.COM:443/", "example.com"),
        ("https://example.com/a@b", "example.com"),
        ("https://@example.com/", "example.com"),
        ("https://example.com?a@b", "example.com"),
        ("https://example.com#a@b", "example.com"),
        ("https://[2001:db8::1]/", "[2001:db8::1]"),
        ("http://[::1]:5000/", "[::1]:5000"),
        ("http:///x", ""),
        ("", ""),
    ],
)
def test_a_host_is_a_name_and_a_port_that_is_not_the_usual_one(url: str, host: str) -> None:
    assert host_of(url) == host


@pytest.mark.parametrize(
    "url", ["http://[", "http://[::1", "http://h:99999/", "http://h:x/", "http://h:-1/", "http://{/", "http://%40/"]
)
def test_what_is_no_url_has_no_host(url: str) -> None:
    with pytest.raises(SourceRefused, match="no URL"):
        host_of(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:pass@example.com:8443/",
        "https://example.com@evil.net/",
        "https://evil.net\\@example.com/",
        "https://evil.net\\.example.com/",
        "https://example.com/a\\b",
        "https://example.com/\n",
        "https://exam\tple.com/",
        "https://example.com\0.evil.net/",
        "https://example.com/\u2028",
    ],
)
def test_what_one_reader_may_read_otherwise_than_another_has_no_host(url: str) -> None:
    with pytest.raises(SourceRefused, match=r"no plain URL|no URL"):
        host_of(url)


SIGNS = ["//", "/", ":", "@", "\\", "?", "#", "[", "]", "%", "%40", "%2f", ".", " ", "\t", "\n", ";", "\uff0f"]
WORDS = ["%61", "one.example", "TWO.example", "127.0.0.1", "::1", "80", "443", "5000", "b\xfccher", "x"]
PIECES = st.sampled_from(["http://", "https://", *SIGNS, *WORDS])


@given(st.lists(PIECES, max_size=9).map("".join) | st.text(max_size=30).map("http://".__add__) | st.text(max_size=30))
@example("https://evil.net\\@example.com/")
@example(" https://example.com/")
def test_a_host_is_the_one_that_would_be_connected_to(url: str) -> None:
    """Whatever reads URLs on the way there: none may be told what is for another."""
    try:
        host = host_of(url)
        prepared = requests.Request("GET", url).prepare().url
    except (SourceRefused, requests.RequestException, ValueError):
        return
    asked, connected = parse_url(prepared or ""), urlsplit(prepared or "")
    if connected.scheme not in ("http", "https"):
        return  # nobody connects to it
    usual = {"http": 80, "https": 443}[connected.scheme]
    assert asked.host
    assert host == asked.host.lower() + ("" if asked.port in (None, usual) else f":{asked.port}")
    assert asked.host.strip("[]").lower() == (connected.hostname or "").lower()
    assert asked.port == connected.port


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:5000", "127.0.0.1", "127.0.0.1:5000", "127.9.9.9", "::1", "[::1]", "[::1]:5000"],
)
def test_this_machine_is_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "127.example.com",
        "127.0.0.1.example.com",
        "127.0.0.1.example.com:5000",
        "localhost.example.com",
        "notlocalhost",
        "0.0.0.0",
        "10.0.0.1:5000",
        "128.0.0.1",
        "[2001:db8::1]:5000",
        "::2",
        "",
        ":5000",
    ],
)
def test_no_other_host_is_loopback_whatever_it_calls_itself(host: str) -> None:
    assert not is_loopback(host)


# where an answer may send us


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/x", "https://h/x"),
        ("x?y", "https://h/a/x?y"),
        ("", "https://h/a/b"),
        ("//other/x", "https://other/x"),
        ("https://other:8443/x", "https://other:8443/x"),
    ],
)
def test_a_location_is_relative_to_where_it_was_said(location: str, target: str) -> None:
    assert following("https://h/a/b", location) == target


def test_http_may_become_https() -> None:
    assert following("http://h/", "https://h/") == "https://h/"


@pytest.mark.parametrize(
    "location",
    [
        "http://h/",
        "HTTP://h/",
        "file:///etc/passwd",
        "ftp://h/",
        "data:,x",
        "javascript:x",
        "http://[",
        "x:",
        "\tfile:/x",
    ],
)
def test_nothing_else_is_followed(location: str) -> None:
    with pytest.raises(SourceRefused, match="sends us"):
        following("https://h/a", location)


# words


@given(st.text())
def test_whatever_an_origin_says_becomes_one_short_printable_line(text: str) -> None:
    assert printable(text).isprintable()
    assert len(printable(text)) <= 200


def test_the_reason_is_the_first_cause() -> None:
    error = requests.ConnectionError("x")
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert reason(error) == "Connection refused"


@pytest.mark.parametrize("busy_with", [KeyError("vm-7: password=hunter2"), ConnectionResetError(104, "reset")])
def test_the_reason_is_nothing_that_the_caller_was_busy_with(busy_with: Exception) -> None:
    error = requests.ConnectionError("x")
    error.__context__ = busy_with
    assert reason(error) == "x"


def test_a_cause_without_words_is_named() -> None:
    assert reason(EOFError()) == "EOFError"


# requests


def get(origin: Origin, path: str = "/x", *, method: str = "GET", bounds: Bounds = QUICK) -> bytes:
    transport = Transport(bounds)
    with transport.open(method, origin.url(path)) as response:
        return b"".join(transport.body(response, time.monotonic() + bounds.total))


def test_a_body_is_what_was_sent(origin: Origin) -> None:
    data = bytes(range(256)) * 5000
    origin.answers["/x"] = content(data)
    assert get(origin) == data
    assert origin.requests[0].headers["accept-encoding"] == "identity"


def test_each_hop_is_asked_about_by_itself(origin: Origin) -> None:
    origin.answers.update({"/a": redirect("/b"), "/b": redirect("/c"), "/c": content(b"1")})
    asked: list[str] = []

    def authorization(url: str) -> str | None:
        asked.append(url)
        return "Basic secret" if url.endswith("/b") else None

    with Transport(QUICK).open("GET", origin.url("/a"), authorization=authorization):
        pass
    assert asked == [origin.url("/a"), origin.url("/b"), origin.url("/c")]
    assert [request.headers.get("authorization") for request in origin.requests] == [None, "Basic secret", None]


def test_a_netrc_entry_is_not_added_behind_our_back(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b")
    monkeypatch.setenv("NETRC", str(netrc))
    origin.answers.update({"/x": redirect("/y"), "/y": content(b"1")})
    get(origin)
    assert all("authorization" not in request.headers for request in origin.requests)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_what_changes_something_follows_no_redirect_and_has_failed(origin: Origin, method: str) -> None:
    origin.answers.update({"/x": redirect("/y", 307), "/y": content(b"1")})
    with pytest.raises(Answered, match=r"HTTP 307|HTTP 501"), Transport(QUICK).open(method, origin.url("/x")):
        pass
    assert not [request for request in origin.requests if request.path == "/y"]


def test_head_follows_redirects(origin: Origin) -> None:
    origin.answers.update({"/x": redirect("/y"), "/y": content(b"1")})
    assert get(origin, method="HEAD") == b""
    assert [request.method for request in origin.requests] == ["HEAD", "HEAD"]


def test_an_answer_says_who_gave_it(origin: Origin) -> None:
    origin.answers["/x"] = redirect("/gone")
    with pytest.raises(Answered) as caught:
        get(origin)
    assert (caught.value.status, caught.value.url) == (404, origin.url("/gone"))


def test_as_many_redirects_are_followed_as_bounds_allow(origin: Origin) -> None:
    origin.answers["/x"] = in_turn(redirect("/x"), redirect("/x"), content(b"1"))
    assert get(origin, bounds=Bounds(redirects=2)) == b"1"
    origin.answers["/x"] = in_turn(redirect("/x"), redirect("/x"), content(b"1"))
    with pytest.raises(SourceRefused, match="more than 1 times"):
        get(origin, bounds=Bounds(redirects=1))


@pytest.mark.parametrize(
    "answer",
    [
        repeated(b"HTTP/1.1 200 OK\r\nA: ", b"x", 0.02),
        repeated(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", b"x", 0.02),
        repeated(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x", 0.02),
        repeated(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
        repeated(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        repeated(b"", b"", 0.02),
    ],
    ids=["head", "body", "frame", "trailers", "continue", "silence"],
)
def test_an_answer_that_takes_for_ever_is_given_up_in_time(origin: Origin, answer: Answer) -> None:
    origin.answers["/x"] = answer
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        get(origin)
    assert time.monotonic() - begun < 3


def test_a_slow_and_steady_answer_is_not_given_up(origin: Origin) -> None:
    """It takes longer in all than it may be silent."""

    def steady(x: Exchange) -> None:
        x.head(200, [("Content-Length", 8000)])
        for _ in range(8):
            x.send(bytes(1000))
            time.sleep(0.1)

    origin.answers["/x"] = steady
    assert len(get(origin)) == 8000


def test_a_body_takes_no_longer_than_all_of_it_may(origin: Origin) -> None:
    origin.answers["/x"] = repeated(b"HTTP/1.1 200 OK\r\n\r\n", bytes(5000), 0.01)
    with pytest.raises(Interrupted, match=r"longer than 0\.5 s"):
        get(origin, bounds=Bounds(read=5, total=0.5))


def test_one_connection_serves_again_when_an_answer_was_read_to_its_end() -> None:
    """And after that its time-out is the whole of it again."""
    bounds = Bounds(read=0.6)
    with contextlib.closing(Origin()) as origin:
        origin.answers["/x"] = content(b"1")
        transport = Transport(bounds)
        for pause in (0.4, 0.4):
            time.sleep(pause)
            with transport.open("GET", origin.url("/x")) as response:
                assert b"".join(transport.body(response, time.monotonic() + 1)) == b"1"


def test_threads_may_share_a_transport(origin: Origin) -> None:
    origin.answers["/x"] = content(bytes(100_000))
    transport, sizes = Transport(QUICK), list[int]()

    def work() -> None:
        with transport.open("GET", origin.url("/x")) as response:
            sizes.append(len(b"".join(transport.body(response, time.monotonic() + 5))))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [100_000] * 8


def test_a_proxy_may_not_trickle_either(origin: Origin) -> None:
    origin.answers["http://archive.invalid/x"] = repeated(b"HTTP/1.1 200 OK\r\nA: ", b"x", 0.02)
    transport = Transport(QUICK, proxies={"http": origin.url()})
    with pytest.raises(Interrupted), transport.open("GET", "http://archive.invalid/x"):
        pass


def test_what_the_caller_is_busy_with_has_nothing_to_do_with_it(origin: Origin) -> None:
    """Neither its words nor its kind: a closed port is one while a reset is handled, and the other way round."""
    origin.answers["/x"] = reset
    try:
        raise KeyError(origin)
    except KeyError:
        with pytest.raises(Interrupted, match="reset by peer"):
            get(origin)
    origin.close()
    try:
        raise ConnectionResetError(errno.ECONNRESET, origin)
    except ConnectionResetError:
        with pytest.raises(Unreachable, match="Connection refused"):
            get(origin)


def test_an_error_page_of_any_length_is_not_read(origin: Origin) -> None:
    origin.answers["/x"] = repeated(b"HTTP/1.1 404 Not Found\r\n\r\n", bytes(65536))
    with pytest.raises(Answered, match="HTTP 404"):
        get(origin)


@pytest.mark.parametrize("answer", [body(b"x", 204), status(304), verbatim(b"HTTP/1.1 300 M\r\n\r\n")])
def test_an_answer_without_a_body_to_speak_of_is_no_success_or_an_empty_one(origin: Origin, answer: Answer) -> None:
    origin.answers["/x"] = answer
    with contextlib.suppress(Answered):
        assert get(origin) == b""


def test_the_usual_bounds_are_patient_enough_for_people_and_not_for_ever() -> None:
    assert BOUNDS.connect <= 10
    assert 10 <= BOUNDS.read <= 60
    assert BOUNDS.longest_pause <= 120
    assert BOUNDS.total <= 24 * 3600
