"""What goes from the content store: names that we gave and that hold nothing, and blobs that nothing needs.

Names of ours are weak. That of an initrd's base image goes when no initrd here is made from it, that of an artifact
when neither its directory is here nor anything asks for it. Those of other images go when the store is larger than it
may be, the longest unused first. Names that other tools gave always stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from systemfiles.content.artifacts import Artifact
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.index import BASE, MANAGED, SOURCE
from systemfiles.content.layout import Layout
from systemfiles.content.store import Store, layout_name
from systemfiles.content.sweep import blobs, orphans, reached, sweep
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import InvalidDigest, NotFound
from systemfiles.foundation.paths import KINDS, Paths
from systemfiles.provision.pull import CONVERTED
from systemfiles.registry.assets import batches
from systemfiles.registry.database import marks
from systemfiles.registry.registry import Registry
from systemfiles.retention.outcome import Gone, Outcome, tell
from systemfiles.retention.pins import Pins
from systemfiles.retention.reasons import Explanation, id_of
from systemfiles.retention.registrar import Registrar

_UNBUILT = "no initrd here is built on it"
_UNPROVIDED = "its directory is gone, and nothing asks for it"
_TWIN = "the image that was made of it is gone"
_YOUNG = "written within the grace period"
_UNNEEDED = "needed by nothing that stays"
_EVICTED = "the content store was larger than max_cache_bytes, and this the longest unused"


class Evictor:
    """Frees space in the content store of one data directory. Safe to share among threads."""

    def __init__(self, paths: Paths, registry: Registry, registrar: Registrar, store: Store, pins: Pins) -> None:
        self._paths = paths
        self._registry = registry
        self._registrar = registrar
        self._store = store
        self._layout = store.layout
        self._pins = pins

    # ── names ────────────────────────────────────────────────────────────────────────────────────────────────────

    def idle(
        self, artifacts: Iterable[Artifact], kept: Collection[str], *, young: int, going: Collection[str] = ()
    ) -> dict[str, str]:
        """Names that hold nothing once there are only these artifacts, and why; none that was given after `young`.

        `going` are ids of artifacts whose directories are still there, but will not be.
        """
        made_from = {text for artifact in artifacts for text in _texts(artifact.inputs)}
        made_from |= {text for pin in self._pins for file in pin.files for text in _texts(file.record["inputs"])}
        lost = self._unprovided(kept, going)
        managed = {name: target for name, target in self._layout.names().items() if MANAGED in target.annotations}
        old = {name: target for name, target in managed.items() if self._given(target) <= young}
        found = {}
        for name, target in old.items():
            source = target.annotations.get(SOURCE, "")
            if BASE in target.annotations and not {source, source.removeprefix("sha256:")} & made_from:
                found[name] = _UNBUILT
            elif name in lost:
                found[name] = _UNPROVIDED
        twins = {self._twin_of(target) for name, target in managed.items() if name not in found}
        for name, target in old.items():
            if name.startswith("docker-") and target.digest not in twins:
                found[name] = _TWIN
        return found

    def drop_idle(self, kept: Collection[str], *, young: int, outcome: Outcome) -> None:
        """Drops names of ours that hold nothing; what they reached is for `sweep`."""
        if not self.idle(self._registrar.artifacts(), kept, young=young):
            return
        with self._layout.exclusively():
            # once more: something may have been made of one of them meanwhile, or is being made
            relied = self._layout.ingested()
            there = self._layout.names()
            names = self.idle(self._registrar.artifacts(), kept, young=young)
            gone = [
                Gone(name, why, "", 0)
                for name, why in names.items()
                if name in there and there[name].digest.hex not in relied
            ]
            self._drop(gone, outcome)

    # ── blobs ────────────────────────────────────────────────────────────────────────────────────────────────────

    def sweep(self, *, young: int, outcome: Outcome) -> None:
        """Removes blobs that nothing needs."""
        for removed in sweep(self._layout, older_than=young, also_needed=self._needed):
            outcome.freed += removed.freed

    def would_sweep(
        self, artifacts: Collection[Artifact], dropped: Collection[str], *, young: int, links: Counter[int]
    ) -> int:
        """What `sweep` would free, were there only these artifacts and without these names.

        `links` counts, by inode, the names that blobs have in directories that would have gone before.
        """
        needed = reached(self._layout, without=dropped) | {*_blobs(artifacts)} | {*self._pinned()}
        going = [found for _, found in orphans(self._layout, older_than=young, needed=needed)]
        return sum(found.st_blocks * 512 for found in going if found.st_nlink - links[found.st_ino] == 1)

    # ── images ───────────────────────────────────────────────────────────────────────────────────────────────────

    def evict(self, max_bytes: int, *, young: int, outcome: Outcome) -> None:
        """Drops images until the store has at most `max_bytes`, or nothing is left that may go, and sweeps."""
        if not self.to_evict(max_bytes, self._registrar.artifacts(), young=young):
            return
        with self._layout.exclusively():
            # once more: one of them may have been used meanwhile, or be pulled again at this moment
            relied = self._layout.ingested()
            there = self._layout.names()
            going = self.to_evict(max_bytes, self._registrar.artifacts(), young=young)
            gone = [each for each in going if each.what in there and there[each.what].digest.hex not in relied]
            self._drop(gone, outcome)
        self.sweep(young=young, outcome=outcome)

    def forget_uses(self) -> None:
        """Forgets when images were used that are gone."""
        gone = [digest for digest in self._used() if not self._is_here(digest)]
        store_id = self._registry.store_id
        for batch in batches(gone):
            with self._registry.database.writing() as transaction:
                transaction.execute(
                    f"DELETE FROM content_use WHERE store_id = ? AND digest IN ({marks(batch)})", (store_id, *batch)
                )

    def to_evict(
        self, max_bytes: int, artifacts: Iterable[Artifact], *, young: int, without: Collection[str] = ()
    ) -> list[Gone]:
        """Which images `evict` would drop, were there only these artifacts and without these names of ours."""
        store = _Simulated(self._layout, {*_blobs(artifacts), *self._pinned()}, without, young)
        names = {name: target for name, target in store.ours.items() if name not in without}
        twins = Counter(self._twin_of(target) for target in names.values())
        gone = []
        for name in self._longest_unused(names, young):
            if store.size <= max_bytes:
                break
            gone.append(Gone(name, _EVICTED, "", store.drop(name)))
            twins[twin := self._twin_of(names[name])] -= 1
            if twin and not twins[twin]:
                docker = [each for each, target in names.items() if each[:7] == "docker-" and target.digest == twin]
                gone += [Gone(each, _TWIN, "", store.drop(each)) for each in docker]
        return gone

    # ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────

    def explain(
        self,
        subject: str,
        digest: str,
        *,
        artifacts: Iterable[Artifact],
        dropped: Mapping[str, str],
        young: int,
    ) -> Iterator[Explanation]:
        """Why a name or a blob of the content store is kept, or would go, were there only these artifacts.

        `dropped` are names of ours that would go before, and why.
        """
        needed_by: dict[str, list[str]] = {}
        for name, target in self._layout.entries():
            ours = MANAGED in target.annotations
            why = dropped.get(name or "") if ours else None
            whose = "a name of ours" if ours else "a name that another tool gave"
            if name == subject:
                yield Explanation(f"{name} in the content store", why is None, why or whose)
            for part in self._layout.reachable(target, strict=True):
                told = f"needed by {name or target.digest}, {whose}"
                needed_by.setdefault(part.digest.hex, []).extend([] if why else [told])
        for asset, sums in (*_files(artifacts), *self._pinned_files()):
            for each in sums:
                if not needed_by.get(each):
                    needed_by[each] = [f"needed by {asset}"]
        for path, found in blobs(self._layout):
            if path.name.startswith(digest or "-"):
                whys = needed_by.get(path.name) or [_YOUNG] * (int(found.st_mtime) > young)
                lost = _UNNEEDED if path.name in needed_by else "needed by nothing"
                yield Explanation(f"blob sha256:{path.name}", bool(whys), "; ".join(whys) or lost)

    def usage(self, without: Collection[str], *, dropped: Mapping[str, str]) -> list[dict[str, str | int]]:
        """A row for each name in the content store but these: how many bytes it reaches, and whose name it is.

        `dropped` as in `explain`.
        """
        rows: list[dict[str, str | int]] = []
        for name, target in self._layout.entries():
            if name not in without:
                size = sum(part.size for part in self._layout.reachable(target))
                ours = MANAGED in target.annotations
                whose = "our" if ours else "another tool's"
                why = (dropped.get(name or "") if ours else None) or f"{whose} name in the content store"
                rows.append({"what": name or target.digest, "size": size, "why": why})
        return rows

    def _needed(self) -> Iterator[str]:
        yield from _blobs(self._registrar.artifacts())
        yield from self._pinned()

    def _pinned(self) -> Iterator[str]:
        for _, sums in self._pinned_files():
            yield from sums

    def _pinned_files(self) -> Iterator[tuple[str, list[str]]]:
        """What each pin is called, and the digests, in hex, of what it holds."""
        for pin in self._pins:
            for file in pin.files:
                yield f"the pin {pin.name}", [facts["sha256"] for facts in file.record["files"].values()]

    def _unprovided(self, kept: Collection[str], going: Collection[str]) -> set[str]:
        """The names of artifacts that have no directory, or soon will not; a damaged one is left as it is."""
        return {
            layout_name(kind, version, arch)
            for kind in KINDS
            for version, arch in self._store.recorded(kind)
            if not self._paths.artifact(kind, version, arch).exists() or layout_name(kind, version, arch) in going
        } - {*kept}

    def _longest_unused(self, names: Mapping[str, Descriptor], young: int) -> list[str]:
        """Of these, the images that were pulled and not used after `young`, the longest unused first."""
        used = self._used()
        found = []
        for name, target in names.items():
            if SOURCE in target.annotations and BASE not in target.annotations:
                # one in Docker's terms may be asked for by the digest that it has there
                asked = (used.get(digest, 0) for digest in (target.digest, self._twin_of(target)) if digest)
                last = max(*asked, self._given(target))
                if last <= young:
                    found.append((last, name))
        return [name for _, name in sorted(found)]

    def _used(self) -> dict[str, int]:
        found = self._registry.look()
        if found is None:
            return {}
        database, store_id = found
        with database.reading() as transaction:
            rows = transaction.rows("SELECT digest, last_used_at FROM content_use WHERE store_id = ?", (store_id,))
        return dict(rows)

    def _is_here(self, digest: str) -> bool:
        try:
            return self._layout.blob(Digest.parse(digest)).exists()
        except InvalidDigest:
            return False

    def _given(self, target: Descriptor) -> int:
        try:
            return int(self._layout.blob(target.digest).stat().st_mtime)
        except FileNotFoundError:
            return 0

    def _twin_of(self, target: Descriptor) -> str | None:
        try:
            annotations = self._layout.read_json(target.digest).get("annotations") or {}
        except NotFound:
            return None
        return annotations.get(CONVERTED) if isinstance(annotations, dict) else None

    def _drop(self, gone: list[Gone], outcome: Outcome) -> None:
        """Drops names. Nothing would tell of them after a crash, so it is told before; then again, perhaps."""
        tell(self._paths, gone, now=self._registry.clock())
        self._layout.unname(*(each.what for each in gone))
        outcome.went(*gone)


class _Simulated:
    """A content store of which names are dropped one after the other, and swept each time."""

    def __init__(self, layout: Layout, needed: set[str], without: Collection[str], young: int) -> None:
        self.ours: dict[str, Descriptor] = {}
        self._layout = layout
        self._names: Counter[str] = Counter(needed)
        for name, target in layout.entries():
            ours = MANAGED in target.annotations
            if not ours or name not in without:
                self._names.update(self._parts(target))
            if ours and name is not None:
                self.ours[name] = target
        every = [(path.name, found) for path, found in blobs(layout)]
        self._old = {digest for digest, found in every if int(found.st_mtime) <= young}
        self._sizes = {digest: found.st_size for digest, found in every if self._stays(digest)}

    @property
    def size(self) -> int:
        """The bytes of all blobs that would be left."""
        return sum(self._sizes.values())

    def drop(self, name: str) -> int:
        """Returns how many bytes go."""
        parts = self._parts(self.ours[name])
        self._names.subtract(parts)
        return sum(self._sizes.pop(digest) for digest in parts if digest in self._sizes and not self._stays(digest))

    def _stays(self, digest: str) -> bool:
        return self._names[digest] > 0 or digest not in self._old

    def _parts(self, target: Descriptor) -> list[str]:
        return [part.digest.hex for part in self._layout.reachable(target, strict=True)]


def _blobs(artifacts: Iterable[Artifact]) -> Iterator[str]:
    for _, sums in _files(artifacts):
        yield from sums


def _files(artifacts: Iterable[Artifact]) -> Iterator[tuple[str, list[str]]]:
    """The id of each, and the digests, in hex, of its files."""
    for artifact in artifacts:
        yield id_of(artifact), [facts.sha256 for facts in artifact.files.values()]


def _texts(inputs: Mapping[str, Any]) -> Iterator[str]:
    """Every text in it, among which are digests of what something was made from."""
    for value in inputs.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(value)
