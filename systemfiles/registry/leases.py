"""Leases: who holds which assets, and until when.

A lease is one row for each of its assets, all with one id. It holds from the transaction that adds it, which is also
the one that finds the assets there, to the second in which it expires or is released. So long its assets are in use:
releasing it is an access, and the row of one that expired stays to tell when that was, until they are held again. It is
changed under the lock of its assets' rows, as a whole: a lease some of whose assets were taken from it, by force or
when it had ended, is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from systemfiles.foundation.errors import AssetNotFound, LeaseNotFound, UsageError
from systemfiles.registry.assets import LIVE, batches, lock
from systemfiles.registry.database import Database, Transaction, marks
from systemfiles.registry.ulid import new_ulid

LATEST = (1 << 53) - 1
"""The last second that every consumer of JSON can tell from the one before."""

_NAME_MAX = 255
_BATCH = 200
_COLUMNS = "id, acquired_by, acquired_at, expires_at, store_id"
_LATER = "CASE WHEN last_accessed_at < ? THEN ? ELSE last_accessed_at END"


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease. Times are UTC seconds; `expires_at` None is without end.

    It holds the bytes that the store `store_id` has, or those of every store when that is empty.
    """

    id: str
    holder: str
    asset_ids: tuple[str, ...]
    acquired_at: int
    expires_at: int | None
    store_id: str = ""

    def expired(self, now: int) -> bool:
        """Whether it has ended; it holds until the second before `expires_at`."""
        return self.expires_at is not None and self.expires_at <= now


def expiry(now: float, ttl: float | None) -> int | None:
    """The second in which a lease ends that holds for at least `ttl` seconds; None and 0 are without end.

    Raises UsageError.
    """
    if ttl is None or ttl == 0:
        return None
    if not 0 < ttl < LATEST - now:
        msg = "no lease can be for so long, or end before it begins"
        raise UsageError(msg, details=[("allowed", "a positive number of seconds, or 0 for a lease without end")])
    return math.ceil(now + ttl)


class Leases:
    """The leases of one registry. Each call is a transaction of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def acquire(
        self,
        asset_ids: Iterable[str],
        holder: str,
        *,
        now: float,
        ttl: float | None = None,
        store_id: str = "",
        lease_id: str | None = None,
    ) -> Lease:
        """Holds all of these assets, or none: those of one store when `store_id` is given, else wherever they are.

        With a `lease_id`, the same once more is the lease that it was. Raises AssetNotFound for an asset that is not
        there any more, UsageError.
        """
        _require_name("holder", holder)
        if lease_id is not None:
            _require_name("id", lease_id)
        ids = tuple(sorted({*asset_ids}))
        if not ids:
            msg = "a lease must hold something"
            raise UsageError(msg)
        lease = Lease(lease_id or new_ulid(now), holder, ids, int(now), expiry(now, ttl), store_id)
        with self._database.writing() as transaction:
            lock(transaction, ids)
            _forget_ended(transaction, lease)
            if lease_id is not None and (known := _read(transaction, "id = ?", (lease_id,))):
                return _require_same(known[0], lease)
            for batch in batches(ids):
                _hold(transaction, lease, batch)
        return lease

    def renew(self, lease_id: str, *, now: float, ttl: float | None = None) -> Lease:
        """Lets the lease end `ttl` seconds from now. Raises LeaseNotFound, for one that has ended too; UsageError."""
        ends = expiry(now, ttl)
        whole = "asset_count = (SELECT count(*) FROM asset_leases WHERE id = ?)"
        statement = f"UPDATE asset_leases SET expires_at = ? WHERE id = ? AND {LIVE} AND {whole}"
        with self._database.writing() as transaction:
            _lock_assets(transaction, lease_id)
            if not transaction.execute(statement, (ends, lease_id, int(now), lease_id)):
                raise LeaseNotFound(lease_id)
            return _read(transaction, "id = ?", (lease_id,))[0]

    def release(self, lease_id: str, *, now: float) -> None:
        """Ends the lease. Raises LeaseNotFound, for one that has ended too."""
        since = int(now)
        with self._database.writing() as transaction:
            _lock_assets(transaction, lease_id)
            transaction.execute(
                f"""UPDATE assets SET last_accessed_at = ? WHERE last_accessed_at < ?
                    AND id IN (SELECT asset_id FROM asset_leases WHERE id = ? AND {LIVE})""",
                (since, since, lease_id, since),
            )
            if not transaction.execute(f"DELETE FROM asset_leases WHERE id = ? AND {LIVE}", (lease_id, since)):
                raise LeaseNotFound(lease_id)

    def forget_ended(self, *, now: int, store_id: str) -> None:
        """Removes what is left of the leases on what this store has that have ended, and notes until when they held.

        In short transactions, so that nobody waits for long.
        """
        ended = "expires_at <= ? AND store_id IN ('', ?)"
        last = f"(SELECT max(expires_at) FROM asset_leases WHERE asset_id = assets.id AND {ended})"
        after = ""
        while ids := self._with_ended(ended, now, store_id, after):
            among, after = marks(ids), ids[-1]
            with self._database.writing() as transaction:
                lock(transaction, ids)
                transaction.execute(
                    f"UPDATE assets SET last_accessed_at = {last} WHERE id IN ({among}) AND last_accessed_at < {last}",
                    (now, store_id, *ids, now, store_id),
                )
                transaction.execute(
                    f"DELETE FROM asset_leases WHERE asset_id IN ({among}) AND {ended}", (*ids, now, store_id)
                )

    def _with_ended(self, ended: str, now: int, store_id: str, after: str) -> Sequence[str]:
        """Assets with such leases, by id, from behind `after` on."""
        page = "asset_id > ? ORDER BY asset_id LIMIT ?"
        statement = f"SELECT DISTINCT asset_id FROM asset_leases WHERE {ended} AND {page}"
        with self._database.reading() as transaction:
            return [asset for (asset,) in transaction.rows(statement, (now, store_id, after, _BATCH))]

    def list(
        self,
        *,
        now: float,
        lease_id: str | None = None,
        asset_id: str | None = None,
        holder: str | None = None,
        prefix: str | None = None,
        store_id: str | None = None,
    ) -> tuple[Lease, ...]:
        """The live leases, oldest first: all, or those with this id, on this asset, of this holder, of holders whose
        names begin with `prefix`, that hold what this store has."""
        asked = [
            (LIVE, (int(now),)),
            ("id = ?", (lease_id,)),
            ("id IN (SELECT id FROM asset_leases WHERE asset_id = ?)", (asset_id,)),
            ("acquired_by = ?", (holder,)),
            # no name has that character, which is the last one
            ("acquired_by >= ? AND acquired_by < ?", (prefix, None if prefix is None else f"{prefix}\U0010ffff")),
            ("store_id IN ('', ?)", (store_id,)),
        ]
        kept = [(condition, values) for condition, values in asked if None not in values]
        with self._database.reading() as transaction:
            every = [value for _, values in kept for value in values]
            return tuple(_read(transaction, " AND ".join(condition for condition, _ in kept), every))


def _require_name(what: str, name: str) -> None:
    if not 0 < len(name) <= _NAME_MAX or not name.isprintable():
        msg = f"{name[:300]!r} cannot be the {what} of a lease"
        raise UsageError(msg, details=[("allowed", f"1 to {_NAME_MAX} printable characters")])


def _require_same(known: Lease, wanted: Lease) -> Lease:
    """`known`, which is what was asked for. Raises UsageError for a lease of that id on other assets or for others."""
    if (known.holder, known.asset_ids, known.store_id) != (wanted.holder, wanted.asset_ids, wanted.store_id):
        msg = f"lease {known.id!r} exists and is another one"
        raise UsageError(msg, details=[("holder", known.holder), ("holds", ", ".join(known.asset_ids[:10]))])
    return known


def _lock_assets(transaction: Transaction, lease_id: str) -> None:
    if transaction.for_update:
        rows = transaction.rows("SELECT asset_id FROM asset_leases WHERE id = ?", (lease_id,))
        lock(transaction, [row[0] for row in rows])


def _forget_ended(transaction: Transaction, lease: Lease) -> None:
    """So there is never much of it, however rarely there are collections.

    Only of the lease's own store: to another host, whose clock may go behind this one's, they may not have ended.
    """
    for ids in batches(lease.asset_ids):
        transaction.execute(
            f"DELETE FROM asset_leases WHERE asset_id IN ({marks(ids)}) AND expires_at <= ? AND store_id = ?",
            (*ids, lease.acquired_at, lease.store_id),
        )


def _hold(transaction: Transaction, lease: Lease, ids: tuple[str, ...]) -> None:
    """Adds the rows for some of its assets, and notes who holds them. Raises AssetNotFound."""
    since = lease.acquired_at
    among, values = f"id IN ({marks(ids)}) AND status = 'available'", [*ids]
    if lease.store_id:
        place = "SELECT 1 FROM asset_locations p WHERE p.asset_id = assets.id AND p.store_id = ?"
        among, values = f"{among} AND EXISTS ({place})", [*ids, lease.store_id]
    held = transaction.execute(
        f"UPDATE assets SET last_held_by = ?, last_accessed_at = {_LATER} WHERE {among}",
        (lease.holder, since, since, *values),
    )
    if held != len(ids):
        there = {row[0] for row in transaction.rows(f"SELECT id FROM assets WHERE {among}", values)}
        raise AssetNotFound(min({*ids} - there))
    transaction.execute(
        f"""INSERT INTO asset_leases (asset_id, {_COLUMNS}, asset_count)
            SELECT id, ?, ?, ?, CAST(? AS BIGINT), ?, ? FROM assets WHERE id IN ({marks(ids)})""",
        (lease.id, lease.holder, since, lease.expires_at, lease.store_id, len(lease.asset_ids), *ids),
    )


def _read(transaction: Transaction, condition: str, values: Sequence[object]) -> list[Lease]:
    statement = f"SELECT asset_id, {_COLUMNS} FROM asset_leases WHERE {condition} ORDER BY acquired_at, id, asset_id"
    rows: dict[tuple[Any, ...], list[str]] = {}
    for asset_id, *lease in transaction.rows(statement, values):
        rows.setdefault(tuple(lease), []).append(asset_id)
    # an end that is no number never comes
    return [
        Lease(id, holder, tuple(asset_ids), since, ends if isinstance(ends, int) else None, store_id)
        for (id, holder, since, ends, store_id), asset_ids in rows.items()
    ]
