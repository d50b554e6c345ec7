"""How assets leave: their rows become tombstones in one transaction, their bytes go afterwards, the tombstones last.

So a crash may leave a tombstone, which the next collection carries out, and never a row without its bytes. A batch is
small, because nobody can acquire anything while it is on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from systemfiles.foundation.errors import AssetInUse
from systemfiles.registry.assets import LIVE, batches
from systemfiles.registry.database import Database, Transaction, marks
from systemfiles.registry.ulid import new_ulid

BATCH = 200


@dataclass(frozen=True, slots=True)
class Tombstone:
    """An asset that has lost its row; its bytes are at `path` in the store until they are removed."""

    id: str
    asset_id: str
    name: str
    path: str
    size_bytes: int
    reason: str
    last_held_by: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """An asset that nobody holds and that was not accessed for some time."""

    id: str
    path: str
    last_accessed_at: int


class Tombstones:
    """The assets of one store that are on their way out."""

    def __init__(self, database: Database, store_id: str) -> None:
        self._database = database
        self._store = store_id

    def candidates(self, *, now: int, unused_since: int) -> Iterator[list[Candidate]]:
        """In batches, oldest first: what no live lease holds and was last accessed at `unused_since` or before."""
        after: tuple[int, str] = (-(1 << 62), "")
        while True:
            with self._database.reading() as transaction:
                rows = transaction.rows(_CANDIDATES, (self._store, unused_since, *after, self._store, now, BATCH))
            if not rows:
                return
            yield [Candidate(*row) for row in rows]
            after = (rows[-1][2], rows[-1][0])

    def uses(self, ids: Collection[str], *, now: int) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
        """By id: who holds these assets with a live lease, and when they were last accessed."""
        holders: dict[str, list[str]] = {}
        accessed: dict[str, int] = {}
        with self._database.reading() as transaction:
            for batch in batches(ids):
                among = f"asset_id IN ({marks(batch)})"
                for asset_id, holder in transaction.rows(
                    f"SELECT asset_id, acquired_by FROM asset_leases WHERE {among} AND store_id IN ('', ?) AND {LIVE}",
                    (*batch, self._store, now),
                ):
                    holders.setdefault(asset_id, []).append(holder)
                accessed |= dict(
                    transaction.rows(f"SELECT id, last_accessed_at FROM assets WHERE id IN ({marks(batch)})", batch)
                )
        return {asset_id: tuple(sorted(names)) for asset_id, names in holders.items()}, accessed

    def condemn(
        self, ids: Collection[str], *, reason: str, now: float, unused_since: int | None = None
    ) -> tuple[Tombstone, ...]:
        """Turns the rows of those that nobody holds into tombstones; the others stay as they are.

        With `unused_since`, those that were accessed after it stay as well.
        """
        with self._database.writing() as transaction:
            return self._condemn(transaction, sorted(ids), reason, now, unused_since)

    def delete(self, asset_id: str, *, now: float, force: bool = False) -> tuple[Tombstone, ...]:
        """Condemns one asset; with `force` its leases end. Empty when it is not there. Raises AssetInUse."""
        with self._database.writing() as transaction:
            if force:
                transaction.execute("DELETE FROM asset_leases WHERE asset_id = ?", (asset_id,))
            elif holders := transaction.rows(_HOLDERS, (asset_id, self._store, int(now))):
                raise AssetInUse(asset_id, leases=len(holders), holders=sorted({row[0] for row in holders})[:10])
            return self._condemn(transaction, [asset_id], "deleted", now, None)

    def pending(self) -> tuple[Tombstone, ...]:
        """What has lost its row and perhaps not yet its bytes, oldest first."""
        with self._database.reading() as transaction:
            rows = transaction.rows(f"SELECT {_COLUMNS} FROM tombstones WHERE store_id = ? ORDER BY id", (self._store,))
        return tuple(Tombstone(*row) for row in rows)

    def drop(self, ids: Sequence[str]) -> None:
        """Forgets tombstones, once the bytes are gone."""
        with self._database.writing() as transaction:
            transaction.execute(f"DELETE FROM tombstones WHERE id IN ({marks(ids)})", ids)

    def _condemn(
        self, transaction: Transaction, ids: Sequence[str], reason: str, now: float, unused_since: int | None
    ) -> tuple[Tombstone, ...]:
        if not ids:
            return ()
        # Locks the rows, in every database: whoever acquires one of them has done so, or comes too late.
        transaction.execute(f"UPDATE assets SET id = id WHERE id IN ({marks(ids)})", ids)
        latest = (1 << 62) if unused_since is None else unused_since
        found = transaction.rows(_FREE.format(ids=marks(ids)), (self._store, *ids, latest, self._store, int(now)))
        stones = [
            Tombstone(new_ulid(now), asset_id, name, path, size, reason, held, int(now))
            for asset_id, name, path, size, held in found
        ]
        for stone in stones:
            _bury(transaction, stone, self._store)
        return tuple(stones)


_COLUMNS = "id, asset_id, name, path, size_bytes, reason, last_held_by, created_at"
_HELD = f"SELECT 1 FROM asset_leases l WHERE l.asset_id = a.id AND l.store_id IN ('', ?) AND {LIVE}"
_HOLDERS = f"SELECT acquired_by FROM asset_leases WHERE asset_id = ? AND store_id IN ('', ?) AND {LIVE}"
_CANDIDATES = f"""
    SELECT a.id, p.path, a.last_accessed_at
    FROM assets a JOIN asset_locations p ON p.asset_id = a.id AND p.store_id = ?
    WHERE a.last_accessed_at <= ? AND (a.last_accessed_at, a.id) > (?, ?) AND NOT EXISTS ({_HELD})
    ORDER BY a.last_accessed_at, a.id LIMIT ?"""
_FREE = f"""
    SELECT a.id, a.name, p.path, a.size_bytes, a.last_held_by
    FROM assets a JOIN asset_locations p ON p.asset_id = a.id AND p.store_id = ?
    WHERE a.id IN ({{ids}}) AND a.last_accessed_at <= ? AND NOT EXISTS ({_HELD}) ORDER BY a.id"""


def _bury(transaction: Transaction, stone: Tombstone, store_id: str) -> None:
    transaction.execute(
        f"INSERT INTO tombstones ({_COLUMNS}, store_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*(getattr(stone, name) for name in _COLUMNS.split(", ")), store_id),
    )
    transaction.execute("DELETE FROM asset_locations WHERE asset_id = ? AND store_id = ?", (stone.asset_id, store_id))
    elsewhere = transaction.rows("SELECT 1 FROM asset_locations WHERE asset_id = ?", (stone.asset_id,))
    if not elsewhere:
        transaction.execute("DELETE FROM asset_leases WHERE asset_id = ?", (stone.asset_id,))  # they have expired
        transaction.execute("DELETE FROM assets WHERE id = ?", (stone.asset_id,))
