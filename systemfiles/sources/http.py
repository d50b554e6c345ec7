"""Downloads over HTTP(S), and copies of file:// URLs: streamed, hashed on the way, compared with what was promised."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
from urllib3.exceptions import HTTPError

from systemfiles.foundation.digest import CHUNK, Digest
from systemfiles.foundation.errors import IntegrityError, SizeMismatch, SourceRefused, SourceUnavailable
from systemfiles.foundation.files import NewFile
from systemfiles.foundation.progress import Progress, silent
from systemfiles.version import __version__

log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
LARGEST = 4 << 30
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"systemfiles/{__version__}"}


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
) -> str:
    """Fills `out` with the bytes of `url`, verified, from its mirrors or its origin; returns the URL that had them.

    Raises DigestMismatch or SizeMismatch when the origin itself gave wrong bytes, else SourceUnavailable with every
    URL tried and why it failed; `hint` goes into it.
    """
    tried: list[tuple[str, str]] = []
    wrong: IntegrityError | None = None
    for candidate in candidates(url, mirrors or {}):
        out.restart()
        try:
            _fill(candidate, out, subject=subject, size=size, proxies=proxies or {}, progress=progress)
            out.check(candidate, size=size, digest=digest)
        except IntegrityError as error:
            wrong = error
            tried.append((candidate, f"{error.summary}: expected {error.expected}, got {error.got}"))
        except SourceRefused as error:
            wrong = None
            tried.append((candidate, error.problem))
        except (requests.RequestException, HTTPError) as error:
            wrong = None
            tried.append((candidate, _reason(error)))
        else:
            if tried:
                log.warning("%s came from %s; before that, %s", subject, candidate, _failures(tried))
            return candidate
    if wrong:
        raise wrong
    raise SourceUnavailable(subject, tried=tried, hint=hint)


def _fill(
    url: str, out: NewFile, *, subject: str, size: int | None, proxies: Mapping[str, str], progress: Progress
) -> None:
    chunks = _read_file(url) if url.startswith("file:") else _read_http(url, proxies)
    limit = size or LARGEST
    for chunk in chunks:
        if out.size + len(chunk) > limit:
            raise SizeMismatch(url, expected=f"{limit} bytes", got="more", consequence="it was discarded")
        out.write(chunk)
        progress(subject, out.size, size)


def _read_http(url: str, proxies: Mapping[str, str]) -> Iterator[bytes]:
    with requests.get(
        url, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS), headers=_HEADERS, proxies=dict(proxies)
    ) as response:
        if response.status_code != requests.codes.ok:
            raise SourceRefused(url, f"HTTP {response.status_code} {response.reason}")
        # as sent, so that the digest is of the file and not of a decoded form of it
        yield from response.raw.stream(CHUNK, decode_content=False)


def _read_file(url: str) -> Iterator[bytes]:
    path = Path(unquote(urlsplit(url).path))
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except OSError as error:
        raise SourceRefused(url, error.strerror or str(error)) from error


def _failures(tried: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{url}: {why}" for url, why in tried)


def _reason(error: Exception) -> str:
    """What went wrong, without the layers of wrapping that `requests` puts around it."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT_SECONDS:g} s"
    if isinstance(error, requests.ReadTimeout):
        return f"silent for {READ_SECONDS:g} s"
    cause: BaseException = error
    while inner := cause.__cause__ or getattr(cause, "reason", None) or cause.__context__:
        if not isinstance(inner, BaseException):
            break
        cause = inner
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__
