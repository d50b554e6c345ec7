"""HTTP requests as a client makes them that believes nothing: bounded in time, size, hops and attempts.

Redirects are followed here, one by one, so that no credential goes to another host (RFC 9110, 15.4), https never
becomes http, and no body of a redirect is read. Answers of 429 and 5xx, cut connections and silence are tried again,
and Retry-After is honoured; a name that does not resolve or a port that is closed is not tried again. Bodies are asked
for as they are stored (`Accept-Encoding: identity`), because digests are of stored bytes.
"""

from __future__ import annotations

import contextlib
import email.utils
import io
import ipaddress
import logging
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError, LocationParseError, ReadTimeoutError
from urllib3.util import parse_url

from systemfiles.foundation.digest import CHUNK
from systemfiles.foundation.errors import SourceRefused
from systemfiles.foundation.units import printable
from systemfiles.sources.connection import TimelyAdapter
from systemfiles.version import __version__

log = logging.getLogger(__name__)

_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 429, 500, 502, 503, 504)
_CUT = (ConnectionError, EOFError, TimeoutError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[A-Za-z0-9.:%_-]+\]")  # of a name in other letters, what IDNA makes
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"systemfiles/{__version__}"}


Body = io.RawIOBase | bytes | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a fetch may take: seconds, bytes a second, attempts."""

    connect: float = 5.0
    read: float = 30.0
    total: float = 4 * 3600.0
    slowest: float = 1024.0
    """bytes a second, on average over any `read` seconds"""
    attempts: int = 5
    enough: int = 1 << 20
    """new bytes that are worth as many attempts again"""
    pause: float = 0.5
    """seconds before the second attempt; doubled before each later one"""
    longest_pause: float = 60.0
    redirects: int = 10


BOUNDS = Bounds()


class Interrupted(Exception):
    """A connection that broke, stayed silent, or trickled; trying again may help."""


class Unreachable(Exception):
    """No connection came about; trying again at once would not help."""


class Answered(Exception):
    """An answer that is no success: who gave it, `status`, and how many seconds the origin asks to wait."""

    def __init__(self, response: requests.Response) -> None:
        super().__init__(printable(f"HTTP {response.status_code} {response.reason or ''}".rstrip()))
        self.url = response.url
        self.status = response.status_code
        self.headers = response.headers
        self.retry_after = _seconds(response.headers.get("Retry-After"))

    @property
    def temporary(self) -> bool:
        return self.status in _AGAIN


class Attempts:
    """How often one thing may be tried, until when or until `stop`, and how long to wait in between."""

    def __init__(self, bounds: Bounds, subject: str, *, stop: threading.Event | None = None) -> None:
        self.deadline = time.monotonic() + bounds.total
        self._subject = subject
        self._bounds = bounds
        self._stop = stop or threading.Event()
        self._made = 0

    def renew(self) -> None:
        """Counts from the beginning again, because something came of those that were made. The deadline stays."""
        self._made = 0

    def another(self, error: Exception) -> bool:
        """Whether to try again after `error`; waits before it says yes."""
        self._made += 1
        # not all hosts of a fleet at the same moment
        pause = self._bounds.pause * 2 ** (self._made - 1) * random.uniform(1, 1.25)
        if isinstance(error, Answered):
            if not error.temporary:
                return False
            pause = max(pause, error.retry_after or 0)
        elif not isinstance(error, Interrupted):
            return False
        late = time.monotonic() + pause > self.deadline
        if late or self._made >= self._bounds.attempts or pause > self._bounds.longest_pause:
            return False
        log.warning("%s: %s; trying again in %.1f s", self._subject, error, pause)
        return not self._stop.wait(pause)


class Transport:
    """Makes requests for one purpose; safe to share among threads. Once `stop` is set, nothing is tried again."""

    def __init__(
        self,
        bounds: Bounds | None = None,
        *,
        proxies: Mapping[str, str] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self.bounds = bounds or BOUNDS
        self._proxies = dict(proxies or {})
        self._stop = stop
        self._local = threading.local()

    def attempts(self, subject: str) -> Attempts:
        """The attempts at one thing, beginning now."""
        return Attempts(self.bounds, subject, stop=self._stop)

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        authorization: Callable[[str], str | None] = lambda url: None,
        body: Body = None,
    ) -> Iterator[requests.Response]:
        """The answer to one request, its body not yet read; redirects are followed for GET and HEAD.

        `authorization` is asked for each URL on the way. Raises Answered for everything but success, SourceRefused for
        redirects that may not be followed, Interrupted, Unreachable.
        """
        response = self._follow(method, url, dict(headers or {}), authorization, body)
        try:
            if response.status_code >= 300:
                raise Answered(response)
            yield response
        finally:
            response.close()

    def body(self, response: requests.Response, deadline: float) -> Iterator[bytes]:
        """The body as it is sent, in pieces. Raises Interrupted when it breaks off, stalls or trickles."""
        started, received = time.monotonic(), 0
        try:
            # read1 returns what is there, so that a trickle is seen and does not fill a buffer for hours
            while piece := response.raw.read1(CHUNK, decode_content=False):
                yield piece
                received += len(piece)
                now = time.monotonic()
                if now > deadline:
                    msg = f"it took longer than {self.bounds.total:g} s in all"
                    raise Interrupted(msg)
                if now - started > self.bounds.read:
                    if received < self.bounds.slowest * (now - started):
                        msg = f"only {received} bytes came in {now - started:.0f} s"
                        raise Interrupted(msg)
                    started, received = now, 0
        except (HTTPError, requests.RequestException, OSError) as error:
            raise Interrupted(reason(error)) from error

    def _follow(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        authorization: Callable[[str], str | None],
        body: Body,
    ) -> requests.Response:
        for _ in range(self.bounds.redirects + 1):
            host_of(url)  # every URL on the way is one
            response = self._send(method, url, headers, authorization(url), body)
            target = response.headers.get("Location")
            if method not in ("GET", "HEAD") or response.status_code not in _REDIRECTS or target is None:
                return response
            response.close()
            url = following(url, target)
        raise SourceRefused(url, f"it redirects more than {self.bounds.redirects} times")

    def _send(
        self, method: str, url: str, headers: dict[str, str], authorization: str | None, body: Body
    ) -> requests.Response:
        sent = {**_HEADERS, **headers, **({"Authorization": authorization} if authorization else {})}
        try:
            return self._session().request(
                method,
                url,
                headers=sent,
                data=body,
                stream=True,
                allow_redirects=False,
                timeout=(self.bounds.connect, self.bounds.read),
                proxies=self._proxies,
                auth=_leave,
            )
        except (requests.ReadTimeout, requests.exceptions.ChunkedEncodingError) as error:
            raise Interrupted(reason(error)) from error
        except requests.ConnectionError as error:
            raise (Interrupted if _was_cut(error) else Unreachable)(reason(error)) from error
        except (requests.RequestException, HTTPError, ValueError) as error:
            raise SourceRefused(url, reason(error)) from error

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = _Session()
            session.mount("http://", TimelyAdapter())
            session.mount("https://", TimelyAdapter())
            # cookies know no ports, and nothing here needs any
            session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=()))
        return session


class _Session(requests.Session):
    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        # what is sent in the clear to this machine must not leave it for a proxy
        if is_loopback(host_of(request.url or "")):
            options["proxies"] = {}
        return super().send(request, **options)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: to know what a redirect asks for, `requests` would read all of its body."""
        return None


def host_of(url: str) -> str:
    """Host and port of `url`, without a port that is the scheme's own. Raises SourceRefused for what is no plain URL.

    It is read by the parser that decides where to connect: two that read `http://one\\@two/` differently would tell
    one host the password of the other.
    """
    try:
        parts = parse_url(url)
    except (LocationParseError, ValueError):
        raise SourceRefused(url, "it is no URL") from None
    if parts.host and not _HOST.fullmatch(parts.host):
        raise SourceRefused(url, "it is no URL")  # on its way to a socket it would become another
    if parts.auth is not None or "\\" in url or not url.isprintable():
        raise SourceRefused(url, "it is no plain URL: no user, backslash or control character belongs into it")
    name = (parts.host or "").lower()
    return name if parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme or "")) else f"{name}:{parts.port}"


def is_loopback(host: str) -> bool:
    """Whether `host`, perhaps with a port, is this machine."""
    name = re.sub(r":[0-9]*$", "", host) if host.count(":") == 1 or "]" in host else host
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def root_cause(error: BaseException) -> BaseException:
    """What lies under the layers of wrapping that `requests` and urllib3 put around an error."""
    # never __context__, which may be anything that the caller was handling
    inner = (error.__cause__, getattr(error, "reason", None), *error.args)
    return next((root_cause(cause) for cause in inner if isinstance(cause, BaseException)), error)


def _was_cut(error: requests.ConnectionError) -> bool:
    """Whether there was a connection that broke, so that trying again may help."""
    return not isinstance(error, requests.ConnectTimeout | ConnectionRefusedError) and _is_cut(root_cause(error))


def _is_cut(cause: BaseException) -> bool:
    return isinstance(cause, _CUT) and not isinstance(cause, ConnectionRefusedError)


def reason(error: Exception) -> str:
    """Why a request failed, in a few words."""
    if isinstance(error, requests.ConnectTimeout):
        return "no connection came about in time"
    if isinstance(error, requests.ReadTimeout | ReadTimeoutError):
        return "it stayed silent for too long"
    cause = root_cause(error)
    if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
        return "it does not speak TLS (for plain http, a mirror of images is written with http://)"
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause) or type(cause).__name__
    return printable(text)


def following(url: str, location: str) -> str:
    """Where the Location header of an answer from `url` leads. Raises SourceRefused when nobody should go there."""
    try:
        target = urljoin(url, location)
    except ValueError as error:
        raise SourceRefused(url, f"it sends us to {location[:200]!r}") from error
    before, after = urlsplit(url).scheme, urlsplit(target).scheme
    if after not in ("http", "https"):
        raise SourceRefused(url, f"it sends us to {target[:200]!r}")
    if (before, after) == ("https", "http"):
        raise SourceRefused(url, f"it sends us from https to http, to {target[:200]!r}")
    return target


def _seconds(retry_after: str | None) -> float | None:
    """The value of a Retry-After header (RFC 9110, 10.2.3), a number or a date, as seconds from now."""
    if retry_after is None:
        return None
    if re.fullmatch(r"[ \t]*[0-9]+[ \t]*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _leave(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps `requests` from adding a netrc entry of its own choice."""
    return request
