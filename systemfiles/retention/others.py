"""Assets that are no artifacts, such as disk images of a service: what is told of them, and why they are kept.

There may be very many: they are only looked for in the registry, and a list of them has an end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from systemfiles.registry.database import Row
from systemfiles.registry.registry import Registry
from systemfiles.registry.tombstones import Tombstones
from systemfiles.retention.outcome import UNHELD
from systemfiles.retention.reasons import Explanation, Reasons, in_use

_MOST = 1000
_HERE = """
    FROM asset_locations p JOIN assets a ON a.id = p.asset_id
    WHERE p.store_id = ? AND substr(p.path, 1, 7) <> 'system/'"""
_NAMED = "a.id = ? OR a.name = ? OR a.version = ? OR (? <> '' AND substr(a.checksum, 1, ?) = ?)"


class Others:
    """Those of one data directory. Reads without a trace."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def explain(self, subject: str, digest: str, *, young: int) -> Iterator[Explanation]:
        """Why those that have this id, name or version, or bytes of a digest that begins so, are kept or would go."""
        values = (subject, subject, subject, digest, len(digest), digest, _MOST)
        rows = self._rows(f"SELECT a.id {_HERE} AND ({_NAMED}) ORDER BY a.id LIMIT ?", *values)
        why = self._reasons([asset for (asset,) in rows], young)
        for (asset,) in rows:
            yield Explanation(asset, asset in why, why.get(asset, UNHELD))

    def usage(self, *, young: int) -> tuple[list[dict[str, str | int]], int]:
        """A row for each of the largest, and one for all smaller ones; and the bytes of all."""
        largest = self._rows(f"SELECT a.id, a.size_bytes {_HERE} ORDER BY a.size_bytes DESC, a.id LIMIT ?", _MOST)
        why = self._reasons([asset for asset, _ in largest], young)
        rows: list[dict[str, str | int]] = [
            {"what": asset, "size": size, "why": why.get(asset, UNHELD)} for asset, size in largest
        ]
        total = sum(size for _, size in largest)
        for count, size in self._rows(f"SELECT count(*), CAST(coalesce(sum(a.size_bytes), 0) AS BIGINT) {_HERE}"):
            if count > len(largest):
                what = f"{count - len(largest)} smaller assets"
                rows.append({"what": what, "size": size - total, "why": "gc --explain tells it of each"})
                total = size
        return rows, total

    def _rows(self, statement: str, *values: str | int) -> Sequence[Row]:
        if found := self._registry.look():
            database, store_id = found
            with database.reading() as transaction:
                return transaction.rows(statement, (store_id, *values))
        return ()

    def _reasons(self, assets: list[str], young: int) -> Reasons:
        if found := self._registry.look():
            return in_use(*Tombstones(*found).uses(assets, now=self._registry.now()), young=young)
        return {}
