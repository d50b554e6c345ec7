"""What is kept in one data directory and why, and what goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from systemfiles.content.artifacts import Artifact
from systemfiles.content.sweep import index_is_lost, size_of
from systemfiles.foundation.catalog import Catalog, Retention
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import LeasesLost, StoreError, SystemFilesError, UsageError
from systemfiles.foundation.lock import locked
from systemfiles.foundation.lockfile import read_lock
from systemfiles.foundation.units import human_size
from systemfiles.provision.provisioner import Provisioner
from systemfiles.registry.tombstones import Tombstones
from systemfiles.retention.collection import Collector, Seen
from systemfiles.retention.eviction import Evictor
from systemfiles.retention.forecast import Forecast
from systemfiles.retention.holdings import Holdings
from systemfiles.retention.others import Others
from systemfiles.retention.outcome import UNHELD, Gone, Outcome
from systemfiles.retention.pins import Pin, PinnedFile
from systemfiles.retention.presence import faults
from systemfiles.retention.reasons import Explanation, Facts, Reasons, current, id_of, id_of_file, reasons
from systemfiles.retention.registrar import PINNED, made_at

_SHORTEST_DIGEST = 6


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collection removed, or would remove; `bytes_freed` is what the disk got back, or about would.

    Of `count` things `gone` has the first 10,000; the audit log has all that went. `problems` is why some of it could
    not be done; nothing that is held is touched by that.
    """

    gone: tuple[Gone, ...]
    bytes_freed: int
    problems: tuple[SystemFilesError, ...] = ()
    count: int = 0

    def told(self, *, dry_run: bool = False) -> str:
        """A line for each thing that went, or would go, and what that gains."""
        verb = "would go" if dry_run else "removed"
        lines = [
            f"{verb}: {each.what} ({each.why}{f'; last held by {each.last_held_by}' if each.last_held_by else ''})"
            for each in self.gone
        ]
        if self.count > len(self.gone):
            lines.append(f"{verb}: {self.count - len(self.gone)} more{'' if dry_run else ', see collected.jsonl'}")
        gain = f"{human_size(self.bytes_freed)} {'would be freed' if dry_run else 'freed'}"
        return "\n".join([*lines, gain if self.gone or self.bytes_freed else "nothing to collect"])


class Keeper:
    """Collects in one data directory, and explains that. Safe to share among threads."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._paths = holdings.paths
        self._store = holdings.store
        self.registry = holdings.registry
        self.registrar = holdings.registrar
        self.pins = holdings.pins
        self._timeout = holdings.timeout

    @cached_property
    def collector(self) -> Collector:
        return Collector(self._paths, self.registry, self.registrar, self._store, self.pins)

    @cached_property
    def evictor(self) -> Evictor:
        return Evictor(self._paths, self.registry, self.registrar, self._store, self.pins)

    @cached_property
    def forecast(self) -> Forecast:
        return Forecast(self.registry, self.registrar, self.collector, self.evictor)

    @cached_property
    def others(self) -> Others:
        return Others(self.registry)

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

        Raises LeasesLost, StoreError for a pin, a catalog or a lock that cannot be read, and where nothing ever was:
        then nothing is removed.
        """
        young = self.registry.now() - rules.grace
        if dry_run:
            self._require_leases(accept_lost=accept_lost_leases)
            kept = self.reasons(catalog, rules, young)
            try:
                return _told(self.forecast.collect(kept, young=young, max_cache_bytes=rules.max_cache_bytes))
            except FileNotFoundError as error:
                msg = f"{error.filename} went while it was looked at"
                raise StoreError(msg, hint="a collection is at work: try again") from error
        self._paths.require_used()
        if self.registry.others:  # before this one is noted as one of them, too
            self._require_leases(accept_lost=accept_lost_leases)
        with locked(self._paths.lock("collection"), timeout=self._timeout):
            outcome = Outcome()
            with outcome.going_on():  # on a full disk it cannot be opened, and only read
                self.registry.open()
            if not self._knows_leases(outcome, accept_lost=accept_lost_leases):
                with outcome.going_on():  # which no lease is about
                    self.evictor.sweep(young=young, outcome=outcome)
                return _told(outcome)
            seen = self.collector.look()
            kept = self.reasons(catalog, rules, young)
            if accept_lost_leases:
                with outcome.going_on():
                    self.registry.accept_lost_leases()
            self._collect(provisioner, catalog, kept, seen, young, rules.max_cache_bytes, outcome)
            return _told(outcome)

    def _collect(
        self,
        provisioner: Provisioner,
        catalog: Catalog,
        kept: Reasons,
        seen: Seen,
        young: int,
        max_cache_bytes: int | None,
        outcome: Outcome,
    ) -> None:
        """One step after the other; what keeps one from being done does not keep the others."""
        steps: list[Callable[[], object]] = [
            provisioner.sweep,
            lambda: self.collector.collect(
                kept,
                seen,
                young=young,
                outcome=outcome,
                current=lambda: current(catalog, read_lock(self._paths.versions_lock)),
            ),
            lambda: self.registry.leases.forget_ended(now=self.registry.now(), store_id=self.registry.store_id),
            lambda: self.evictor.drop_idle(kept, young=young, outcome=outcome),
            lambda: self.evictor.sweep(young=young, outcome=outcome),
        ]
        if max_cache_bytes is not None:
            steps.append(lambda: self.evictor.evict(max_cache_bytes, young=young, outcome=outcome))
        steps += [self.evictor.forget_uses, lambda: self._write_manifest(provisioner)]
        for step in steps:
            with outcome.going_on():
                step()

    def _write_manifest(self, provisioner: Provisioner) -> None:
        """SHA256SUMS and our names in index.json; a collection that was killed may not have got there."""
        if index_is_lost(self._store.layout):
            return  # with a new one nobody would see that
        provided = self._paths.sha256sums.exists() or any(True for _ in self.registrar.artifacts())
        if provided and not provisioner.manifest_is_current():
            provisioner.write_manifest()

    def _knows_leases(self, outcome: Outcome, *, accept_lost: bool) -> bool:
        """Whether the registry could be read; when not, that is a problem among others. Raises as `_require_leases`."""
        known = False
        with outcome.going_on(but=(LeasesLost,)):
            self._require_leases(accept_lost=accept_lost)
            known = True
        return known

    def _require_leases(self, *, accept_lost: bool) -> None:
        """Raises LeasesLost unless that is accepted, and StoreError for a registry that cannot be read."""
        if accept_lost:
            self.registry.look()
        else:
            self._holdings.require_leases()

    def rules(self, catalog: Catalog, **given: int | None) -> Retention:
        """The limits of the catalog, but for those that are given. Raises UsageError."""
        told = (catalog.retention or Retention()).model_dump()
        try:
            return Retention(**told | {name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            fault = error.errors()[0]
            msg = f"{fault['loc'][0]}: {fault['msg']}"
            raise UsageError(msg) from None

    def reasons(self, catalog: Catalog, rules: Retention, young: int | None = None) -> Reasons:
        """Why each artifact that is kept is kept; changes nothing. Raises StoreError, CatalogError.

        `young` (UTC seconds) is when the grace period began, if that is already decided.
        """
        young = self.registry.now() - rules.grace if young is None else young
        lock = read_lock(self._paths.versions_lock)
        return reasons(self._facts(), self._store.layout, catalog, lock, keep_last=rules.keep_last, young=young)

    def explain(self, subject: str, catalog: Catalog, rules: Retention) -> tuple[Explanation, ...]:
        """Why each thing that `subject` names is kept or would go. Raises UsageError when nothing is called that."""
        young = self.registry.now() - rules.grace
        kept = self.reasons(catalog, rules, young)
        pins = [*self.pins]
        pinned = {id_of_file(file) for pin in pins if pin.name == subject for file in pin.files}
        digest = subject.removeprefix("sha256:")
        digest = digest if len(digest) >= _SHORTEST_DIGEST else ""
        found, artifacts = [], {id_of(artifact): artifact for artifact in self.registrar.artifacts()}
        lost = {id_of_file(file): file for pin in pins for file in pin.files if id_of_file(file) not in artifacts}
        why = self._why(kept, pins)
        for asset, thing in (artifacts | lost).items():
            sums = [facts.sha256 for facts in thing.files.values()] if isinstance(thing, Artifact) else [thing.sha256]
            named = subject in (thing.version, asset) or asset in pinned
            if named or any(each.startswith(digest or "-") for each in sums):
                found.append(Explanation(asset, asset in kept, why(asset)))
        found += self.others.explain(subject, digest, young=young)
        staying = [artifact for asset, artifact in artifacts.items() if asset in kept]
        dropped = self.forecast.dropped(kept, young=young)
        found += self.evictor.explain(subject, digest, artifacts=staying, dropped=dropped, young=young)
        if not found:
            msg = f"nothing here is called {subject!r}"
            raise UsageError(msg, hint="give a version, a digest, a pin, an asset, or a name in the content store")
        return tuple(dict.fromkeys(found))

    def usage(self, catalog: Catalog) -> tuple[list[dict[str, str | int]], int]:
        """A row for each artifact, asset, and other name in the content store, and the bytes of blobs and assets."""
        rules = self.rules(catalog)
        young = self.registry.now() - rules.grace
        kept = self.reasons(catalog, rules, young)
        sizes = {
            id_of(artifact): sum(facts.size for facts in artifact.files.values())
            for artifact in self.registrar.artifacts()
        }
        pins = [*self.pins]
        for file in (file for pin in pins for file in pin.files if id_of_file(file) not in sizes):
            sizes[id_of_file(file)] = self._left_of(file)
        why = self._why(kept, pins)
        rows: list[dict[str, str | int]] = [
            {"what": asset, "size": size, "why": why(asset)} for asset, size in sizes.items()
        ]
        rows += self.evictor.usage(sizes.keys(), dropped=self.forecast.dropped(kept, young=young))
        assets, size = self.others.usage(young=young)
        return rows + assets, size_of(self._store.layout) + size

    def _left_of(self, file: PinnedFile) -> int:
        """How many bytes the content store has of what is pinned and not there."""
        blob = self._store.layout.blob
        every = file.record["files"].values()
        return sum(facts["size"] for facts in every if blob(Digest.from_hex(facts["sha256"])).exists())

    def _why(self, kept: Reasons, pins: Iterable[Pin]) -> Callable[[str], str]:
        """Says why an artifact is kept, or is not, and what is wrong with it if it is pinned."""
        wrong = faults(pins, self._store.artifacts)

        def why(asset: str) -> str:
            told = kept.get(asset, UNHELD)
            return f"{told}; {wrong[asset]}" if asset in wrong else told

        return why

    def _facts(self) -> Facts:
        artifacts = tuple(self.registrar.artifacts())
        leases: dict[str, tuple[str, ...]] = {}
        used = {id_of(artifact): made_at(artifact) for artifact in artifacts}
        if found := self.registry.look():
            # what is held may be gone from the disk, and still be brought back from the content store
            ids = dict.fromkeys([*used, *self._store.layout.names()])
            held, accessed = Tombstones(*found).uses([*ids], now=self.registry.now())
            leases = {
                asset: tuple(who for who in holders if not who.startswith(PINNED)) for asset, holders in held.items()
            }
            # made again, it is younger than its row
            used |= {asset: max(last, used.get(asset, 0)) for asset, last in accessed.items()}
        return Facts(artifacts, tuple(self.pins), {asset: who for asset, who in leases.items() if who}, used)


def _told(outcome: Outcome) -> Collection:
    return Collection(tuple(outcome.gone), outcome.freed, tuple(outcome.problems), outcome.count)
