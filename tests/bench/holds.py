"""What holding and freeing costs: leases beside hand-written SQL, pages of very many assets, collections of them.

The assets have no files: what is measured of a collection is what the registry does, which is all of it that grows.
"""

from __future__ import annotations

import multiprocessing
import resource
import sqlite3
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from measure import Row, alternate, calls, duration, row

from systemfiles.foundation.paths import Paths
from systemfiles.registry.assets import Asset, AssetType
from systemfiles.registry.query import list_assets
from systemfiles.registry.registry import Registry
from systemfiles.retention.holdings import Holdings
from systemfiles.retention.keeper import Keeper
from systemfiles.retention.outcome import Outcome

MILLION = 1_000_000
_FORK = multiprocessing.get_context("fork")
LEASES = 200
WRITERS = 4
ROUNDS = 7
NOW = 1_800_000_000
_SCHEMA = """
PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;
CREATE TABLE assets (id TEXT PRIMARY KEY, used INTEGER, holder TEXT);
CREATE TABLE leases (id TEXT PRIMARY KEY, asset TEXT REFERENCES assets (id), holder TEXT, at INTEGER, ends INTEGER);
INSERT INTO assets VALUES ('a', 0, '');
"""


def rows(work: Path) -> Iterator[Row]:
    """All that is measured, the quickest first; takes some minutes."""
    yield from _leases(work / "leases")
    yield from _pages(work / "pages")
    yield from _collections(work)


def _leases(place: Path) -> Iterator[Row]:
    registry = _registry(place)
    registry.assets.register(_asset("a"), store_id=registry.store_id, path="a")
    raw = sqlite3.connect(place / "raw.sqlite", isolation_level=None)
    raw.executescript(_SCHEMA)
    cost = alternate(
        calls(partial(_lease, registry), count=LEASES), calls(partial(_by_hand, raw), count=LEASES), rounds=ROUNDS
    )
    rate = 1 / cost.ratio
    aim = f"≥ 0.6x as fast, is {rate:.2f}x"
    yield row("acquire and release, durably", cost, "hand-written sqlite3, the same two", aim, rate >= 0.6)
    start = time.perf_counter()
    with _FORK.Pool(WRITERS) as pool:
        kept = sum(pool.map(partial(_write, place), range(WRITERS)))
    took = time.perf_counter() - start
    lost = WRITERS * LEASES - len(registry.leases.list(now=NOW))
    done = f"{kept} leases of {WRITERS} processes"
    yield Row(done, duration(took), f"{lost} lost, none saw it locked", "", "none lost", lost == 0)


def _lease(registry: Registry) -> None:
    lease = registry.leases.acquire(["a"], "vm", now=time.time(), ttl=60, store_id=registry.store_id)
    registry.leases.release(lease.id, now=time.time())


def _by_hand(raw: sqlite3.Connection) -> None:
    """What `_lease` promises: a lease on what is there, of which both its beginning and its end are uses."""
    now = int(time.time())
    raw.execute("BEGIN IMMEDIATE")
    raw.execute("UPDATE assets SET used = ?, holder = 'vm' WHERE id = 'a'", (now,))
    raw.execute("INSERT INTO leases VALUES (?, 'a', 'vm', ?, ?)", (str(time.time_ns()), now, now + 60))
    raw.execute("COMMIT")
    raw.execute("BEGIN IMMEDIATE")
    raw.execute("UPDATE assets SET used = ? WHERE id = 'a'", (now,))
    raw.execute("DELETE FROM leases WHERE asset = 'a'")
    raw.execute("COMMIT")


def _write(place: Path, writer: int) -> int:
    registry = _registry(place)
    for number in range(LEASES):
        registry.leases.acquire(["a"], f"vm-{writer}-{number}", now=NOW, store_id=registry.store_id)
    return LEASES


def _pages(place: Path) -> Iterator[Row]:
    registry = _registry(place)
    _fill(registry, MILLION)
    database = registry.database
    for what, labels in (
        ("10 have", {"rare": "yes"}),
        ("500,000 have", {"half": "0"}),
        ("10 have, and 500,000", {"rare": "yes", "half": "0"}),
        ("500,000 have, and 333,333", {"half": "0", "third": "0"}),
    ):
        took = median(_page(database, labels) for _ in range(ROUNDS))
        yield Row(
            f"a page of a label that {what}", duration(took), f"among {MILLION} assets", "", "≤ 10 ms", took <= 0.01
        )
    token = ""
    for _ in range(999):
        token = list_assets(database, now=NOW, labels={"half": "0"}, token=token).next_token
    first = median(_page(database, {"half": "0"}) for _ in range(ROUNDS))
    last = median(_page(database, {"half": "0"}, token) for _ in range(ROUNDS))
    yield Row(
        "its page 1,000",
        duration(last),
        f"{duration(first)}  its page 1",
        f"{last / first:.2f}x",
        "≤ 3x",
        last <= 3 * first,
    )


def _page(database: object, labels: dict[str, str], token: str = "") -> float:
    start = time.perf_counter()
    list_assets(database, now=NOW, labels=labels, token=token)  # type: ignore[arg-type]
    return time.perf_counter() - start


def _collections(work: Path) -> Iterator[Row]:
    each: list[float] = []
    for count in (10_000, 100_000, MILLION):
        took, memory = _in_its_own_process(work / f"collect-{count}", count)
        each.append(took / count)
        growth = f"{each[-1] / each[0]:.2f}x the first, for each asset"
        aim = f"linear, ≤ 200 MB, is {memory:.0f}"
        yield Row(f"collection of {count} assets", duration(took), growth, "", aim, memory <= 200)


def _in_its_own_process(place: Path, count: int) -> tuple[float, float]:
    """Seconds, and MB of memory at most."""
    with _FORK.Pool(1) as pool:
        return pool.apply(_collect, (place, count))


def _collect(place: Path, count: int) -> tuple[float, float]:
    registry = _registry(place)
    _fill(registry, count)
    keeper = Keeper(_holdings(place))
    start = time.perf_counter()
    outcome = Outcome()
    keeper.collector.collect((), {}, young=NOW, outcome=outcome)
    took = time.perf_counter() - start
    assert outcome.count == count, outcome.count
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def _fill(registry: Registry, count: int) -> None:
    """So many assets, a thousand for each second, without files."""
    store, database = registry.store_id, registry.database
    columns = (
        "id, name, type, status, backend, location, size_bytes, checksum, created_by, created_at, last_accessed_at, "
        "last_held_by, build_id, source_image, version, tag, tags, metadata, public_url, file_info, assets_db_id"
    )
    for start in range(0, count, 10_000):
        with database.writing() as transaction:
            for number in range(start, min(start + 10_000, count)):
                asset, made = f"{number:08}", NOW - 2000 + number // 1000
                transaction.execute(
                    f"INSERT INTO assets ({columns}) VALUES "
                    "(?, 'n', 'rootfs', 'available', 'local', ?, 1, '', '', ?, ?, "
                    "'', '', '', '', '', '[]', '{}', '', '{}', '')",
                    (asset, asset, made, made),
                )
                transaction.execute(
                    "INSERT INTO asset_locations (asset_id, store_id, path, state) VALUES (?, ?, ?, 'present')",
                    (asset, store, f"assets/{asset}"),
                )
                labels = {"half": str(number % 2), "third": str(number % 3)}
                labels |= {"rare": "yes"} if number % (count // 10) == 0 else {}
                for label, value in labels.items():
                    transaction.execute(
                        "INSERT INTO asset_labels (asset_id, label, value, created_at) VALUES (?, ?, ?, ?)",
                        (asset, label, value, made),
                    )


def _asset(name: str) -> Asset:
    return Asset(name, name, AssetType.ROOTFS, name, 1, "0" * 64, NOW, NOW)


def _registry(place: Path) -> Registry:
    return Registry(Paths(place))


def _holdings(place: Path) -> Holdings:
    from systemfiles.content.artifacts import Artifacts

    return Holdings(Paths(place), Artifacts(Paths(place)))
