"""What is kept in one data directory and why; what is brought back, and what goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from systemfiles.bootfiles import BootFiles, InitrdFile, KernelFile
from systemfiles.content.artifacts import Artifact
from systemfiles.content.sweep import size_of
from systemfiles.foundation.catalog import Catalog, Retention
from systemfiles.foundation.errors import (
    IntegrityError,
    LeasesLost,
    SnapshotMismatch,
    StoreError,
    SystemFilesError,
    UsageError,
)
from systemfiles.foundation.lockfile import read_lock
from systemfiles.foundation.paths import INITRD, KERNEL
from systemfiles.provision.provisioner import Provisioner
from systemfiles.registry.tombstones import Tombstones
from systemfiles.retention.collection import Collector, Gone
from systemfiles.retention.eviction import Evictor
from systemfiles.retention.holdings import Holdings
from systemfiles.retention.pins import PinnedFile
from systemfiles.retention.reasons import Explanation, Facts, Reasons, id_of, id_of_file, reasons
from systemfiles.retention.registrar import PINNED, made_at
from systemfiles.retention.restoring import restore

_SHORTEST_DIGEST = 6


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collection removed, or would remove; `bytes_freed` is what the disk got back, or about would.

    `problems` is why some of it could not be done; nothing that is held is touched by that.
    """

    gone: tuple[Gone, ...]
    bytes_freed: int
    problems: tuple[SystemFilesError, ...] = ()


class Keeper:
    """Restores and collects in one data directory. Safe to share among threads."""

    def __init__(self, holdings: Holdings) -> None:
        self._paths = holdings.paths
        self._store = holdings.store
        self.registry = holdings.registry
        self.registrar = holdings.registrar
        self.pins = holdings.pins

    @cached_property
    def collector(self) -> Collector:
        return Collector(self._paths, self.registry, self.registrar, self._store, self.pins)

    @cached_property
    def evictor(self) -> Evictor:
        return Evictor(self._paths, self.registry, self.registrar, self._store, self.pins)

    def restore(
        self,
        pinned: str | Mapping[str, Any],
        provisioner: Callable[[], Provisioner],
        *,
        hypervisor: str | None,
        full: bool,
    ) -> tuple[Artifact, Artifact]:
        """What a pin or a record of boot files names. Raises as `SystemFiles.restore`."""
        if not isinstance(pinned, str):
            files = BootFiles.from_dict(pinned)
            kernel, initrd = _recorded(files.kernel), _recorded(files.initrd)
            return restore(provisioner, kernel, initrd, name="the record", full=full)
        pin = self.pins.get(pinned)
        if hypervisor is not None and hypervisor != pin.hypervisor:
            differences = {"hypervisor": (pin.hypervisor or "none", hypervisor)}
            subject = f"pin {pinned}"
            raise SnapshotMismatch(subject, differences=differences, hint="restore it with the hypervisor on record")
        return restore(provisioner, pin.kernel, pin.initrd, name=f"pin {pinned}", full=full)

    # ── collection ───────────────────────────────────────────────────────────────────────────────────────────────

    def collect(
        self,
        provisioner: Provisioner,
        catalog: Catalog,
        rules: Retention,
        *,
        dry_run: bool = False,
        accept_lost_leases: bool = False,
    ) -> Collection:
        """Removes what nothing holds; with `dry_run` it only says what that would be, and changes nothing at all.

        Raises LeasesLost, StoreError for a pin, a catalog or a lock that cannot be read: then nothing is removed.
        """
        kept = self.reasons(catalog, rules)
        young = self.registry.now() - rules.grace
        if dry_run:
            return self._would_collect(kept, young)
        if accept_lost_leases:
            self.registry.accept_lost_leases()
        if self.registry.leases_lost:
            raise LeasesLost(self.registry.database.where)
        provisioner.sweep()
        gone = [*self.collector.collect(kept, young=young)]
        freed, problems = sum(each.size for each in gone), []
        try:
            gone += self.evictor.drop(self.evictor.idle(self.registrar.artifacts(), kept, young=young))
            freed += self.evictor.sweep(young=young)
            if rules.max_cache_bytes is not None:
                evicted = [*self.evictor.evict(rules.max_cache_bytes, young=young)]
                gone, freed = gone + evicted, freed + sum(each.size for each in evicted)
        except (IntegrityError, StoreError) as error:
            problems.append(error)
        if gone:
            provisioner.write_manifest()
        return Collection(tuple(gone), freed, tuple(problems))

    def rules(self, catalog: Catalog, **given: int | None) -> Retention:
        """The limits of the catalog, but for those that are given. Raises UsageError."""
        told = (catalog.retention or Retention()).model_dump()
        try:
            return Retention(**told | {name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            fault = error.errors()[0]
            msg = f"{fault['loc'][0]}: {fault['msg']}"
            raise UsageError(msg) from None

    def reasons(self, catalog: Catalog, rules: Retention) -> Reasons:
        """Why each artifact that is kept is kept; changes nothing. Raises StoreError, CatalogError."""
        young = self.registry.now() - rules.grace
        lock = read_lock(self._paths.versions_lock)
        return reasons(self._facts(), self._store.layout, catalog, lock, keep_last=rules.keep_last, young=young)

    def explain(self, subject: str, catalog: Catalog) -> tuple[Explanation, ...]:
        """Why each thing that `subject` names is kept or would go. Raises UsageError when nothing is called that."""
        kept = self.reasons(catalog, self.rules(catalog))
        pinned = {id_of_file(file) for pin in self.pins if pin.name == subject for file in pin.files}
        digest = subject.removeprefix("sha256:")
        digest = digest if len(digest) >= _SHORTEST_DIGEST else ""
        found = []
        for artifact in self.registrar.artifacts():
            sums = [facts.sha256 for facts in artifact.files.values()]
            named = subject in (artifact.version, id_of(artifact)) or id_of(artifact) in pinned
            if named or any(each.startswith(digest or "-") for each in sums):
                why = kept.get(id_of(artifact))
                found.append(Explanation(id_of(artifact), why is not None, why or "held by nothing"))
        found += self.evictor.explain(subject, digest)
        if not found:
            msg = f"nothing here is called {subject!r}"
            raise UsageError(msg, hint="give a version, a digest, a pin, or a name in the content store")
        return tuple(dict.fromkeys(found))

    def usage(self, catalog: Catalog) -> tuple[list[dict[str, str | int]], int]:
        """A row for each artifact and each other name in the content store, and the bytes of all blobs."""
        kept = self.reasons(catalog, self.rules(catalog))
        rows: list[dict[str, str | int]] = []
        for artifact in self.registrar.artifacts():
            size = sum(facts.size for facts in artifact.files.values())
            rows.append({"what": id_of(artifact), "size": size, "why": kept.get(id_of(artifact), "held by nothing")})
        return rows + self.evictor.usage({str(row["what"]) for row in rows}), size_of(self._store.layout)

    def _facts(self) -> Facts:
        artifacts = tuple(self.registrar.artifacts())
        leases: dict[str, tuple[str, ...]] = {}
        used = {id_of(artifact): made_at(artifact) for artifact in artifacts}
        database, store_id = self.registry.existing(), self.registry.known_store()
        if database is not None and store_id is not None:
            held, accessed = Tombstones(database, store_id).uses([*used], now=self.registry.now())
            leases = {
                asset: tuple(who for who in holders if not who.startswith(PINNED)) for asset, holders in held.items()
            }
            used |= accessed
        return Facts(artifacts, tuple(self.pins), {asset: who for asset, who in leases.items() if who}, used)

    def _would_collect(self, kept: Reasons, young: int) -> Collection:
        artifacts = [*self.registrar.artifacts()]
        going = [artifact for artifact in artifacts if id_of(artifact) not in kept]
        staying = [artifact for artifact in artifacts if id_of(artifact) in kept]
        gone = [
            Gone(id_of(artifact), "held by nothing", "", sum(facts.size for facts in artifact.files.values()))
            for artifact in going
        ]
        database, store_id = self.registry.existing(), self.registry.known_store()
        if database is not None and store_id is not None:
            there = {id_of(artifact) for artifact in artifacts}
            for batch in Tombstones(database, store_id).candidates(now=self.registry.now(), unused_since=young):
                gone += [Gone(each.id, "held by nothing", "", 0) for each in batch if each.id not in there]
        names = [*self.evictor.idle(staying, kept, young=young)]
        gone += [Gone(name, why, "", 0) for name, why in names]
        dropped = {name for name, _ in names} | {id_of(artifact) for artifact in going}
        return Collection(tuple(gone), self.evictor.would_free(staying, dropped, young=young))


def _recorded(file: KernelFile | InitrdFile) -> PinnedFile:
    """What a record of boot files names; of how it was made it says nothing."""
    kind, content = (INITRD, file.content_sha256) if isinstance(file, InitrdFile) else (KERNEL, None)
    return PinnedFile(kind, file.version, file.arch, file.sha256, file.size, {"files": {}}, content)
