"""Manifests and indexes (OCI image-spec, manifest.md and image-index.md; Docker's schema 2), read without belief.

A manifest names the blobs of one image; an index names one manifest, or index, for each platform.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceRefused
from systemfiles.sources.transport import printable

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFESTS = (IMAGE_MANIFEST, DOCKER_MANIFEST)
INDEXES = (IMAGE_INDEX, DOCKER_LIST)
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


def parse_manifest(raw: bytes, media_type: str, *, subject: str) -> Manifest:
    """What `raw` says; its own mediaType must not contradict the one it came as. Raises SourceRefused.

    A server that knows nothing of manifests may send it as anything else, when it has a mediaType of its own.
    """
    try:
        value = json.loads(raw)
        own = value.get("mediaType") or media_type
        kind = INDEXES if "manifests" in value else MANIFESTS
        fits = value.get("schemaVersion") == 2 and own in kind and ("manifests" in value) != ("layers" in value)
    except (ValueError, AttributeError, TypeError, RecursionError):
        fits, own, value = False, media_type, {}
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


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
