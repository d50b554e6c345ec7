"""Assets: what is known of each, and where its bytes are. How the tables look is in migrations/versions.

Whoever adds or changes leases of an asset, changes it, or condemns it, has its row locked: so one comes after another.
Rows are locked in the order of their ids, so that no two wait for each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from systemfiles.foundation.errors import AssetExists, AssetNotFound, StoreError, UsageError
from systemfiles.foundation.paths import check_asset_path
from systemfiles.registry.database import Database, Transaction, marks

LIVE = "(expires_at IS NULL OR expires_at > ?)"
"""Whether a lease holds, for now. SQLite orders every text behind all numbers: an unreadable end keeps the lease."""

_ID = re.compile(r"[^\x00-\x1f\x7f]{1,255}")
_LABEL_BYTES, _VALUE_BYTES, _PATH_BYTES = 255, 1024, 1024
"""With an id, or that of a store, what fits into one entry of an index of PostgreSQL: 2704 bytes."""


class AssetType(StrEnum):
    KERNEL = "kernel"
    ROOTFS = "rootfs"
    INITRD = "initrd"
    DISK_IMAGE = "disk_image"


class AssetStatus(StrEnum):
    UPLOADING = "uploading"
    AVAILABLE = "available"
    DELETING = "deleting"
    ERROR = "error"


class Backend(StrEnum):
    LOCAL = "local"
    S3 = "s3"
    HTTP = "http"
    NFS = "nfs"


@dataclass(frozen=True, slots=True)
class Asset:
    """One asset. `checksum` is the sha256 of its bytes in hex, `size_bytes` their number, times are UTC seconds.

    `reference_count` is the number of its live leases, counted when it was read; `last_held_by` the holder of the last.
    """

    id: str
    name: str
    type: AssetType
    location: str
    size_bytes: int
    checksum: str
    created_at: int
    last_accessed_at: int
    status: AssetStatus = AssetStatus.AVAILABLE
    backend: Backend = Backend.LOCAL
    created_by: str = ""
    last_held_by: str = ""
    build_id: str = ""
    source_image: str = ""
    version: str = ""
    tag: str = ""
    tags: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    public_url: str = ""
    file_info: Mapping[str, Any] = field(default_factory=dict)
    assets_db_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    reference_count: int = 0


_COLUMNS = tuple(each.name for each in fields(Asset) if each.name not in ("labels", "reference_count"))
_SELECT = f"""SELECT {", ".join(f"a.{name}" for name in _COLUMNS)},
    (SELECT count(*) FROM asset_leases WHERE asset_id = a.id AND {LIVE})"""
_INSERT = f"INSERT INTO assets ({', '.join(_COLUMNS)}) VALUES ({marks(_COLUMNS)})"
_INTEGERS = frozenset(("size_bytes", "created_at", "last_accessed_at"))
_JSON = frozenset(("tags", "metadata", "file_info"))
_ENUMS = {"type": AssetType, "status": AssetStatus, "backend": Backend}
_FIXED = frozenset(("id", "created_at", "reference_count", "last_held_by"))


def lock(transaction: Transaction, ids: Iterable[str]) -> None:
    """Until the transaction ends nobody else holds, changes or condemns these, those of them that are there."""
    if transaction.for_update:
        for batch in batches(sorted({*ids})):
            among = f"id IN ({marks(batch)})"
            transaction.rows(f"SELECT 1 FROM assets WHERE {among} ORDER BY id {transaction.for_update}", batch)


def insert(transaction: Transaction, asset: Asset) -> None:
    """Adds `asset`. Raises UsageError, and AssetExists when it is there: then nobody removes it meanwhile."""
    values = _values(asset)
    if not _ID.fullmatch(asset.id):
        msg = f"{asset.id[:300]!r} cannot be the id of an asset"
        raise UsageError(msg, details=[("allowed", "1 to 255 characters, none of them a control character")])
    while transaction.execute(f"{_INSERT} ON CONFLICT DO NOTHING", values) != 1:
        if transaction.rows(f"SELECT 1 FROM assets WHERE id = ? {transaction.for_update}", (asset.id,)):
            raise AssetExists(asset.id)
    _insert_labels(transaction, asset)


def locate(transaction: Transaction, asset_id: str, store_id: str, path: str) -> None:
    """Says that `store_id` has the asset's bytes under `path`."""
    transaction.execute(
        """INSERT INTO asset_locations (asset_id, store_id, path, state) VALUES (?, ?, ?, 'present')
           ON CONFLICT (asset_id, store_id) DO UPDATE SET path = excluded.path, state = 'present'""",
        (asset_id, store_id, path),
    )


def _locate_alone(transaction: Transaction, asset_id: str, store_id: str, path: str) -> None:
    """As `locate`, of an asset that is new. Raises UsageError for a path that is another's, or not yet free again."""
    taken = "INSERT INTO asset_locations (asset_id, store_id, path, state) VALUES (?, ?, ?, 'present')"
    place = "WHERE store_id = ? AND path = ?"
    while transaction.execute(f"{taken} ON CONFLICT DO NOTHING", (asset_id, store_id, path)) != 1:
        for (owner,) in transaction.rows(f"SELECT asset_id FROM asset_locations {place}", (store_id, path)):
            msg = f"{path!r:.200} is the file of asset {owner!r:.300}"
            raise UsageError(msg, hint="give each asset a file of its own")
    # last: who took the path out of the way meanwhile has left a tombstone
    for (owner,) in transaction.rows(f"SELECT asset_id FROM tombstones {place} LIMIT 1", (store_id, path)):
        msg = f"{path!r:.200} is still to be removed with asset {owner!r:.300}, which was there before"
        raise UsageError(msg, hint="give it another path; or collect first, and write the file again then")


def find(transaction: Transaction, asset_id: str, now: int) -> Asset:
    """The asset as it is. Raises AssetNotFound."""
    found = select(transaction, "FROM assets a WHERE a.id = ?", (asset_id,), now)
    if not found:
        raise AssetNotFound(asset_id)
    return found[0]


def select(transaction: Transaction, clause: str, values: Sequence[object], now: int) -> list[Asset]:
    """The assets of a query that begins with `FROM assets a`, with their labels."""
    rows = transaction.rows(f"{_SELECT} {clause}", (now, *values))
    labels: dict[str, dict[str, str]] = {row[0]: {} for row in rows}
    for ids in batches(labels):
        statement = f"SELECT asset_id, label, value FROM asset_labels WHERE asset_id IN ({marks(ids)}) ORDER BY label"
        for asset_id, label, value in transaction.rows(statement, ids):
            labels[asset_id][label] = value
    return [_asset(row, labels[row[0]]) for row in rows]


def batches(ids: Iterable[str], size: int = 500) -> Iterator[tuple[str, ...]]:
    """`ids` in tuples of at most `size`."""
    every = tuple(ids)
    for start in range(0, len(every), size):
        yield every[start : start + size]


class Assets:
    """The assets of one registry. Each call is a transaction of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def register(self, asset: Asset, *, store_id: str | None = None, path: str = "") -> Asset:
        """Adds `asset`, and where its bytes are when `store_id` has them. Raises AssetExists, UsageError.

        `path` is below that store's data directory, and the file there is the asset's alone: it goes with the asset.
        So long the path is not free again; write a file only once its asset is registered, or to a path that is new.
        """
        if store_id is not None:
            check_asset_path(path)
            if len(path.encode(errors="surrogatepass")) > _PATH_BYTES:
                what = "path"
                raise _refused(what, path, f"up to {_PATH_BYTES} bytes of text")
        with self._database.writing() as transaction:
            insert(transaction, asset)
            if store_id is not None:
                _locate_alone(transaction, asset.id, store_id, path)
        return asset

    def get(self, asset_id: str, *, now: int, access: bool = True) -> Asset:
        """The asset; looking at it counts as an access unless told otherwise. Raises AssetNotFound."""
        if not access:
            with self._database.reading() as transaction:
                return find(transaction, asset_id, now)
        with self._database.writing() as transaction:
            touch(transaction, asset_id, now)
            return find(transaction, asset_id, now)

    def update(self, asset_id: str, *, now: int, **changes: Any) -> Asset:
        """Gives fields other values, `labels` as a whole. Raises AssetNotFound, UsageError for a fixed one."""
        known = {each.name for each in fields(Asset)} - _FIXED
        if wrong := sorted(changes.keys() - known):
            msg = f"{', '.join(wrong)} of an asset cannot be changed"
            raise UsageError(msg, details=[("can be", ", ".join(sorted(known)))])
        with self._database.writing() as transaction:
            lock(transaction, [asset_id])
            changed = replace(find(transaction, asset_id, now), **changes)
            columns = [name for name in _COLUMNS if name in changes]
            if columns:
                stored = dict(zip(_COLUMNS, _values(changed), strict=True))
                assignments = ", ".join(f"{name} = ?" for name in columns)
                transaction.execute(
                    f"UPDATE assets SET {assignments} WHERE id = ?", (*(stored[name] for name in columns), asset_id)
                )
            if "labels" in changes:
                transaction.execute("DELETE FROM asset_labels WHERE asset_id = ?", (asset_id,))
                _insert_labels(transaction, changed)
            return changed


def touch(transaction: Transaction, asset_id: str, now: int) -> None:
    """Notes an access, unless a later one is on record."""
    transaction.execute(
        "UPDATE assets SET last_accessed_at = ? WHERE id = ? AND last_accessed_at < ?", (now, asset_id, now)
    )


def _insert_labels(transaction: Transaction, asset: Asset) -> None:
    for label, value in sorted(_labels(asset).items()):
        transaction.execute(
            "INSERT INTO asset_labels (asset_id, label, value, created_at) VALUES (?, ?, ?, ?)",
            (asset.id, label, value, asset.created_at),
        )


def _values(asset: Asset) -> list[object]:
    """What is stored of it, in the order of the columns. Raises UsageError."""
    return [_value(name, getattr(asset, name)) for name in _COLUMNS]


def _value(name: str, value: Any) -> object:
    if name in _ENUMS:
        try:
            return _ENUMS[name](value).value
        except ValueError:
            raise _refused(name, value, ", ".join(_ENUMS[name])) from None
    if name in _JSON:
        return _json(name, value)
    if name in _INTEGERS:
        if type(value) is not int or (name == "size_bytes" and value < 0):
            raise _refused(name, value, "a whole number")
    elif not isinstance(value, str):
        raise _refused(name, value, "a text")
    return value


def _json(name: str, value: Any) -> str:
    """What is read as `value` again."""
    try:
        plain = [*value] if name == "tags" and not isinstance(value, str) else dict(value)
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, sort_keys=True)
        same = json.loads(text) == plain
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same or (name == "tags" and not all(isinstance(tag, str) for tag in plain)):
        raise _refused(
            name, value, "texts" if name == "tags" else "a mapping that JSON can express, with texts as keys"
        )
    return text


def _labels(asset: Asset) -> Mapping[str, str]:
    """What is stored of them. Raises UsageError."""
    for label, value in asset.labels.items():
        for what, text, most in (("label", label, _LABEL_BYTES), ("label's value", value, _VALUE_BYTES)):
            if not isinstance(text, str) or len(text.encode(errors="surrogatepass")) > most:
                raise _refused(what, text, f"up to {most} bytes of text")
    return asset.labels


def _refused(name: str, value: object, allowed: str) -> UsageError:
    shown = f"{value[:100]!r}" if isinstance(value, str) else f"a {type(value).__name__}"
    return UsageError(f"{shown} cannot be the {name} of an asset", details=[("allowed", allowed)])


def _asset(row: Sequence[Any], labels: Mapping[str, str]) -> Asset:
    told = dict(zip(_COLUMNS, row, strict=False))
    try:
        told |= {name: json.loads(told[name]) for name in _JSON}
        told |= {name: kind(told[name]) for name, kind in _ENUMS.items()}
        told["tags"] = tuple(told["tags"])
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"what the registry has of asset {row[0]!r:.300} cannot be read ({error!s:.100})"
        raise StoreError(msg, hint="another program wrote it, or a later release") from error
    return Asset(**told, labels=labels, reference_count=row[-1])
