"""Manifests and indexes (OCI image-spec, manifest.md and image-index.md; Docker's schema 2), read without belief.

A manifest names the blobs of one image; an index names one manifest, or index, for each platform.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceRefused
from systemfiles.foundation.units import printable

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFESTS = (IMAGE_MANIFEST, DOCKER_MANIFEST)
INDEXES = (IMAGE_INDEX, DOCKER_LIST)
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
_DEEPEST_INDEX = 4
_MOST_INDEXES = 16
_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest or index: its bytes as they came, their digest, and what they say."""

    raw: bytes
    digest: Digest
    media_type: str
    value: Mapping[str, Any]


class NoPlatform(SourceRefused):
    """An index has nothing for the platform that was asked for."""


def parse_manifest(raw: bytes, media_type: str | None, *, subject: str) -> Manifest:
    """What `raw` says; its own mediaType must not contradict the one it came as. Raises SourceRefused.

    A server that knows nothing of manifests may send it as anything else, when it has a mediaType of its own. Where
    nobody says what it came as (None), one without a mediaType is OCI's, which may leave that out.
    """
    try:
        value = json.loads(raw)
        by_default = (IMAGE_INDEX if "manifests" in value else IMAGE_MANIFEST) if media_type is None else media_type
        own = value.get("mediaType") or by_default
        kind = INDEXES if "manifests" in value else MANIFESTS
        fits = value.get("schemaVersion") == 2 and own in kind and ("manifests" in value) != ("layers" in value)
    except (ValueError, AttributeError, TypeError, RecursionError):
        fits, own, value = False, media_type or "", {}
    if fits and own != media_type and media_type in (*MANIFESTS, *INDEXES):
        raise SourceRefused(subject, f"it came as {media_type} and says it is {own}")
    if not fits:
        words = printable(own)[:100] if isinstance(own, str) and own else "no type"
        raise SourceRefused(subject, f"it is no manifest or index that is understood here ({words})")
    return Manifest(raw, Digest.of(raw), own, value)


def choose(index: Manifest, arch: Arch, *, subject: str) -> list[Mapping[str, Any]]:
    """The entries of an index for Linux on `arch`, best first; entries for no platform (attestations) are no choice.

    Nested indexes, which need not say a platform, come last. Raises NoPlatform when there is none.
    """
    exact, nested, seen = [], [], set()
    for entry in _objects(index.value["manifests"]):
        platform = entry.get("platform") if isinstance(entry.get("platform"), dict) else {}
        assert isinstance(platform, dict)
        name = "/".join(str(platform[key]) for key in ("os", "architecture", "variant") if platform.get(key))
        if entry.get("mediaType") in INDEXES and not platform:
            nested.append(entry)
        elif platform.get("os") == "linux" and platform.get("architecture") == arch.debian:
            exact.append((platform.get("variant") not in (None, "", "v8"), entry))
        elif name and "unknown" not in name:
            seen.add(name)
    found = [entry for _, entry in sorted(exact, key=lambda pair: pair[0])] + nested
    if not found:
        there = sorted(printable(name) for name in seen)[:_MOST_NAMED]
        raise NoPlatform(subject, f"it has nothing for linux/{arch.debian}, only {', '.join(there) or 'nothing'}")
    return found


def for_platform(
    found: Manifest, arch: Arch, get: Callable[[Mapping[str, Any]], Manifest], *, subject: str
) -> Manifest:
    """`found` itself or, when it is an index, what that has for Linux on `arch`, perhaps in a nested index.

    `get` reads what an entry of an index points to. Raises NoPlatform, SourceRefused, and whatever `get` raises.
    """
    return _Search(arch, get, subject).find(found)


class _Search:
    """The search for one platform's image among indexes."""

    def __init__(self, arch: Arch, get: Callable[[Mapping[str, Any]], Manifest], subject: str) -> None:
        self._arch = arch
        self._get_entry = get
        self._subject = subject
        self._asked = 0

    def find(self, found: Manifest, depth: int = 0) -> Manifest:
        if found.media_type not in INDEXES:
            return found
        if depth == _DEEPEST_INDEX:
            raise SourceRefused(self._subject, f"its indexes are nested more than {_DEEPEST_INDEX} deep")
        *others, last = choose(found, self._arch, subject=self._subject)
        for entry in others:
            with contextlib.suppress(NoPlatform):
                return self.find(self._get(entry), depth + 1)
        return self.find(self._get(last), depth + 1)

    def _get(self, entry: Mapping[str, Any]) -> Manifest:
        self._asked += 1
        if self._asked > _MOST_INDEXES:
            raise SourceRefused(self._subject, f"it has more than {_MOST_INDEXES} indexes to look into")
        return self._get_entry(entry)


def require_platform(config: Mapping[str, Any], arch: Arch, *, subject: str) -> None:
    """Refuses an image whose configuration says that it is for another machine: it may be named without any index.

    Raises SourceRefused.
    """
    said = (str(config.get("os") or "linux"), str(config.get("architecture") or arch.debian))
    if said != ("linux", arch.debian):
        raise SourceRefused(subject, f"it is for {printable('/'.join(said))}, and linux/{arch.debian} is wanted")


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
