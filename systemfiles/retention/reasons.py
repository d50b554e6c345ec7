"""Why an artifact is kept, as one line that an operator reads: the roots of a collection, and what they need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from systemfiles.content.artifacts import Artifact, fits
from systemfiles.content.index import MANAGED
from systemfiles.content.layout import Layout
from systemfiles.content.store import layout_name
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.paths import INITRD, KERNEL
from systemfiles.retention.pins import Pin, PinnedFile

if TYPE_CHECKING:
    from systemfiles.foundation.catalog import Catalog, Profile
    from systemfiles.foundation.lockfile import ProfilePin, VersionsLock

Reasons = dict[str, str]
"""By asset id: why it is kept, all reasons in one line. What is not in it goes."""


def asset_id(kind: str, version: str, arch: Arch) -> str:
    """What an artifact is called in the registry: as in index.json."""
    return layout_name(kind, version, arch)


def id_of(artifact: Artifact) -> str:
    return asset_id(artifact.kind, artifact.version, artifact.arch)


def id_of_file(file: PinnedFile) -> str:
    return asset_id(file.kind, file.version, file.arch)


class Explanation(NamedTuple):
    """Why something is kept, or why it would go."""

    what: str
    kept: bool
    why: str


class Facts(NamedTuple):
    """What is known of the artifacts of one store. Times are UTC seconds.

    `leases` maps an asset's id to those who hold it, `used` to when it was last accessed or made.
    """

    artifacts: tuple[Artifact, ...]
    pins: tuple[Pin, ...]
    leases: Mapping[str, tuple[str, ...]]
    used: Mapping[str, int]


def reasons(
    facts: Facts, layout: Layout, catalog: Catalog, lock: VersionsLock, *, keep_last: int, young: int
) -> Reasons:
    """What is kept, and why, be it here or not. `young` is the time after which whatever was used is left alone."""
    every = [
        *_pinned(facts.pins),
        *_leased(facts.leases),
        *_current(catalog, lock),
        *_named_by_others(facts.artifacts, layout),
        *_newest(facts, keep_last),
        *_young(facts.used, young),
    ]
    return _together([*every, *_needed(facts.artifacts, dict(every))])


def in_use(leases: Mapping[str, tuple[str, ...]], used: Mapping[str, int], *, young: int) -> Reasons:
    """What is kept of assets that are nothing but leased and used; arguments as in `Facts`."""
    return _together([*_leased(leases), *_young(used, young)])


def _together(every: Iterable[tuple[str, str]]) -> Reasons:
    """All reasons to keep each asset, in one line."""
    kept: dict[str, dict[str, None]] = {}
    for asset, why in every:
        kept.setdefault(asset, {})[why] = None
    return {asset: "; ".join(whys) for asset, whys in kept.items()}


def _pinned(pins: Iterable[Pin]) -> Iterator[tuple[str, str]]:
    by: dict[str, list[str]] = {}
    for pin in pins:
        with_what = f" (hypervisor {pin.hypervisor})" if pin.hypervisor else ""
        for file in pin.files:
            by.setdefault(id_of_file(file), []).append(f"{pin.name} since {pin.created_at[:10]}{with_what}")
    for asset, told in by.items():
        yield asset, f"pinned by {_first(told)}"


def _first(every: Sequence[str], most: int = 3) -> str:
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return f"{', '.join(every[:most])}{more}"


def _leased(leases: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    for asset, holders in leases.items():
        yield asset, f"leased by {_first(holders)}"


def current(catalog: Catalog, lock: VersionsLock) -> Reasons:
    """What the profiles name, and what their names stand for: here or not, it is kept."""
    return _together(_current(catalog, lock))


def _current(catalog: Catalog, lock: VersionsLock) -> Iterator[tuple[str, str]]:
    """What the names of each profile stand for, and rolling names of profiles that the catalog has no more.

    On every architecture: if it is here, it was provisioned here. And as the profile was when it was: the catalog may
    be another one now, or not the one that it was.
    """
    pairs: list[tuple[str, Profile | ProfilePin, Arch]] = []
    pairs += [(name, pair, arch) for name, pair in catalog.profile.items() for arch in Arch]
    pairs += [(name, pair, arch) for name, arches in lock.profile.items() for arch, pair in arches.items()]
    for name, pair, arch in pairs:
        why = f"the current version of profile {name}"
        yield asset_id(KERNEL, pair.kernel, arch), why
        yield asset_id(INITRD, pair.initrd, arch), why
        if kernel := lock.rolling.get(pair.kernel, {}).get(arch):
            yield asset_id(KERNEL, kernel, arch), why
    fixed = {pair.kernel for _, pair, _ in pairs}
    for name, kernels in lock.rolling.items():
        for arch, kernel in kernels.items() if name not in fixed else ():
            yield asset_id(KERNEL, kernel, arch), f"the current version of {name}"
    for name, initrds in lock.current.items():
        for kernel, versions in initrds.items():
            for arch, version in versions.items():
                if kernel in fixed or kernel in (of.get(arch) for of in lock.rolling.values()):
                    yield asset_id(INITRD, version, arch), f"the current version of {name}"


def named_by_others(layout: Layout) -> dict[str, str]:
    """The digests, in hex, of what entries of other tools in index.json reach, and under which name."""
    named: dict[str, str] = {}
    for name, target in layout.entries():
        if MANAGED not in target.annotations:
            for part in layout.reachable(target, strict=True):
                named.setdefault(part.digest.hex, name or target.digest)
    return named


def _named_by_others(artifacts: Iterable[Artifact], layout: Layout) -> Iterator[tuple[str, str]]:
    named = named_by_others(layout)
    for artifact in artifacts:
        for facts in artifact.files.values():
            if facts.sha256 in named:
                yield id_of(artifact), f"named {named[facts.sha256]} by another tool in the content store"


def _newest(facts: Facts, keep_last: int) -> Iterator[tuple[str, str]]:
    groups: dict[tuple[str, Arch], list[Artifact]] = {}
    for artifact in facts.artifacts:
        groups.setdefault((artifact.kind, artifact.arch), []).append(artifact)
    for (kind, arch), group in groups.items():
        newest = sorted(group, key=lambda artifact: (str(artifact.record.get("created_at")), artifact.version))
        for artifact in newest[len(newest) - keep_last :] if keep_last else ():
            which = "the newest" if keep_last == 1 else f"one of the {keep_last} newest"
            yield id_of(artifact), f"{which} {kind}{'s' * (keep_last > 1)} for {arch}"


def _young(used: Mapping[str, int], young: int) -> Iterator[tuple[str, str]]:
    for asset, last in used.items():
        if last > young:
            yield asset, "used within the grace period"


def _needed(artifacts: Iterable[Artifact], kept: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The kernels that initrds which are kept carry the modules of: without them they are good for nothing."""
    every = [*artifacts]
    for initrd in every:
        if initrd.kind == INITRD and initrd.requires_kernel and id_of(initrd) in kept:
            for kernel in every:
                if kernel.kind == KERNEL and kernel.arch is initrd.arch and fits(initrd.inputs, kernel):
                    yield id_of(kernel), f"initrd {initrd.version} carries its modules"
