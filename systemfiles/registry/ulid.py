"""ULIDs: identifiers that sort by the time they were made at.

48 bits of milliseconds since 1970 and 80 random ones, as 26 digits of Crockford's base 32. Source: the ULID spec.
"""

from __future__ import annotations

import secrets

_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_ulid(now: float) -> str:
    """A new one for `now`, in seconds since 1970 (UTC)."""
    number = int(now * 1000) << 80 | secrets.randbits(80)
    return "".join(_DIGITS[number >> shift & 31] for shift in range(125, -1, -5))
