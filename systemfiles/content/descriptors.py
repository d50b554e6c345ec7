"""Descriptors, and the JSON documents that they point to (image-spec: descriptor.md, manifest.md, config.md).

Equal values are equal bytes, so that the same image has the same digest whoever writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import InvalidDigest, StoreError

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
BLOB = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What points to a blob (image-spec, descriptor.md). `size` in bytes."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return {**plain, "annotations": dict(self.annotations)} if self.annotations else plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Descriptor:
        """Raises StoreError when `value` is not a descriptor."""
        try:
            digest = Digest.parse(value["digest"])
            size = value["size"]
            if not isinstance(size, int) or size < 0:
                raise ValueError(size)
            return cls(str(value["mediaType"]), digest, size, dict(value.get("annotations") or {}))
        except (KeyError, TypeError, ValueError, AttributeError, InvalidDigest) as error:
            msg = f"{value!r:.200} is not an OCI descriptor"
            raise StoreError(msg) from error


def manifest(
    config: Descriptor,
    layers: Sequence[Descriptor],
    annotations: Mapping[str, str],
    *,
    artifact_type: str | None = None,
) -> bytes:
    """The bytes of an image manifest (image-spec, manifest.md); the same for the same arguments."""
    value: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "annotations": dict(annotations),
    }
    if artifact_type:
        value["artifactType"] = artifact_type
    return canonical(value)


def image_config(arch: Arch, layers: Sequence[Descriptor]) -> bytes:
    """The bytes of an image's configuration (image-spec, config.md) that says its platform and uncompressed layers."""
    rootfs = {"type": "layers", "diff_ids": [layer.digest for layer in layers]}
    return canonical({"architecture": arch.debian, "os": "linux", "config": {}, "rootfs": rootfs})


def canonical(value: object) -> bytes:
    """JSON with sorted keys and no spaces, so that equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
