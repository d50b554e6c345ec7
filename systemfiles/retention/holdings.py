"""Holds on kernels and initrds: leases, which the registry knows, and pins, which are files.

A VMM's start waits for this, so nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping

from systemfiles.content.artifacts import Artifact, Artifacts
from systemfiles.content.packaging import without_host_facts
from systemfiles.content.store import Store
from systemfiles.foundation.errors import LeaseNotFound, LeasesLost, SnapshotMismatch, StoreError, UsageError
from systemfiles.foundation.lock import Timeout
from systemfiles.foundation.paths import INITRD, Paths
from systemfiles.foundation.units import utc
from systemfiles.registry.leases import Lease
from systemfiles.registry.registry import Clock, Registry
from systemfiles.retention.pins import Pin, PinnedFile, Pins
from systemfiles.retention.reasons import id_of
from systemfiles.retention.registrar import PINNED, Registrar

log = logging.getLogger(__name__)

_USED = """INSERT INTO content_use (store_id, digest, last_used_at) VALUES (?, ?, ?)
           ON CONFLICT (store_id, digest) DO UPDATE SET last_used_at = excluded.last_used_at"""


class Holdings:
    """Who holds what in one data directory. Safe to share among threads."""

    def __init__(
        self,
        paths: Paths,
        artifacts: Artifacts,
        *,
        registry: Registry | None = None,
        clock: Clock = time.time,
        timeout: Timeout = None,
    ) -> None:
        self.paths = paths
        self.timeout = timeout
        self.registry = registry or Registry(paths, clock=clock, timeout=timeout)
        self.pins = Pins(paths)
        self.store = Store(paths, artifacts, timeout=timeout, clock=clock)
        self.registrar = Registrar(paths, self.registry, self.store, self.pins)

    # ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────

    def provided(self, made: list[Artifact], wanted: list[Artifact], holder: str | None) -> None:
        """Lets the registry know what was just made, and leases what was wanted to `holder`, without end and once.

        Raises NotProvisioned when a collection took one of them meanwhile.
        """
        if made:
            self.learn(made)
        if holder is not None:
            ids = {id_of(artifact) for artifact in wanted}
            if not any(ids <= {*lease.asset_ids} and lease.expires_at is None for lease in self.leases(holder)):
                self.registrar.hold(wanted, holder)

    def learn(self, made: Iterable[Artifact] | None = None) -> None:
        """Registers what was made (None: whatever is missing); a registry that cannot be reached learns it later."""
        with self._telling_later("what was made"):
            if made is None:
                self.registrar.sync()
            else:
                self.registrar.register(made)

    def leases(self, holder: str | None = None) -> tuple[Lease, ...]:
        """The live leases on what is here, without those that stand for pins. Raises StoreError where nothing was."""
        self.paths.require_used()
        store_id = self.registry.store_id
        every = self.registry.leases.list(now=self.registry.clock(), holder=holder, store_id=store_id)
        return tuple(lease for lease in every if not lease.holder.startswith(PINNED))

    def require_leases(self) -> None:
        """Raises LeasesLost as a collection would, without opening a registry that is not there; StoreError."""
        if others := self.registry.others:
            raise LeasesLost(self.registry.where, others)
        found = self.registry.look()
        if found is None:
            if self.registry.known_store() is not None:
                raise LeasesLost(self.paths.registry)
            return
        database, store_id = found
        with database.reading() as transaction:
            if not transaction.rows("SELECT 1 FROM stores WHERE id = ? AND leases_lost = 0", (store_id,)):
                raise LeasesLost(database.where)

    def release_all(self, holder: str) -> int:
        """Ends all leases of `holder`; returns how many."""
        if holder.startswith(PINNED):
            msg = f"{holder} is a pin"
            raise UsageError(msg, hint="unpin it")
        count = 0
        for lease in self.leases(holder):
            with contextlib.suppress(LeaseNotFound):
                self.registry.leases.release(lease.id, now=self.registry.clock())
                count += 1
        return count

    def used(self, digest: str) -> None:
        """Notes that an image was asked for: the longest unused go first. Without a registry, or where that may not be
        written, when it was pulled has to do."""
        try:
            if self.registry.existing() is not None:
                store_id, now = self.registry.store_id, self.registry.now()
                with self.registry.database.writing() as transaction:
                    transaction.execute(_USED, (store_id, digest, now))
        except StoreError as error:
            log.debug("the use of %s is not noted: %s", digest, error.summary)

    # ── pins ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def pin(
        self, name: str, artifacts: Iterable[Artifact], *, hypervisor: str | None, labels: Mapping[str, str]
    ) -> Pin:
        """Holds a kernel and an initrd under `name`, until `unpin`; the same once more changes nothing.

        Raises SnapshotMismatch for a name that holds something else, NotProvisioned, IntegrityError, UsageError.
        """
        self.store.layout.create()
        with self.store.layout.exclusively():
            # a collection may just have taken them
            kernel, initrd = (self.store.artifacts.load(each.kind, each.version, each.arch) for each in artifacts)
            for artifact in (kernel, initrd):
                self.store.artifacts.check(artifact)
            pin = Pin(name, _pinned(kernel), _pinned(initrd), utc(self.registry.clock()), hypervisor, dict(labels))
            if name in self.pins.names():
                pin = _require_same(self.pins.get(name), pin)
            else:
                self.pins.write(pin)
            with self._telling_later(f"that {name} is pinned"):
                self.registrar.index(pin)
        return pin

    def unpin(self, name: str) -> None:
        """Ends the hold. Raises PinNotFound, and StoreError where nothing ever was."""
        self.paths.require_used()
        self.store.layout.create()
        with self.store.layout.exclusively():
            self.pins.remove(name)
            with self._telling_later(f"that {name} is unpinned"):
                self.registrar.unindex(name)

    @contextlib.contextmanager
    def _telling_later(self, what: str) -> Iterator[None]:
        """A registry that cannot be reached learns at the next collection what is on disk."""
        try:
            yield
        except StoreError as error:
            log.warning("the next collection will let the registry know %s: %s", what, error.summary)


def _pinned(artifact: Artifact) -> PinnedFile:
    facts = artifact.files[artifact.file]
    record = without_host_facts(artifact.record)
    content = record["content_sha256"] if artifact.kind == INITRD else None
    return PinnedFile(artifact.kind, artifact.version, artifact.arch, facts.sha256, facts.size, record, content)


def _require_same(known: Pin, wanted: Pin) -> Pin:
    """`known`, which holds the same as `wanted`. Raises SnapshotMismatch."""
    differences: dict[str, tuple[object, object]] = {}
    for before, now in zip(known.files, wanted.files, strict=True):
        # an initrd that another compressor made again is the same
        contents = [(file.version, file.arch, file.content_sha256 or file.sha256) for file in (before, now)]
        if contents[0] != contents[1]:
            differences[before.kind] = (f"{before.version} ({before.arch})", f"{now.version} ({now.arch})")
    if known.hypervisor != wanted.hypervisor:
        differences["hypervisor"] = (known.hypervisor, wanted.hypervisor)
    if dict(known.labels) != dict(wanted.labels):
        differences["labels"] = (dict(known.labels), dict(wanted.labels))
    if differences:
        hint = f"a pin is never changed: unpin {known.name} first, or take another name"
        subject = f"pin {known.name}"
        raise SnapshotMismatch(subject, differences=differences, hint=hint)
    return known
