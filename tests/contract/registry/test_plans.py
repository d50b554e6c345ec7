"""Among a hundred thousand assets, nothing that is asked often reads a table from its beginning to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from systemfiles.registry.assets import Assets, AssetStatus, AssetType
from systemfiles.registry.database import Database
from systemfiles.registry.leases import Leases
from systemfiles.registry.postgresql import PostgreSQL
from systemfiles.registry.query import list_assets
from systemfiles.registry.schema import upgrade
from systemfiles.registry.sqlite import SQLite
from systemfiles.registry.tombstones import Tombstones
from tests.contract.registry.support import STORE, Base, asset, pending
from tests.postgres import Server

COUNT = 100_000
HELD = 20_000
OTHER = "another store"
Statement = tuple[str, Sequence[object]]

_SERIES = {
    "sqlite": "WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers LIMIT {count}) {insert}",
    "postgresql": "WITH numbers (n) AS (SELECT generate_series(0, {count} - 1)) {insert}",
}
_ROWS = (
    """INSERT INTO assets SELECT 'a' || n, 'name', CASE WHEN n % 1000 = 0 THEN 'initrd' ELSE 'kernel' END,
       CASE WHEN n % 5000 = 0 THEN 'error' ELSE 'available' END, 'local', '', 1, '', '', 1000 + n / 3, 1000 + n, '', '',
       '', '', '', '[]', '{{}}', '', '{{}}', '' FROM numbers""",
    "INSERT INTO asset_labels SELECT 'a' || n, 'all', 'yes', 1000 + n / 3 FROM numbers",
    "INSERT INTO asset_labels SELECT 'a' || n, 'some', 'v' || n % 10000, 1000 + n / 3 FROM numbers",
    f"INSERT INTO asset_locations SELECT 'a' || n, '{STORE}', 'p' || n, 'present' FROM numbers",
)
_LEASES = f"INSERT INTO asset_leases SELECT 'l' || n, 'a' || n, '{STORE}', 'vm-' || n, 1000, NULL, 1 FROM numbers"
_TOMBSTONES = f"INSERT INTO tombstones SELECT 't' || n, '{OTHER}', 'x' || n, '', '', 1, '', '', 1000 FROM numbers"


class Recorded:
    """What a database was asked, and how it goes about it."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.asked: list[Statement] = []
        kind: type[Database] = PostgreSQL if base.kind == "postgresql" else SQLite
        asked = self.asked

        class Recording(kind):  # type: ignore[valid-type, misc]
            def _run(self, connection: Any, statement: str, values: Sequence[object]) -> Any:
                asked.append((statement, tuple(values)))
                return super()._run(connection, statement, values)

        self.database: Database = Recording(base.url if base.kind == "postgresql" else base.file)

    def whole_tables(self) -> list[str]:
        """What of that reads a table, or an index without a beginning and an end or an order, from end to end."""
        found = []
        for statement, values in self.asked:
            for step in self._plan(statement, values):
                found.append(f"{step} <- {' '.join(statement.split())}")
        self.asked.clear()
        return found

    def _plan(self, statement: str, values: Sequence[object]) -> Iterator[str]:
        if self.base.kind == "sqlite":
            for *_, step in self.base.sql(f"EXPLAIN QUERY PLAN {statement}", *values):
                ordered = "ORDER BY" in statement and "LIMIT" in statement and "USING" in step
                if step.startswith("SCAN") and step not in ("SCAN counted", "SCAN CONSTANT ROW") and not ordered:
                    yield step
                if "TEMP B-TREE FOR ORDER BY" in step and "LIMIT" in statement:
                    yield step
            return
        ((plan,),) = self.base.sql(f"EXPLAIN (FORMAT JSON) {statement}", *values)
        for node in _nodes((json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]):
            if node["Node Type"] == "Seq Scan":
                yield f"Seq Scan on {node['Relation Name']}"


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from _nodes(inner)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def crowd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    if request.param == "sqlite":
        base = Base("sqlite", f"sqlite:///{tmp_path_factory.mktemp('crowd')}/registry.sqlite")
    else:
        server: Server = request.getfixturevalue("postgres")
        base = Base("postgresql", server.new_database())
    upgrade(base.open())
    counted = [*((insert, COUNT) for insert in _ROWS), (_LEASES, HELD), (_TOMBSTONES, HELD)]
    for insert, count in counted:
        base.sql(_SERIES[base.kind].format(count=count, insert=insert.replace("{{}}", "{}")))
    if base.kind == "postgresql":
        base.sql("VACUUM ANALYZE")  # as autovacuum does in time
    return Recorded(base)


CALLS: dict[str, Callable[[Database], object]] = {
    "get": lambda database: Assets(database).get("a5", now=9999),
    "get without access": lambda database: Assets(database).get("a5", now=9999, access=False),
    "update": lambda database: Assets(database).update("a5", now=9999, name="x", labels={"all": "yes"}),
    "register": lambda database: Assets(database).register(asset("new"), store_id=STORE, path="p"),
    "acquire": lambda database: Leases(database).acquire(
        ["a30001", "a30002"], "vm", now=9999, ttl=5, store_id=STORE, lease_id="mine"
    ),
    "renew": lambda database: Leases(database).renew("l11", now=9999, ttl=50),
    "leases by id": lambda database: Leases(database).list(now=9999, lease_id="l7"),
    "leases of an asset": lambda database: Leases(database).list(now=9999, asset_id="a7"),
    "leases of a holder": lambda database: Leases(database).list(now=9999, holder="vm-7", store_id=STORE),
    "leases by prefix": lambda database: Leases(database).list(now=9999, prefix="pin:"),
    "release": lambda database: Leases(database).release("l13", now=9999),
    "first page": lambda database: list_assets(database, now=9999),
    "later page": lambda database: list_assets(
        database, now=9999, token=list_assets(database, now=9999, size=1000).next_token
    ),
    "page of a rare type": lambda database: list_assets(database, now=9999, type=AssetType.INITRD),
    "page of a rare status": lambda database: list_assets(database, now=9999, status=AssetStatus.ERROR),
    "page of a rare label": lambda database: list_assets(database, now=9999, labels={"some": "v7"}),
    "page of a common label": lambda database: list_assets(database, now=9999, labels={"all": "yes"}),
    "page of two labels": lambda database: list_assets(database, now=9999, labels={"all": "yes", "some": "v7"}),
    "later page of a label": lambda database: list_assets(
        database, now=9999, labels={"all": "yes"}, token=list_assets(database, now=9999, size=1000).next_token
    ),
    "candidates": lambda database: next(Tombstones(database, STORE).candidates(now=9999, unused_since=1 << 40)),
    "uses": lambda database: Tombstones(database, STORE).uses(["a1", "a2", "a30003"], now=9999),
    "condemn": lambda database: Tombstones(database, STORE).condemn(["a1", "a40001", "a40002"], reason="", now=9999),
    "delete": lambda database: Tombstones(database, STORE).delete("a40003", now=9999),
    "force": lambda database: Tombstones(database, STORE).delete("a9", now=9999, force=True),
    "pending": lambda database: pending(Tombstones(database, OTHER)),
    "drop": lambda database: Tombstones(database, OTHER).drop(["t5", "t6"]),
}


@pytest.mark.parametrize("call", CALLS)  # each by itself: they may run in any order, and on several processors
def test_no_table_is_read_from_end_to_end(crowd: Recorded, call: str) -> None:
    CALLS[call](crowd.database)
    assert crowd.asked
    assert crowd.whole_tables() == []
