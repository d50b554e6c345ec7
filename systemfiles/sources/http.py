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
from systemfiles.sources.credentials import credential_for
from systemfiles.sources.transport import (
    BOUNDS,
    Answered,
    Attempts,
    Bounds,
    Interrupted,
    Transport,
    Unreachable,
    host_of,
    is_loopback,
)

log = logging.getLogger(__name__)

LARGEST = 4 << 30
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
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
    bounds: Bounds = BOUNDS,
) -> str:
    """Fills `out` with the bytes of `url`, verified, from its mirrors or its origin; returns the URL that had them.

    Raises DigestMismatch or SizeMismatch when the origin itself gave wrong bytes, else SourceUnavailable with every
    URL tried and why it failed (`hint` goes into it), and NoSpace before anything is fetched when it cannot fit.
    """
    transport = Transport(bounds, proxies=proxies)

    def get(candidate: str) -> None:
        if candidate.startswith("file:"):
            _copy(candidate, out, size or LARGEST)
            out.check(candidate, size=size, digest=digest)
        else:
            opener = _with_credentials(transport)
            download(opener, transport, candidate, out, subject=subject, digest=digest, size=size, progress=progress)

    return try_each(candidates(url, mirrors or {}), get, subject=subject, hint=hint)


def try_each(places: Iterable[str], get: Callable[[str], None], *, subject: str, hint: str | None = None) -> str:
    """The first of `places` that `get` gets it from. Raises what the last one did wrong, or SourceUnavailable."""
    tried: list[tuple[str, str]] = []
    wrong: IntegrityError | None = None
    for place in places:
        wrong = None
        try:
            get(place)
        except IntegrityError as error:
            wrong = error
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
    if wrong:
        raise wrong
    raise SourceUnavailable(subject, tried=tried, hint=hint)


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
    attempts = Attempts(transport.bounds)
    out.restart()
    try:
        pieced_together = _fill(opener, transport, url, out, attempts, subject, size, progress)
        out.check(url, size=size, digest=digest)
    except IntegrityError:
        if not pieced_together:
            raise
        # an origin that changed in between and does not honour If-Range: its parts do not fit
        out.restart()
        _fill(opener, transport, url, out, attempts, subject, size, progress)
        out.check(url, size=size, digest=digest)


def _fill(
    opener: Opener,
    transport: Transport,
    url: str,
    out: NewFile,
    attempts: Attempts,
    subject: str,
    size: int | None,
    progress: Progress,
) -> bool:
    """Downloads with as many requests as it takes; returns whether `out` was put together from several answers."""
    validator, pieced_together = None, False
    while True:
        headers = {"Range": f"bytes={out.size}-", "If-Range": validator} if out.size and validator else None
        try:
            with opener("GET", url, headers=headers) as response:
                validator = _validator(response)
                expected = _start(response, out)
                pieced_together = out.size > 0
                for piece in transport.body(response, attempts.deadline):
                    _take(piece, out, url, size or LARGEST)
                    progress(subject, out.size, size or expected)
                _require_whole(out, expected)
            return pieced_together
        except (Interrupted, Answered) as error:
            refused = isinstance(error, Answered) and error.status == requests.codes.requested_range_not_satisfiable
            if refused and out.size:
                out.restart()
            elif not attempts.another(error):
                raise


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
        raise SourceRefused(response.url, f"HTTP {response.status_code} {response.reason}")
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


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
    path = Path(unquote(urlsplit(url).path))
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except OSError as error:
        raise SourceRefused(url, error.strerror or str(error)) from error
