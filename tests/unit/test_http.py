"""Downloads from real servers on this machine: right bytes from wherever has them, or one error that says why not."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import DigestMismatch, IntegrityError, SizeMismatch, SourceUnavailable
from systemfiles.foundation.files import NewFile
from systemfiles.sources import http
from systemfiles.sources.http import candidates, fetch
from systemfiles.sources.transport import Bounds

DATA = os.urandom(3 << 20)
DIGEST = Digest.of(DATA)
IMPATIENT = Bounds(connect=2, read=2, total=10, attempts=3, pause=0.01)
HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"

Answer = Callable[[BaseHTTPRequestHandler], None]


def answer(body: bytes = DATA, *, status: int = 200, length: int | None = None, **headers: str) -> Answer:
    """An answer with this body; `length` is what its Content-Length claims."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.send_header("Connection", "close")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return send


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):  # the client hangs up
        while True:
            handler.wfile.write(bytes(1 << 16))


def endless_chunks(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


def cut_chunks(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"10\r\n0123456789abcdef\r\n10\r\n0123")


def nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\x00\xff\r\n\r\n")


def nothing_at_all(handler: BaseHTTPRequestHandler) -> None:
    pass


def painted(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 404 \x1b[2J\x1b[31mall is well\x07\r\nContent-Length: 0\r\n\r\n")


class Origin:
    """A web server on a free port of this machine; `asked` holds the paths it was asked for."""

    def __init__(self, **answers: Answer) -> None:
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                origin.asked.append(self.path)
                origin.headers.append({name.lower(): value for name, value in self.headers.items()})
                self.close_connection = True
                answers.get(self.path.strip("/"), answer(b"nothing here", status=404))(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{path}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., Origin]]:
    with contextlib.ExitStack() as stack:

        def start(**answers: Answer) -> Origin:
            origin = Origin(**answers)
            stack.callback(origin.close)
            return origin

        yield start


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "tmp"


Serve = Callable[..., Origin]


def download(
    scratch: Path, url: str, *, digest: Digest = DIGEST, size: int | None = len(DATA), **options: object
) -> tuple[str, bytes]:
    """Where the bytes came from, and the bytes; afterwards nothing is left in scratch."""
    try:
        with NewFile(scratch) as out:
            came_from = fetch(url, out, subject="kernel k1", digest=digest, size=size, bounds=IMPATIENT, **options)  # type: ignore[arg-type]
            return came_from, out.path.read_bytes()
    finally:
        assert list(scratch.iterdir()) == []


def refused(scratch: Path, url: str, **options: object) -> SourceUnavailable:
    with pytest.raises(SourceUnavailable) as caught:
        download(scratch, url, **options)  # type: ignore[arg-type]
    return caught.value


# right bytes


@pytest.mark.parametrize("size", [len(DATA), None], ids=["known size", "unknown size"])
def test_the_right_bytes_are_delivered_with_where_they_came_from(serve: Serve, scratch: Path, size: int | None) -> None:
    origin = serve(vmlinux=answer())
    assert download(scratch, origin.url("vmlinux"), size=size) == (origin.url("vmlinux"), DATA)


def test_progress_counts_every_byte(serve: Serve, scratch: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    download(scratch, serve(vmlinux=answer()).url("vmlinux"), progress=lambda *step: seen.append(step))
    assert {(subject, total) for subject, _, total in seen} == {("kernel k1", len(DATA))}
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == len(DATA)
    assert len(counts) >= 3


def test_whoever_watches_may_cancel(serve: Serve, scratch: Path) -> None:
    def cancel(subject: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(scratch, serve(vmlinux=answer()).url("vmlinux"), progress=cancel)


def test_bytes_are_asked_for_as_they_are_stored(serve: Serve, scratch: Path) -> None:
    origin = serve(vmlinux=answer())
    download(scratch, origin.url("vmlinux"))
    assert origin.headers[0]["accept-encoding"] == "identity"
    assert origin.headers[0]["user-agent"].startswith("systemfiles/")


def test_bytes_that_a_server_packs_all_the_same_are_not_unpacked(serve: Serve, scratch: Path) -> None:
    bomb = gzip.compress(bytes(8 << 20))
    origin = serve(vmlinux=answer(bomb, Content_Encoding="gzip"))
    with pytest.raises((SourceUnavailable, IntegrityError)):
        download(scratch, origin.url("vmlinux"), digest=Digest.of(bytes(8 << 20)), size=8 << 20)


def test_redirects_are_followed(serve: Serve, scratch: Path) -> None:
    storage = serve(vmlinux=answer())
    origin = serve(vmlinux=answer(b"", status=302, Location=storage.url("vmlinux")))
    assert download(scratch, origin.url("vmlinux")) == (origin.url("vmlinux"), DATA)


# wrong bytes


def test_other_bytes_of_the_right_size_are_refused(serve: Serve, scratch: Path) -> None:
    wrong = bytes(len(DATA))
    with pytest.raises(DigestMismatch) as caught:
        download(scratch, serve(vmlinux=answer(wrong)).url("vmlinux"))
    assert (caught.value.expected, caught.value.got) == (DIGEST, Digest.of(wrong))
    assert "it was discarded" in str(caught.value)


@pytest.mark.parametrize("body", [b"", DATA[:-1], HTML])
def test_too_few_bytes_are_refused(serve: Serve, scratch: Path, body: bytes) -> None:
    with pytest.raises(SizeMismatch) as caught:
        download(scratch, serve(vmlinux=answer(body)).url("vmlinux"))
    assert (caught.value.expected, caught.value.got) == (f"{len(DATA)} bytes", f"{len(body)} bytes")


def test_one_byte_too_many_is_refused(serve: Serve, scratch: Path) -> None:
    with pytest.raises(SizeMismatch):
        download(scratch, serve(vmlinux=answer(DATA + b"x")).url("vmlinux"))


def test_a_web_page_in_place_of_the_file_is_refused(serve: Serve, scratch: Path) -> None:
    page = answer(HTML, Content_Type="text/html")
    with pytest.raises(DigestMismatch):
        download(scratch, serve(vmlinux=page).url("vmlinux"), size=None)


@pytest.mark.parametrize("body", [endless, endless_chunks])
def test_an_endless_body_ends_at_the_expected_size(serve: Serve, scratch: Path, body: Answer) -> None:
    written: list[int] = []
    with pytest.raises(SizeMismatch):
        download(scratch, serve(x=body).url("x"), size=1 << 20, progress=lambda _, done, __: written.append(done))
    assert max(written, default=0) <= 1 << 20


def test_an_endless_body_of_unknown_size_ends_too(serve: Serve, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LARGEST", 2 << 20)
    with pytest.raises(IntegrityError):
        download(scratch, serve(x=endless).url("x"), size=None)


# no bytes


@pytest.mark.parametrize("status", [403, 404, 410])
def test_an_error_page_is_unavailable_and_its_status_is_said(serve: Serve, scratch: Path, status: int) -> None:
    url = serve(x=answer(HTML, status=status)).url("x")
    error = refused(scratch, url, hint="use a mirror")
    ((where, why),) = error.tried
    assert where == url
    assert f"HTTP {status}" in why
    assert (error.subject, error.hint) == ("kernel k1", "use a mirror")


def test_a_failing_server_is_unavailable_and_its_status_is_said(serve: Serve, scratch: Path) -> None:
    error = refused(scratch, serve(x=answer(HTML, status=500)).url("x"))
    assert "HTTP 500" in error.tried[0][1]


@pytest.mark.parametrize(
    "body",
    [answer(DATA[:1000], length=len(DATA)), cut_chunks, nonsense, nothing_at_all, painted],
    ids=["cut off", "cut chunks", "nonsense", "nothing", "painted"],
)
def test_whatever_else_a_server_says_is_unavailable_and_told_in_one_printable_line(
    serve: Serve, scratch: Path, body: Answer
) -> None:
    error = refused(scratch, serve(x=body).url("x"))
    ((_, why),) = error.tried
    assert why.isprintable()
    assert 0 < len(why) < 200


@pytest.mark.parametrize("size", [len(DATA), None], ids=["known size", "unknown size"])
def test_a_truncated_body_is_never_taken_for_a_whole_one(serve: Serve, scratch: Path, size: int | None) -> None:
    """Even when its digest is that of the truncated bytes."""
    part = DATA[:1000]
    url = serve(x=answer(part, length=len(DATA))).url("x")
    with pytest.raises((SourceUnavailable, IntegrityError)):
        download(scratch, url, digest=Digest.of(part), size=size)


def test_a_refused_connection_says_why_in_one_line(scratch: Path, closed_port: int) -> None:
    error = refused(scratch, f"http://127.0.0.1:{closed_port}/x", hint="use a mirror")
    assert str(error) == (
        "kernel k1 could not be fetched\n"
        f"  tried  http://127.0.0.1:{closed_port}/x: Connection refused\n"
        "  hint   use a mirror"
    )


def test_a_loop_of_redirects_ends(serve: Serve, scratch: Path) -> None:
    origin = serve(x=answer(b"", status=302, Location="/x"))
    assert "redirect" in refused(scratch, origin.url("x")).tried[0][1].lower()


@pytest.mark.parametrize("target", ["file:///etc/hostname", "gopher://x/", "http://[", "//"])
def test_a_redirect_to_something_else_is_not_followed(serve: Serve, scratch: Path, target: str) -> None:
    refused(scratch, serve(x=answer(b"", status=302, Location=target)).url("x"))


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999/x", "http:///x", "http://%/x", "http://.x/"])
def test_a_url_that_is_none_is_unavailable(scratch: Path, url: str) -> None:
    assert refused(scratch, url).tried[0][0] == url


@pytest.mark.parametrize(
    "wait",
    ["\xb2", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 -2359", "Fri, 99 Foo 0000 99:99:99 +9999", "-1", "nan", "1e9"],
    ids=lambda wait: wait[:20],
)
def test_a_server_that_asks_to_wait_in_nonsense_is_unavailable(serve: Serve, scratch: Path, wait: str) -> None:
    origin = serve(x=answer(b"", status=503, Retry_After=wait))
    assert "HTTP 503" in refused(scratch, origin.url("x")).tried[0][1]


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000, "-1", "12, 12", "0x10"], ids=lambda length: length[:6])
def test_a_length_that_is_none_changes_nothing_or_is_unavailable(serve: Serve, scratch: Path, length: str) -> None:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", length)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(DATA)

    with contextlib.suppress(SourceUnavailable, IntegrityError):
        assert download(scratch, serve(x=send).url("x"))[1] == DATA


# files


def test_a_file_url_is_copied(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "a kernel ü%.bin"
    path.write_bytes(DATA)
    assert download(scratch, path.as_uri()) == (path.as_uri(), DATA)


def test_a_file_that_is_not_there_is_unavailable(tmp_path: Path, scratch: Path) -> None:
    error = refused(scratch, (tmp_path / "nowhere").as_uri())
    assert "No such file or directory" in error.tried[0][1]


def test_a_directory_is_unavailable(tmp_path: Path, scratch: Path) -> None:
    assert "directory" in refused(scratch, tmp_path.as_uri()).tried[0][1]


def test_a_file_with_other_bytes_is_refused(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(len(DATA)))
    with pytest.raises(DigestMismatch):
        download(scratch, (tmp_path / "x").as_uri())


def test_a_device_without_end_ends_at_the_expected_size(scratch: Path) -> None:
    with pytest.raises(SizeMismatch):
        download(scratch, "file:///dev/zero", size=1 << 20)


@pytest.mark.parametrize("url", ["file://[x", "file:///etc/host%00name", "file://", "file:///%ff"])
def test_a_file_url_that_is_nonsense_is_unavailable(scratch: Path, url: str) -> None:
    assert refused(scratch, url).tried[0][0] == url


# mirrors


def test_the_longest_prefix_has_the_mirrors_and_the_origin_comes_last() -> None:
    mirrors = {
        "https://github.com/": ("https://m1/gh/", "https://m2/"),
        "https://github.com/cloud/": ("https://m3/cloud/",),
        "registry.example/": ("https://m4/",),
    }
    assert candidates("https://github.com/x/y", mirrors) == (
        "https://m1/gh/x/y",
        "https://m2/x/y",
        "https://github.com/x/y",
    )
    assert candidates("https://github.com/cloud/y", mirrors) == (
        "https://m3/cloud/y",
        "https://github.com/cloud/y",
    )
    assert candidates("https://example.com/y", mirrors) == ("https://example.com/y",)


def test_a_mirror_that_has_the_bytes_spares_the_origin(serve: Serve, scratch: Path) -> None:
    mirror, origin = serve(vmlinux=answer()), serve(vmlinux=answer())
    came_from, data = download(scratch, origin.url("vmlinux"), mirrors={origin.url(): [mirror.url()]})
    assert (came_from, data) == (mirror.url("vmlinux"), DATA)
    assert origin.asked == []


def test_mirrors_are_asked_in_order_and_then_the_origin(serve: Serve, scratch: Path, closed_port: int) -> None:
    missing, late, origin = serve(), serve(vmlinux=answer()), serve(vmlinux=answer())
    closed = f"http://127.0.0.1:{closed_port}/"
    mirrors = {origin.url(): [missing.url("deep/"), closed, late.url()]}
    assert download(scratch, origin.url("vmlinux"), mirrors=mirrors) == (late.url("vmlinux"), DATA)
    assert missing.asked == ["/deep/vmlinux"]
    assert origin.asked == []
    only_bad = {origin.url(): [closed, missing.url()]}
    assert download(scratch, origin.url("vmlinux"), mirrors=only_bad) == (origin.url("vmlinux"), DATA)


@pytest.mark.parametrize(
    "wrong",
    [answer(bytes(len(DATA))), answer(HTML), answer(DATA + b"x"), answer(DATA[:9], length=len(DATA)), endless],
    ids=["other bytes", "web page", "too long", "cut off", "endless"],
)
def test_a_mirror_with_wrong_bytes_is_passed_over(serve: Serve, scratch: Path, wrong: Answer) -> None:
    mirror, origin = serve(vmlinux=wrong), serve(vmlinux=answer())
    came_from, data = download(scratch, origin.url("vmlinux"), mirrors={origin.url(): [mirror.url()]})
    assert (came_from, data) == (origin.url("vmlinux"), DATA)


def test_whoever_had_to_pass_over_a_mirror_is_told(
    serve: Serve, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror, origin = serve(vmlinux=answer(HTML)), serve(vmlinux=answer())
    download(scratch, origin.url("vmlinux"), mirrors={origin.url(): [mirror.url()]})
    assert mirror.url("vmlinux") in caplog.text
    assert "expected" in caplog.text


def test_when_nobody_has_it_the_error_lists_whom_it_asked_and_why_not(
    serve: Serve, scratch: Path, closed_port: int
) -> None:
    wrong, origin = serve(x=answer(HTML)), serve()
    closed = f"http://127.0.0.1:{closed_port}/"
    error = refused(scratch, origin.url("x"), mirrors={origin.url(): [wrong.url(), closed]})
    assert [where for where, _ in error.tried] == [wrong.url("x"), f"{closed}x", origin.url("x")]
    reasons = [why for _, why in error.tried]
    assert f"{len(DATA)} bytes" in reasons[0]
    assert "refused" in reasons[1]
    assert "404" in reasons[2]


def test_wrong_bytes_of_the_origin_itself_are_no_matter_of_availability(serve: Serve, scratch: Path) -> None:
    mirror, origin = serve(), serve(x=answer(bytes(len(DATA))))
    with pytest.raises(DigestMismatch) as caught:
        download(scratch, origin.url("x"), mirrors={origin.url(): [mirror.url()]})
    assert origin.url("x") in str(caught.value)


def test_a_file_url_may_be_a_mirror(serve: Serve, tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(DATA)
    origin = serve()
    mirrors = {origin.url(): [f"{tmp_path.as_uri()}/"]}
    assert download(scratch, origin.url("vmlinux"), mirrors=mirrors)[1] == DATA
    assert origin.asked == []


def test_a_proxy_is_used(serve: Serve, scratch: Path) -> None:
    asked: list[str] = []

    def proxied(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        answer()(handler)

    proxy = serve(**{"http://archive.invalid/vmlinux": proxied})
    download(scratch, "http://archive.invalid/vmlinux", proxies={"http": proxy.url()})
    assert asked == ["http://archive.invalid/vmlinux"]
