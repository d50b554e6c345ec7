"""What an origin may do with one request: honest answers, and all the others.

An `Answer` does it. Several of them in turn make a story, such as a connection that is cut and then resumed.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

REPOSITORY = "library/busybox"


@dataclass(frozen=True)
class Request:
    """What a client asked for: `path` with its query, header names in lower case, seconds on the monotonic clock."""

    method: str
    path: str
    headers: Mapping[str, str]
    at: float
    body: bytes = b""


class Exchange:
    """One request and the connection it came on."""

    def __init__(self, handler: BaseHTTPRequestHandler, request: Request, closing: threading.Event) -> None:
        self.request = request
        self.closing = closing
        self._handler = handler

    def head(self, status: int = 200, headers: Sequence[tuple[str, object]] = ()) -> None:
        self._handler.send_response(status)
        for name, value in (*headers, ("Connection", "close")):
            self._handler.send_header(name, str(value))
        self._handler.end_headers()

    def send(self, data: bytes) -> None:
        """Sends, also to those who have hung up."""
        if self.request.method != "HEAD":
            self._handler.wfile.write(data)

    def drop(self) -> None:
        """Resets the connection instead of closing it."""
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self._handler.connection.detach())  # the server's own way to close it says goodbye first


Answer = Callable[[Exchange], None]


def status(code: int, data: bytes = b"", **headers: str) -> Answer:
    """An answer with this body, as long as it says; underscores in header names stand for dashes."""
    return body(data, code, **headers)


def redirect(target: str, code: int = 302, **headers: str) -> Answer:
    return status(code, b"<html>moved</html>", Location=target, **headers)


def body(data: bytes, code: int = 200, *, length: int | str | None = None, **headers: str) -> Answer:
    """An answer whose Content-Length is `length` whatever the body; "chunked" and "none" are without one."""

    def answer(x: Exchange) -> None:
        known = [(name.replace("_", "-"), value) for name, value in headers.items()]
        framing: list[tuple[str, object]] = [("Content-Length", len(data) if length is None else length)]
        if length == "chunked":
            framing = [("Transfer-Encoding", "chunked")]
        elif length == "none":
            framing = []
        x.head(code, [*known, *framing])
        x.send(data)

    return answer


def chunked(data: bytes, *, ending: bytes = b"0\r\n\r\n") -> Answer:
    return body(b"%x\r\n%s\r\n" % (len(data), data) + ending, length="chunked")


def content(data: bytes, media_type: str = "application/octet-stream", *, etag: str = "", **headers: str) -> Answer:
    """What an honest server does, conditional ranges included; its ETag is made from the content if not given."""
    return cut(data, None, media_type, etag=etag, **headers)


def cut(
    data: bytes, after: int | None, media_type: str = "application/octet-stream", *, etag: str = "", **headers: str
) -> Answer:
    """Honest, but hangs up after so many bytes."""
    tag = etag or f'"{hashlib.sha256(data).hexdigest()[:16]}"'

    def answer(x: Exchange) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", x.request.headers.get("range", ""))
        start = int(found[1]) if found and x.request.headers.get("if-range") == tag else 0
        if start >= len(data) > 0:
            status(416)(x)
            return
        known: list[tuple[str, object]] = [(name.replace("_", "-"), value) for name, value in headers.items()]
        known += [("ETag", tag), ("Content-Type", media_type), ("Content-Length", len(data) - start)]
        if start:
            known.append(("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}"))
        x.head(206 if start else 200, known)
        x.send(data[start:] if after is None else data[start : start + after])

    return answer


def part(data: bytes, content_range: str, **headers: str) -> Answer:
    """A 206 that says whatever it is told about its range."""
    return body(data, 206, Content_Range=content_range, **headers)


def in_turn(*answers: Answer) -> Answer:
    """The first request gets the first answer and so on; the last answer is for all that follow."""
    left = list(answers)
    lock = threading.Lock()

    def answer(x: Exchange) -> None:
        with lock:
            chosen = left.pop(0) if len(left) > 1 else left[0]
        chosen(x)

    return answer


def verbatim(*pieces: bytes) -> Answer:
    """These bytes in place of an HTTP answer."""

    def answer(x: Exchange) -> None:
        for piece in pieces:
            x.send(piece)

    return answer


def repeated(start: bytes, piece: bytes, pause: float = 0) -> Answer:
    """Something verbatim, and then something again and again, until the client hangs up."""

    def answer(x: Exchange) -> None:
        x.send(start)
        while not x.closing.wait(pause):
            x.send(piece)

    return answer


def silent(x: Exchange) -> None:
    """Takes the request and says nothing."""
    x.closing.wait(30)


def reset(x: Exchange) -> None:
    x.drop()


def bearer(realm: str, service: str = "test", scope: str = f"repository:{REPOSITORY}:pull") -> Answer:
    """Asks for a token."""
    return status(401, WWW_Authenticate=f'Bearer realm="{realm}",service="{service}",scope="{scope}"')


def basic() -> Answer:
    """Asks for a user and a password."""
    return status(401, WWW_Authenticate='Basic realm="test"')


def only_for(authorization: str, challenge: Answer) -> Callable[[Request], Answer | None]:
    """A guard that lets this Authorization header pass."""
    return lambda request: None if request.headers.get("authorization") == authorization else challenge
