"""Leases: who holds which assets, and until when.

A lease is one row for each of its assets, all with one id. It holds from the transaction that adds it, which is also
the one that finds the assets there, to the second in which it expires or is released.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from systemfiles.foundation.errors import AssetNotFound, LeaseNotFound, UsageError
from systemfiles.registry.assets import LATER, LIVE
from systemfiles.registry.database import Database, Transaction
from systemfiles.registry.ulid import new_ulid

LATEST = (1 << 53) - 1
"""The last second that every consumer of JSON can tell from the one before."""

_HOLDER_MAX = 255


@dataclass(frozen=True, slots=True)
class Lease:
    """One lease. Times are UTC seconds; `expires_at` None is without end."""

    id: str
    holder: str
    asset_ids: tuple[str, ...]
    acquired_at: int
    expires_at: int | None

    def expired(self, now: int) -> bool:
        """Whether it has ended; it holds until the second before `expires_at`."""
        return self.expires_at is not None and self.expires_at <= now


def expiry(now: int, ttl: float | None) -> int | None:
    """When a lease ends that holds for `ttl` seconds; None and 0 are without end. Raises UsageError."""
    if ttl is None or ttl == 0:
        return None
    if not 0 < ttl <= LATEST - now:
        msg = f"a lease cannot be for {ttl!r} seconds"
        raise UsageError(msg, details=[("allowed", "a positive number, or 0 for a lease without end")])
    return now + max(1, int(ttl))


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

        Raises AssetNotFound for one that is not there any more, UsageError.
        """
        if not 0 < len(holder) <= _HOLDER_MAX or not holder.isprintable():
            msg = f"{holder!r:.300} cannot be the holder of a lease"
            raise UsageError(msg, details=[("allowed", f"1 to {_HOLDER_MAX} printable characters")])
        second = int(now)
        lease = Lease(lease_id or new_ulid(now), holder, tuple(sorted(set(asset_ids))), second, expiry(second, ttl))
        with self._database.writing() as transaction:
            for asset_id in lease.asset_ids:  # in their order, so that two such transactions never wait for each other
                _hold(transaction, lease, asset_id, store_id)
        return lease

    def renew(self, lease_id: str, *, now: float, ttl: float | None = None) -> Lease:
        """Lets the lease end `ttl` seconds from now. Raises LeaseNotFound, for one that has ended too; UsageError."""
        ends = expiry(int(now), ttl)
        statement = f"UPDATE asset_leases SET expires_at = ? WHERE id = ? AND {LIVE}"
        with self._database.writing() as transaction:
            if not transaction.execute(statement, (ends, lease_id, int(now))):
                raise LeaseNotFound(lease_id)
            return _read(transaction, "id = ?", (lease_id,))[0]

    def release(self, lease_id: str, *, now: float) -> None:
        """Ends the lease. Raises LeaseNotFound, for one that has ended too."""
        with self._database.writing() as transaction:
            if not transaction.execute(f"DELETE FROM asset_leases WHERE id = ? AND {LIVE}", (lease_id, int(now))):
                raise LeaseNotFound(lease_id)

    def list(
        self,
        *,
        now: float,
        lease_id: str | None = None,
        asset_id: str | None = None,
        holder: str | None = None,
        prefix: str | None = None,
    ) -> tuple[Lease, ...]:
        """The live leases, oldest first: all, or those with this id, on this asset, of this holder, or of holders whose
        names begin with `prefix`."""
        asked: dict[str, object] = {
            LIVE: int(now),
            "id = ?": lease_id,
            "id IN (SELECT id FROM asset_leases WHERE asset_id = ?)": asset_id,
            "acquired_by = ?": holder,
            "substr(acquired_by, 1, length(?)) = ?": prefix,
        }
        conditions = [condition for condition, value in asked.items() if value is not None]
        values = [value for condition, value in asked.items() if value is not None for _ in range(condition.count("?"))]
        with self._database.reading() as transaction:
            return tuple(_read(transaction, " AND ".join(conditions), values))


def _hold(transaction: Transaction, lease: Lease, asset_id: str, store_id: str) -> None:
    # The update comes first: it locks the row, so that who condemns it (tombstones.py) comes before this or after it.
    held = transaction.execute(
        f"UPDATE assets SET last_held_by = ?, last_accessed_at = {LATER} WHERE id = ? AND status = 'available'",
        (lease.holder, lease.acquired_at, lease.acquired_at, asset_id),
    )
    if held and store_id:
        place = "SELECT 1 FROM asset_locations WHERE asset_id = ? AND store_id = ?"
        held = len(transaction.rows(place, (asset_id, store_id)))
    if not held:
        raise AssetNotFound(asset_id)
    transaction.execute(
        """INSERT INTO asset_leases (id, asset_id, store_id, acquired_by, acquired_at, expires_at)
           VALUES (?, ?, ?, ?, ?, ?)""",
        (lease.id, asset_id, store_id, lease.holder, lease.acquired_at, lease.expires_at),
    )


def _read(transaction: Transaction, condition: str, values: Iterable[object]) -> list[Lease]:
    statement = f"""SELECT id, acquired_by, asset_id, acquired_at, expires_at FROM asset_leases
                    WHERE {condition} ORDER BY acquired_at, id, asset_id"""
    leases: dict[str, Lease] = {}
    for lease_id, holder, asset_id, acquired_at, ends in transaction.rows(statement, tuple(values)):
        before = leases[lease_id].asset_ids if lease_id in leases else ()
        # an unreadable end never comes
        leases[lease_id] = Lease(
            lease_id, holder, (*before, asset_id), acquired_at, ends if isinstance(ends, int) else None
        )
    return [*leases.values()]
