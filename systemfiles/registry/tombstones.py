"""How assets leave: their rows become tombstones in one transaction, their bytes go afterwards, the tombstones last.

So a crash may leave a tombstone, which the next collection carries out, and never a row without its bytes. A batch is
small, because nobody can acquire any of it while it is on its way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, fields

from systemfiles.foundation.errors import AssetInUse
from systemfiles.registry.assets import LIVE, batches, lock
from systemfiles.registry.database import BIGGEST, Database, Transaction, marks
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
    """An asset that nobody holds, or held or accessed for some time."""

    id: str
    path: str
    size_bytes: int
    last_held_by: str
    last_accessed_at: int


class Tombstones:
    """The assets of one store that are on their way out."""

    def __init__(self, database: Database, store_id: str) -> None:
        self._database = database
        self._store = store_id

    def candidates(self, *, now: int, unused_since: int) -> Iterator[list[Candidate]]:
        """In batches, oldest first: what no live lease holds, and nobody accessed or held after `unused_since`."""
        since = min(now, unused_since)
        after: tuple[int, str] = (-BIGGEST, "")
        while True:
            with self._database.reading() as transaction:
                rows = transaction.rows(_CANDIDATES, (self._store, unused_since, *after, self._store, since, BATCH))
            if not rows:
                return
            yield [Candidate(*row) for row in rows]
            after = (rows[-1][-1], rows[-1][0])

    def uses(self, ids: Collection[str], *, now: int) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
        """By id: who holds these assets with a live lease, and when they were last accessed, or a lease ended."""
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
                rows = transaction.rows(
                    f"SELECT id, last_accessed_at, ({_ENDED}) FROM assets a WHERE id IN ({marks(batch)})",
                    (self._store, now, *batch),
                )
                accessed |= {asset_id: max(last, ended or last) for asset_id, last, ended in rows}
        return {asset_id: tuple(sorted(names)) for asset_id, names in holders.items()}, accessed

    def condemn(
        self, ids: Collection[str], *, reason: str, now: float, unused_since: int | None = None
    ) -> tuple[Tombstone, ...]:
        """Turns the rows of those that nobody holds into tombstones; the others stay as they are.

        With `unused_since`, those that were accessed or held after it stay as well.
        """
        latest = BIGGEST if unused_since is None else unused_since
        since = min(int(now), latest)
        stones: list[Tombstone] = []
        with self._database.writing() as transaction:
            for batch in batches(sorted(ids), BATCH):
                lock(transaction, batch)
                clause, held = f"a.id IN ({marks(batch)}) AND a.last_accessed_at <= ?", f"NOT EXISTS ({_HELD})"
                values = (*batch, latest, self._store, since)
                stones += self._bury(transaction, f"{clause} AND {held}", values, reason, now)
        return tuple(stones)

    def delete(self, asset_id: str, *, now: float, force: bool = False) -> tuple[Tombstone, ...]:
        """Condemns this store's copy of one asset; with `force` the leases on it end.

        Empty when it is not there, or has no bytes anywhere; a row without bytes goes at once. Raises AssetInUse.
        """
        with self._database.writing() as transaction:
            lock(transaction, [asset_id])
            holders = [] if force else transaction.rows(_HOLDERS, (asset_id, self._store, int(now)))
            if holders:
                raise AssetInUse(asset_id, leases=len(holders), holders=sorted({row[0] for row in holders})[:10])
            stones = self._bury(transaction, "a.id = ?", (asset_id,), "deleted", now)
            self._forget(transaction, [asset_id])
        return stones

    def pending(self) -> Iterator[list[Tombstone]]:
        """In batches, oldest first: what has lost its row by now, and perhaps not yet its bytes."""
        with self._database.reading() as transaction:
            ((last,),) = transaction.rows("SELECT max(id) FROM tombstones WHERE store_id = ?", (self._store,))
        after, last = "", last or ""
        while after < last:
            with self._database.reading() as transaction:
                rows = transaction.rows(_PENDING, (self._store, after, last, BATCH))
            if not rows:
                return
            yield [Tombstone(*row) for row in rows]
            after = rows[-1][0]

    def drop(self, ids: Sequence[str]) -> None:
        """Forgets tombstones, once the bytes are gone."""
        with self._database.writing() as transaction:
            for batch in batches(ids):
                transaction.execute(
                    f"DELETE FROM tombstones WHERE id IN ({marks(batch)}) AND store_id = ?", (*batch, self._store)
                )

    def _bury(
        self, transaction: Transaction, condition: str, values: Sequence[object], reason: str, now: float
    ) -> tuple[Tombstone, ...]:
        """Makes tombstones of this store's copies of assets, which are locked; their rows go with the last copy."""
        found = transaction.rows(f"{_COPIES} WHERE {condition} ORDER BY a.id", (self._store, *values))
        stones = tuple(
            Tombstone(new_ulid(now), asset_id, name, path, size, reason, held, int(now))
            for asset_id, name, path, size, held in found
        )
        for stone in stones:
            transaction.execute(
                f"INSERT INTO tombstones ({_COLUMNS}, store_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*astuple(stone), self._store),
            )
        if ids := [stone.asset_id for stone in stones]:
            among = f"asset_id IN ({marks(ids)}) AND store_id = ?"
            transaction.execute(f"DELETE FROM asset_locations WHERE {among}", (*ids, self._store))
            transaction.execute(f"DELETE FROM asset_leases WHERE {among}", (*ids, self._store))
            self._forget(transaction, ids)
        return stones

    def _forget(self, transaction: Transaction, ids: Sequence[str]) -> None:
        """Removes the rows of those that no store has, and with them leases of whatever store."""
        for table, column in (("asset_leases", "asset_id"), ("assets", "id")):
            elsewhere = f"SELECT 1 FROM asset_locations p WHERE p.asset_id = {table}.{column}"
            transaction.execute(
                f"DELETE FROM {table} WHERE {column} IN ({marks(ids)}) AND NOT EXISTS ({elsewhere})", ids
            )


_COLUMNS = ", ".join(each.name for each in fields(Tombstone))
_PENDING = f"SELECT {_COLUMNS} FROM tombstones WHERE store_id = ? AND id > ? AND id <= ? ORDER BY id LIMIT ?"
_HELD = f"SELECT 1 FROM asset_leases l WHERE l.asset_id = a.id AND l.store_id IN ('', ?) AND {LIVE}"
_ENDED = """
    SELECT max(expires_at) FROM asset_leases l
    WHERE l.asset_id = a.id AND l.store_id IN ('', ?) AND expires_at <= ?"""
_HOLDERS = f"SELECT acquired_by FROM asset_leases WHERE asset_id = ? AND store_id IN ('', ?) AND {LIVE}"
_COPIES = """
    SELECT a.id, a.name, p.path, a.size_bytes, a.last_held_by
    FROM assets a JOIN asset_locations p ON p.asset_id = a.id AND p.store_id = ?"""
# CROSS JOIN keeps SQLite's planner from reading all places for each batch
_CANDIDATES = f"""
    SELECT a.id, p.path, a.size_bytes, a.last_held_by, a.last_accessed_at
    FROM assets a CROSS JOIN asset_locations p
    WHERE p.asset_id = a.id AND p.store_id = ?
        AND a.last_accessed_at <= ? AND (a.last_accessed_at, a.id) > (?, ?) AND NOT EXISTS ({_HELD})
    ORDER BY a.last_accessed_at, a.id LIMIT ?"""
