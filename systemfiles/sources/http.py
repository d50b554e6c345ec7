"""Downloads over HTTP(S), and copies of file:// URLs: streamed, hashed on the way, compared with what was promised."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests

from systemfiles.foundation.digest import CHUNK, Digest
from systemfiles.foundation.errors import IntegrityError, NoSpace, SizeMismatch, SourceRefused, SourceUnavailable
from systemfiles.foundation.files import NewFile, free_bytes
from systemfiles.foundation.progress import Progress, silent
from systemfiles.foundation.units import printable
from systemfiles.sources.credentials import credential_for
from systemfiles.sources.transport import (
    Answered,
    Bounds,
    Interrupted,
    Transport,
    Unreachable,
    host_of,
    is_loopback,
    reason,
)

log = logging.getLogger(__name__)

LARGEST = 4 << 30
_LENGTH = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
Opener = Callable[..., AbstractContextManager[requests.Response]]
"""Like `Transport.open`, whatever it does about authorization."""


def candidates(url: str, mirrors: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Where to look for `url`: below each mirror of its longest matching prefix, in order, then at its origin."""
    for prefix in sorted((p for p in mirrors if url.startswith(p)), key=len, reverse=True):
        return (*(mirror + url.removeprefix(prefix) for mirror in mirrors[prefix]), url)
    return (url,)


def fetch(
    url: str,
    out: NewFile,
    *,
    subject: str,
    digest: Digest,
    size: int | None = None,
    mirrors: Mapping[str, Iterable[str]] | None = None,
    proxies: Mapping[str, str] | None = None,
    hint: str | None = None,
    progress: Progress = silent,
    bounds: Bounds | None = None,
) -> str:
    """Fills `out` with the bytes of `url`, verified, from its mirrors or its origin; returns the URL that had them.

    Raises DigestMismatch or SizeMismatch when the origin itself gave wrong bytes, else SourceUnavailable with every
    URL tried and why it failed (`hint` goes into it), and NoSpace before anything is fetched when it cannot fit.
    """

    def get(candidate: str) -> None:
        # the proxies are those for the origin: a mirror is reached as the environment says
        transport = Transport(bounds, proxies=proxies if candidate == url else None)
        if candidate.startswith("file:"):
            _copy(candidate, out, _most(size))
            out.check(candidate, size=size, digest=digest)
        else:
            opener = _with_credentials(transport)
            download(opener, transport, candidate, out, subject=subject, digest=digest, size=size, progress=progress)

    return try_each(candidates(url, mirrors or {}), get, subject=subject, hint=hint)


def try_each(places: Iterable[str], get: Callable[[str], None], *, subject: str, hint: str | None = None) -> str:
    """The first of `places` that `get` gets it from. Raises what the last one did wrong, or SourceUnavailable."""
    tried: list[tuple[str, str]] = []
    wrong: IntegrityError | None = None
    last: IntegrityError | None = None
    for place in places:
        last = None
        try:
            get(place)
        except IntegrityError as error:
            last, wrong = error, wrong or error
            tried.append((place, f"expected {error.expected}, got {error.got}"))
        except SourceRefused as error:
            tried.append((place, error.problem))
        except (Answered, Interrupted, Unreachable) as error:
            tried.append((place, str(error)))
        else:
            if tried:
                failures = "; ".join(f"{where}: {why}" for where, why in tried)
                log.warning("%s came from %s; before that, %s", subject, place, failures)
            return place
    if last:
        raise last
    raise SourceUnavailable(subject, tried=tried, hint=hint, wrong=wrong)


def download(
    opener: Opener,
    transport: Transport,
    url: str,
    out: NewFile,
    *,
    subject: str,
    digest: Digest,
    size: int | None = None,
    progress: Progress = silent,
) -> None:
    """Fills `out` with what `url` answers, verified, going on where a cut connection stopped.

    Raises DigestMismatch, SizeMismatch (as soon as more than `size` bytes come), NoSpace, SourceRefused, Answered,
    Interrupted, Unreachable.
    """
    _require_space(out, size)
    filling = _Filling(opener, transport, url, out, subject=subject, size=size, progress=progress)
    try:
        filling.run()
        out.check(url, size=size, digest=digest)
    except IntegrityError:
        if not filling.pieced_together:
            raise
        # an origin that changed in between and does not honour If-Range: its parts do not fit
        filling.run()
        out.check(url, size=size, digest=digest)


class _Filling:
    """One download, with as many requests as it takes."""

    def __init__(
        self,
        opener: Opener,
        transport: Transport,
        url: str,
        out: NewFile,
        *,
        subject: str,
        size: int | None,
        progress: Progress,
    ) -> None:
        self.pieced_together = False
        self._opener = opener
        self._transport = transport
        self._url = url
        self._out = out
        self._subject = subject
        self._size = size
        self._progress = progress
        self._validator: str | None = None
        self._attempts = transport.attempts(subject)
        self._farthest = 0

    def run(self) -> None:
        """Starts at the beginning, and goes on until all is there or nothing more helps."""
        self._out.restart()
        while True:
            try:
                self._ask()
                return
            except (Interrupted, Answered, Unreachable) as caught:
                # whoever sent some of it is there, and may be starting again just now
                error = Interrupted(str(caught)) if isinstance(caught, Unreachable) and self._out.size else caught
                self._reward_progress()
                status = error.status if isinstance(error, Answered) else None
                if status == requests.codes.requested_range_not_satisfiable and self._out.size:
                    self._out.restart()
                elif not self._attempts.another(error):
                    raise

    def _reward_progress(self) -> None:
        """Lets a long file come over a line that is cut again and again, as long as each few attempts bring more of it.

        Only what is beyond all that was ever here counts: an origin that starts over each time, or has other bytes each
        time, would otherwise be asked until the deadline. And it must be a good deal, so that a file takes no more
        requests than its size in such steps allows, however little each of them brings.
        """
        if self._out.size >= self._farthest + self._transport.bounds.enough:
            self._farthest = self._out.size
            self._attempts.renew()

    def _ask(self) -> None:
        out = self._out
        headers = None
        if out.size and self._validator:
            headers = {"Range": f"bytes={out.size}-", "If-Range": self._validator}
        with self._opener("GET", self._url, headers=headers) as response:
            self._validator = _validator(response)
            expected = _start(response, out)
            self.pieced_together = out.size > 0
            for piece in self._transport.body(response, self._attempts.deadline):
                _take(piece, out, self._url, _most(self._size))
                self._progress(self._subject, out.size, self._size or expected)
            _require_whole(out, expected)


def _start(response: requests.Response, out: NewFile) -> int | None:
    """Places `out` where the answer begins, which need not be where it was asked to; returns the expected size."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise SourceRefused(response.url, "it is sent encoded, although it was asked for as it is")
    if response.status_code == requests.codes.partial_content:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != out.size:
            out.restart()
            msg = "it answers with another range than was asked for"
            raise Interrupted(msg)
        return None if found[2] == "*" else int(found[2])
    out.restart()
    if response.status_code != requests.codes.ok:
        raise SourceRefused(response.url, printable(f"HTTP {response.status_code} {response.reason}"))
    length = response.headers.get("Content-Length", "")
    return int(length) if _LENGTH.fullmatch(length) else None


def _most(size: int | None) -> int:
    return LARGEST if size is None else size


def _take(piece: bytes, out: NewFile, url: str, limit: int) -> None:
    if out.size + len(piece) > limit:
        raise SizeMismatch(url, expected=f"{limit} bytes", got="more", consequence="it was discarded")
    out.write(piece)


def _require_whole(out: NewFile, expected: int | None) -> None:
    if expected is not None and out.size < expected:
        msg = f"it breaks off after {out.size} of {expected} bytes"
        raise Interrupted(msg)


def _require_space(out: NewFile, size: int | None) -> None:
    if size is not None and (free := free_bytes(out.path)) < size:
        raise NoSpace(out.path.parent, needed=size, free=free)


def _validator(response: requests.Response) -> str | None:
    """What If-Range may be asked with (RFC 9110, 13.1.5): a strong ETag, else the date of the last change."""
    etag = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return response.headers.get("Last-Modified")


def _with_credentials(transport: Transport) -> Opener:
    def authorization(url: str) -> str | None:
        if not url.startswith("https:") and not is_loopback(host_of(url)):
            return None  # never in the clear
        credential = credential_for(host_of(url))
        return credential.header if credential else None

    def opener(method: str, url: str, **request: Mapping[str, str]) -> AbstractContextManager[requests.Response]:
        return transport.open(method, url, authorization=authorization, headers=request.get("headers"))

    return opener


def _copy(url: str, out: NewFile, limit: int) -> None:
    out.restart()
    for piece in _read_file(url):
        _take(piece, out, url, limit)


def _read_file(url: str) -> Iterator[bytes]:
    try:
        path = Path(unquote(urlsplit(url).path))
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except (OSError, ValueError) as error:
        raise SourceRefused(url, reason(error)) from error
