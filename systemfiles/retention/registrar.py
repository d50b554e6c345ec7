"""Kernels and initrds as assets of the registry: everything on disk has a row there, and whoever uses it a lease.

A row is added under the content store's lock while the artifact is there, and a collection looks for its row under that
lock before it removes one; so a row is never without its files.
"""

from __future__ import annotations

import calendar
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

from systemfiles.content.artifacts import Artifact
from systemfiles.content.store import Store
from systemfiles.foundation.errors import (
    AssetExists,
    AssetNotFound,
    IntegrityError,
    LeaseNotFound,
    NotProvisioned,
    UsageError,
)
from systemfiles.foundation.paths import KERNEL, KINDS, Paths
from systemfiles.registry.assets import Asset, AssetType, insert, locate
from systemfiles.registry.leases import Lease
from systemfiles.registry.registry import Registry
from systemfiles.retention.pins import Pin, Pins
from systemfiles.retention.reasons import id_of, id_of_file

PINNED = "pin:"
"""How the holder begins by which the registry knows of a pin; what comes behind it is the pin's name."""
_GONE = (NotProvisioned, IntegrityError)
_TRIES = 20


class Registrar:
    """Keeps the registry in step with what is on disk."""

    def __init__(self, paths: Paths, registry: Registry, store: Store, pins: Pins) -> None:
        self._paths = paths
        self._registry = registry
        self._store = store
        self._pins = pins

    def artifacts(self) -> Iterator[Artifact]:
        """Everything on disk whose record can be read; the others are left alone by everybody."""
        for kind in KINDS:
            for version, arch in self._store.artifacts.versions(kind):
                try:
                    yield self._store.artifacts.load(kind, version, arch)
                except _GONE:
                    continue

    def register(self, artifacts: Iterable[Artifact]) -> None:
        """Adds the rows of these, where they are missing, and corrects those of files that were made again otherwise.

        Raises NotProvisioned, IntegrityError, StoreError.
        """
        for artifact in artifacts:
            with self._store.layout.exclusively():
                there = self._store.artifacts.load(artifact.kind, artifact.version, artifact.arch)
                self._insert(there)

    def hold(
        self, artifacts: Iterable[Artifact], holder: str, *, ttl: float | None = None, lease_id: str | None = None
    ) -> Lease:
        """A lease on all of these, or on none. Raises NotProvisioned for one that is gone, UsageError, StoreError."""
        if holder.startswith(PINNED):
            msg = f"{holder!r:.300} cannot be the holder of a lease"
            raise UsageError(msg, details=[("reserved", f"names that begin with {PINNED!r}")])
        every = [*artifacts]
        return self._acquire([*map(id_of, every)], holder, lambda: self.register(every), ttl=ttl, lease_id=lease_id)

    def index(self, pin: Pin) -> None:
        """Lets the registry know of a pin, so that who asks it for an asset's holders is told.

        Call it inside the content store's `exclusively`. Raises NotProvisioned for a file that is gone, StoreError.
        """
        ids, lease_id = [*map(id_of_file, pin.files)], self._lease_of(pin.name)
        for lease in self._registry.leases.list(now=self._registry.clock(), lease_id=lease_id):
            if {*lease.asset_ids} == {*ids}:
                return
            self.unindex(pin.name)
        self._acquire(ids, f"{PINNED}{pin.name}", lambda: self._insert_all(pin), lease_id=lease_id)

    def unindex(self, name: str) -> None:
        """Lets the registry forget a pin. Call it inside the content store's `exclusively`. Raises StoreError."""
        with contextlib.suppress(LeaseNotFound):
            self._registry.leases.release(self._lease_of(name), now=self._registry.clock())

    def sync(self) -> None:
        """Adds what the registry lacks: rows of artifacts, leases for pins; and drops the leases of pins that went."""
        known = self._known()
        for artifact in self.artifacts():
            if known.get(id_of(artifact)) != artifact.files[artifact.file].sha256:
                with contextlib.suppress(*_GONE):  # meanwhile
                    self.register([artifact])
        with self._store.layout.exclusively():
            pins = {pin.name: pin for pin in self._pins}
            now, store_id = self._registry.clock(), self._registry.store_id
            for lease in self._registry.leases.list(now=now, prefix=PINNED, store_id=store_id):
                name = lease.holder.removeprefix(PINNED)
                if lease.id == self._lease_of(name) and name not in pins:
                    self.unindex(name)
            for pin in pins.values():
                with contextlib.suppress(*_GONE):  # `restore` may bring it back
                    self.index(pin)

    def _lease_of(self, pin: str) -> str:
        """The id of the lease that stands for a pin; others who share the registry have pins of their own."""
        return f"{PINNED}{self._registry.store_id}:{pin}"

    def _acquire(
        self,
        ids: list[str],
        holder: str,
        add_rows: Callable[[], object],
        *,
        ttl: float | None = None,
        lease_id: str | None = None,
    ) -> Lease:
        """`add_rows` ends this by an error when one of these is not here; what is here may be condemned meanwhile."""
        registry = self._registry
        for _ in range(_TRIES):
            try:
                return registry.leases.acquire(
                    ids, holder, now=registry.clock(), ttl=ttl, store_id=registry.store_id, lease_id=lease_id
                )
            except AssetNotFound as error:
                missing = error
                add_rows()
        raise missing  # somebody has marked it as not available

    def _insert_all(self, pin: Pin) -> None:
        for file in pin.files:
            self._insert(self._store.artifacts.load(file.kind, file.version, file.arch))

    def _known(self) -> dict[str, str]:
        """The sha256 of each artifact that the registry has here, as it has it."""
        with self._registry.database.reading() as transaction:
            rows = transaction.rows(
                """SELECT a.id, a.checksum FROM asset_locations p JOIN assets a ON a.id = p.asset_id
                   WHERE p.store_id = ? AND substr(p.path, 1, 7) = 'system/'""",
                (self._registry.store_id,),
            )
        return dict(rows)

    def _insert(self, artifact: Artifact) -> None:
        facts = artifact.files[artifact.file]
        made = made_at(artifact)
        asset = Asset(
            id=id_of(artifact),
            name=artifact.version,
            type=AssetType.KERNEL if artifact.kind == KERNEL else AssetType.INITRD,
            location=str(artifact.path.relative_to(self._paths.data_dir)),
            size_bytes=facts.size,
            checksum=facts.sha256,
            created_at=made,
            last_accessed_at=made,
            created_by=str(artifact.record.get("created_by", "")),
            version=artifact.version,
            labels={"arch": artifact.arch.value},
        )
        place = str(artifact.directory.relative_to(self._paths.data_dir))
        with self._registry.database.writing() as transaction:
            try:
                insert(transaction, asset)
            except AssetExists:  # another host may have it, too; or an initrd was compressed anew
                transaction.execute(
                    """UPDATE assets SET checksum = ?, size_bytes = ?
                       WHERE id = ? AND checksum <> ? AND NOT EXISTS (
                           SELECT 1 FROM asset_locations WHERE asset_id = assets.id AND store_id <> ?)""",
                    (facts.sha256, facts.size, asset.id, facts.sha256, self._registry.store_id),
                )
            locate(transaction, asset.id, self._registry.store_id, place)


def made_at(artifact: Artifact) -> int:
    """When an artifact was made, UTC seconds; now-ish for a record that does not say so: by its own file's time."""
    try:
        return calendar.timegm(time.strptime(str(artifact.record["created_at"]), "%Y-%m-%dT%H:%M:%SZ"))
    except (KeyError, ValueError):
        return int(artifact.path.parent.stat().st_mtime)
