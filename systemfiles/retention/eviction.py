"""What goes from the content store: names that we gave and that hold nothing, and blobs that nothing needs.

Names of ours are weak. That of an initrd's base image goes when no initrd here is made from it, that of an artifact
when neither its directory is here nor anything asks for it. Those of other images go when the store is larger than it
may be, the longest unused first. Names that other tools gave always stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from systemfiles.content.artifacts import Artifact
from systemfiles.content.layout import BASE, MANAGED, SOURCE, Descriptor
from systemfiles.content.store import Store, layout_name
from systemfiles.content.sweep import orphans, reached, size_of, sweep
from systemfiles.foundation.errors import NotFound
from systemfiles.foundation.paths import KINDS, Paths
from systemfiles.provision.pull import CONVERTED
from systemfiles.registry.registry import Registry
from systemfiles.retention.collection import Gone, tell
from systemfiles.retention.pins import Pins
from systemfiles.retention.reasons import Explanation, id_of
from systemfiles.retention.registrar import Registrar

_UNBUILT = "no initrd here is built on it"
_UNPROVIDED = "its directory is gone, and nothing asks for it"
_TWIN = "the image that was made of it is gone"
_EVICTED = "the content store was larger than max_cache_bytes, and this the longest unused"


class Evictor:
    """Frees space in the content store of one data directory."""

    def __init__(self, paths: Paths, registry: Registry, registrar: Registrar, store: Store, pins: Pins) -> None:
        self._paths = paths
        self._registry = registry
        self._registrar = registrar
        self._store = store
        self._layout = store.layout
        self._pins = pins

    def idle(self, artifacts: Iterable[Artifact], kept: Collection[str], *, young: int) -> Iterator[tuple[str, str]]:
        """Names that hold nothing once there are only these artifacts, and why; none that was given after `young`."""
        there = [*artifacts]
        made_from = {text for artifact in there for text in _texts(artifact.inputs)}
        made_from |= {text for pin in self._pins for file in pin.files for text in _texts(file.record["inputs"])}
        lost = self._unprovided({id_of(artifact) for artifact in there} | {*kept})
        managed = {name: target for name, target in self._layout.names().items() if MANAGED in target.annotations}
        dropped = set()
        for name, target in managed.items():
            source = target.annotations.get(SOURCE, "")
            unbuilt = BASE in target.annotations and not {source, source.removeprefix("sha256:")} & made_from
            if (unbuilt or name in lost) and self._given(target) <= young:
                dropped.add(name)
                yield name, _UNBUILT if unbuilt else _UNPROVIDED
        twins = {self._twin_of(target) for name, target in managed.items() if name not in dropped}
        for name, target in managed.items():
            if name.startswith("docker-") and target.digest not in twins and self._given(target) <= young:
                yield name, _TWIN

    def drop(self, names: Iterable[tuple[str, str]]) -> Iterator[Gone]:
        """Drops names of ours; what they reached is for `sweep`."""
        for name, why in names:
            with self._layout.exclusively():
                self._layout.unname(name)
            gone = Gone(name, why, "", 0)
            tell(self._paths, [gone], now=self._registry.clock())
            yield gone

    def sweep(self, *, young: int) -> int:
        """Removes blobs that nothing needs; returns what the disk got back."""
        return sum(removed.freed for removed in sweep(self._layout, older_than=young, also_needed=self._needed))

    def evict(self, max_bytes: int, *, young: int) -> Iterator[Gone]:
        """Drops images until the store has at most `max_bytes`, or nothing is left that may go."""
        for name in self._longest_unused(young):
            before = size_of(self._layout)
            if before <= max_bytes:
                return
            for gone in self.drop([(name, _EVICTED)]):
                self.sweep(young=young)
                yield gone._replace(size=before - size_of(self._layout))

    def explain(self, subject: str, digest: str) -> Iterator[Explanation]:
        """Why a name or a blob of the content store is kept, or would go."""
        for name, target in self._layout.entries():
            whose = "a name of ours" if MANAGED in target.annotations else "a name that another tool gave"
            if name == subject:
                yield Explanation(f"{name} in the content store", True, whose)
            for part in self._layout.reachable(target):
                if part.digest.hex.startswith(digest or "-"):
                    yield Explanation(f"blob {part.digest}", True, f"needed by {name or target.digest}, {whose}")
        needed = reached(self._layout) | {*self._needed()}
        for path in orphans(self._layout, older_than=float("inf"), needed=needed):
            if path.name.startswith(digest or "-"):
                yield Explanation(f"blob sha256:{path.name}", False, "needed by nothing")

    def usage(self, without: Collection[str]) -> list[dict[str, str | int]]:
        """A row for each name in the content store but these: how many bytes it reaches, and whose name it is."""
        rows: list[dict[str, str | int]] = []
        for name, target in self._layout.entries():
            if name not in without:
                size = sum(part.size for part in self._layout.reachable(target))
                whose = "our" if MANAGED in target.annotations else "another tool's"
                rows.append(
                    {"what": name or target.digest, "size": size, "why": f"{whose} name in the content store"}
                )
        return rows

    def would_free(self, artifacts: Iterable[Artifact], dropped: Collection[str], *, young: int) -> int:
        """What `sweep` would free, were there only these artifacts and without these names."""
        needed = reached(self._layout, without=dropped) | {*_blobs(artifacts)} | {*self._pinned()}
        return sum(path.lstat().st_size for path in orphans(self._layout, older_than=young, needed=needed))

    def _needed(self) -> Iterator[str]:
        yield from _blobs(self._registrar.artifacts())
        yield from self._pinned()

    def _pinned(self) -> Iterator[str]:
        for pin in self._pins:
            for file in pin.files:
                yield from (facts["sha256"] for facts in file.record["files"].values())

    def _unprovided(self, wanted: Collection[str]) -> set[str]:
        recorded = {layout_name(kind, *version) for kind in KINDS for version in self._store.recorded(kind)}
        return recorded - {*wanted}

    def _longest_unused(self, young: int) -> list[str]:
        """Our names of images that were pulled, the longest unused first."""
        with self._registry.database.reading() as transaction:
            rows = transaction.rows(
                "SELECT digest, last_used_at FROM content_use WHERE store_id = ?", (self._registry.store_id,)
            )
        used: dict[str, int] = dict(rows)
        found = []
        for name, target in self._layout.names().items():
            if MANAGED in target.annotations and SOURCE in target.annotations and BASE not in target.annotations:
                last = max(used.get(target.digest, 0), self._given(target))
                if last <= young:
                    found.append((last, name))
        return [name for _, name in sorted(found)]

    def _given(self, target: Descriptor) -> float:
        try:
            return self._layout.blob(target.digest).stat().st_mtime
        except FileNotFoundError:
            return 0

    def _twin_of(self, target: Descriptor) -> str | None:
        try:
            annotations = self._layout.read_json(target.digest).get("annotations") or {}
        except NotFound:
            return None
        return annotations.get(CONVERTED) if isinstance(annotations, dict) else None


def _blobs(artifacts: Iterable[Artifact]) -> Iterator[str]:
    for artifact in artifacts:
        yield from (facts.sha256 for facts in artifact.files.values())


def _texts(inputs: Mapping[str, Any]) -> Iterator[str]:
    """Every text in it, among which are digests of what something was made from."""
    for value in inputs.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(value)
