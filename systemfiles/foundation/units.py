"""Sizes, and what others say, as people can read them."""

from __future__ import annotations

import re
import time

from systemfiles.foundation.errors import UsageError

_DURATION = re.compile(r"([0-9]{1,9})([smhd]?)")
_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)")


def human_size(size: int) -> str:
    """`size` bytes in binary units: "50.8 MiB"."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if value < 1024:
            return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def parse_size(text: str) -> int:
    """The bytes that "4096", "512K", "64M", "2G" or "1T" say: the letters are powers of 1024. Raises UsageError."""
    said = _SIZE.fullmatch(text)
    if said is None:
        msg = f"{text[:100]!r} is no size"
        raise UsageError(msg, hint="a number of bytes, or of K, M, G or T (powers of 1024), such as 512M")
    return int(said[1]) << 10 * " KMGT".index(said[2] or " ")


def parse_duration(text: str) -> int:
    """The seconds that "90", "90s", "15m", "24h" or "7d" say. Raises UsageError."""
    said = _DURATION.fullmatch(text)
    if said is None:
        msg = f"{text[:100]!r} is no time"
        raise UsageError(msg, hint="a number of seconds, or of s, m, h or d, such as 24h")
    return int(said[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[said[2]]


def utc(seconds: float) -> str:
    """A time in seconds since 1970 as ISO 8601: "2026-11-20T09:41:37Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def printable(text: str) -> str:
    """What an origin says, in one line that can do a terminal no harm."""
    return "".join(char if char.isprintable() else " " for char in text[:200])


def public_url(url: str) -> str | None:
    """`url` without credentials; None when nobody else could fetch from there."""
    from urllib.parse import urlsplit  # 3 ms, and resolving shows no URL

    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
        return None
    public: str = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return public
