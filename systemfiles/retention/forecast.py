"""What a collection would do, told without doing anything: nothing is written, and nothing locked."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from systemfiles.content.artifacts import Artifact
from systemfiles.foundation.errors import AssetNotFound, UsageError
from systemfiles.registry.assets import Asset, Assets
from systemfiles.registry.registry import Registry
from systemfiles.registry.tombstones import Tombstone, Tombstones
from systemfiles.retention.collection import Collector, artifact_at, on_disk
from systemfiles.retention.eviction import Evictor
from systemfiles.retention.outcome import UNFINISHED, UNHELD, Gone, Outcome
from systemfiles.retention.reasons import Reasons, id_of
from systemfiles.retention.registrar import Registrar

_GOING = "what it names would go"


class Forecast:
    """Goes the way of a collection, and only looks."""

    def __init__(self, registry: Registry, registrar: Registrar, collector: Collector, evictor: Evictor) -> None:
        self._registry = registry
        self._registrar = registrar
        self._collector = collector
        self._evictor = evictor

    def collect(self, kept: Reasons, *, young: int, max_cache_bytes: int | None) -> Outcome:
        """What would go. Raises StoreError, IntegrityError when it cannot be told what is held."""
        outcome = Outcome()
        artifacts = [*self._registrar.artifacts()]
        staying = [artifact for artifact in artifacts if id_of(artifact) in kept]
        going = {id_of(artifact): artifact.directory for artifact in artifacts if id_of(artifact) not in kept}
        doomed = self._doomed()
        outcome.went(*(self._gone(artifact, doomed) for artifact in artifacts if id_of(artifact) in going))
        going |= self._rows({id_of(artifact) for artifact in artifacts}, kept, young, outcome)
        unfinished = {asset: place for asset, place in self._collector.unfinished(kept, young) if asset not in going}
        outcome.went(*(Gone(asset, UNFINISHED, "", 0) for asset in unfinished))
        going |= unfinished

        idle = self._evictor.idle(staying, kept, young=young, going=going)
        outcome.went(*(Gone(name, why, "", 0) for name, why in idle.items() if name not in going))
        dropped = {*idle, *going}
        if max_cache_bytes is not None:
            evicted = self._evictor.to_evict(max_cache_bytes, staying, young=young, without=dropped)
            outcome.went(*evicted)
            dropped |= {each.what for each in evicted}
        directories = [place for place in going.values() if place.is_dir()]
        links = Counter(path.lstat().st_ino for directory in directories for path in directory.iterdir())
        outcome.freed += sum(_directories(directories, links))
        outcome.freed += self._evictor.would_sweep(staying, dropped, young=young, links=links)
        return outcome

    def dropped(self, kept: Reasons, *, young: int) -> dict[str, str]:
        """Our names in the content store that would be dropped however large it is, and why. Raises as `collect`."""
        artifacts = [*self._registrar.artifacts()]
        going = {id_of(artifact): _GOING for artifact in artifacts if id_of(artifact) not in kept}
        going |= {asset: UNFINISHED for asset, _ in self._collector.unfinished(kept, young) if asset not in going}
        staying = [artifact for artifact in artifacts if id_of(artifact) in kept]
        return self._evictor.idle(staying, kept, young=young, going=going) | going

    def _gone(self, artifact: Artifact, doomed: Mapping[str, Tombstone]) -> Gone:
        if stone := doomed.get(id_of(artifact)):
            return _told(stone)
        asset = self._asset(id_of(artifact))
        return Gone(id_of(artifact), UNHELD, asset.last_held_by if asset else "", artifact.files[artifact.file].size)

    def _doomed(self) -> dict[str, Tombstone]:
        """The artifacts to which an earlier collection, or a deletion, did not get."""
        if registry := self._registry.look():
            every = (stone for stones in Tombstones(*registry).pending() for stone in stones)
            return {stone.asset_id: stone for stone in every if artifact_at(stone.path, stone.asset_id)}
        return {}

    def _asset(self, asset: str) -> Asset | None:
        found = self._registry.look()
        if found is not None:
            with contextlib.suppress(AssetNotFound):
                return Assets(found[0]).get(asset, now=self._registry.now(), access=False)
        return None

    def _rows(self, there: set[str], kept: Reasons, young: int, outcome: Outcome) -> dict[str, Path]:
        """What the registry knows that is no artifact here, and what an earlier collection did not get to.

        Returns where the artifacts among them would be.
        """
        registry = self._registry.look()
        if registry is None:
            return {}
        places = {}
        for asset_id, path, gone in self._leaving(Tombstones(*registry), young):
            if asset_id in kept or asset_id in there:
                continue
            if key := artifact_at(path, asset_id):
                places[asset_id] = self._collector.directory(key)
            else:
                try:
                    outcome.freed += _blocks(self._collector.file_of(path))
                except UsageError as error:
                    outcome.failed(error)
                    continue
            outcome.went(gone)
        return places

    def _leaving(self, tombstones: Tombstones, young: int) -> Iterator[tuple[str, str, Gone]]:
        """Id, path, and what would be told."""
        doomed = set[tuple[str, str]]()  # an id may come again with another file
        for stones in tombstones.pending():
            for stone in (each for each in stones if (each.asset_id, each.path) not in doomed):
                doomed.add((stone.asset_id, stone.path))
                yield stone.asset_id, stone.path, _told(stone)
        for batch in tombstones.candidates(now=self._registry.now(), unused_since=young):
            for each in batch:
                if (each.id, each.path) not in doomed:
                    yield each.id, each.path, Gone(each.id, UNHELD, each.last_held_by, each.size_bytes)


def _told(stone: Tombstone) -> Gone:
    return Gone(stone.asset_id, stone.reason, stone.last_held_by, stone.size_bytes)


def _directories(directories: list[Path], links: Counter[int]) -> Iterator[int]:
    """What each of them takes, and their parents where nothing else is in them."""
    for directory in directories:
        yield on_disk(directory, links)
    for parent, count in Counter(directory.parent for directory in directories).items():
        if len([*parent.iterdir()]) == count:
            yield parent.lstat().st_blocks * 512


def _blocks(file: Path) -> int:
    try:
        found = file.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return found.st_blocks * 512 if found.st_nlink == 1 else 0
