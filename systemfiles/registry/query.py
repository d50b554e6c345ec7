"""Lists of assets in pages: newest first, and of those that were made in one second, the one with the greater id first.

A page token is where the page before ended, as base64 of JSON `[created_at, id]`, so it stays right while assets come
and go. With labels, the rarest one leads: its assets are one range of an index, in the order wanted, and the others are
looked up for each.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import NamedTuple

from systemfiles.foundation.errors import UsageError
from systemfiles.registry.assets import Asset, AssetStatus, AssetType, select
from systemfiles.registry.database import Database, Transaction

DEFAULT_PAGE = 100
LARGEST_PAGE = 1000
_RARE = 1000  # an index range of so many is read in a few ms: no need to count further


class Page(NamedTuple):
    """Some assets, and the token for those that follow; "" at the end."""

    assets: tuple[Asset, ...]
    next_token: str


def list_assets(
    database: Database,
    *,
    now: int,
    type: AssetType | None = None,
    status: AssetStatus | None = None,
    labels: Mapping[str, str] | None = None,
    size: int = DEFAULT_PAGE,
    token: str = "",
) -> Page:
    """A page of the assets that have all of `labels`. No access is noted. Raises UsageError for `size` and `token`."""
    if not 1 <= size <= LARGEST_PAGE:
        msg = f"a page of {size} assets cannot be had"
        raise UsageError(msg, details=[("allowed", f"1 to {LARGEST_PAGE}")])
    after = _parse_token(token) if token else None
    with database.reading() as transaction:
        ordered = _by_rarity(transaction, dict(labels or {}))
        clause, values = _clause(ordered, type, status, after)
        found = select(transaction, f"{clause} LIMIT ?", (*values, size + 1), now)
    more = len(found) > size
    return Page(tuple(found[:size]), _token(found[size - 1]) if more else "")


def _clause(
    labels: list[tuple[str, str]], type: AssetType | None, status: AssetStatus | None, after: tuple[int, str] | None
) -> tuple[str, list[object]]:
    """FROM, WHERE and ORDER BY, and the values for them."""
    values: list[object] = []
    place = "a.created_at, a.id"
    source, conditions = "FROM assets a", []
    if labels:
        place = "l.created_at, l.asset_id"
        # CROSS JOIN keeps SQLite's planner from another order
        source = "FROM asset_labels l CROSS JOIN assets a"
        conditions = ["a.id = l.asset_id", "l.label = ?", "l.value = ?"]
        values += labels[0]
    for label in labels[1:]:
        conditions.append(
            "EXISTS (SELECT 1 FROM asset_labels m WHERE m.asset_id = l.asset_id AND m.label = ? AND m.value = ?)"
        )
        values += label
    for column, wanted in (("type", type), ("status", status)):
        if wanted is not None:
            conditions.append(f"a.{column} = ?")
            values.append(wanted.value)
    if after is not None:
        conditions.append(f"({place}) < (?, ?)")
        values += after
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"{source} {where} ORDER BY {place.replace(',', ' DESC,')} DESC", values


def _by_rarity(transaction: Transaction, labels: dict[str, str]) -> list[tuple[str, str]]:
    if len(labels) < 2:
        return [*labels.items()]
    count = "SELECT count(*) FROM (SELECT 1 FROM asset_labels WHERE label = ? AND value = ? LIMIT ?) AS counted"
    return sorted(labels.items(), key=lambda label: transaction.rows(count, (*label, _RARE))[0][0])


def _token(last: Asset) -> str:
    return base64.urlsafe_b64encode(json.dumps([last.created_at, last.id]).encode()).decode().rstrip("=")


def _parse_token(token: str) -> tuple[int, str]:
    try:
        padded = token + "=" * (-len(token) % 4)
        created_at, asset_id = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if type(created_at) is not int or type(asset_id) is not str or not -(1 << 63) <= created_at < 1 << 63:
            raise ValueError(token)
    except (ValueError, TypeError, binascii.Error, RecursionError):
        msg = f"{token!r:.100} is no page token"
        raise UsageError(
            msg, hint="pass the token that came with the page before, or none for the first page"
        ) from None
    return created_at, asset_id
