"""Images in the content store, found again as what a guest's disks are made of.

index.json knows them by names, and a name points to a manifest or to an index of several platforms::

    <any name>          what another tool called it
    <reference>-<arch>  pulled from a registry; the annotation io.systemfiles.source has the digest that it was pulled
                        by, else the reference
    docker-<12 hex>     a manifest of Docker's schema as it came, beside the same in OCI's terms under one of the others

Looking one up reads the manifest and the configuration, whose digests are compared. Layers, which may be large, must be
there with the size that the manifest says; their bytes are compared when they come in, and by `systemfiles verify`.

Source: OCI image-spec, image-layout.md, manifest.md and config.md.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from systemfiles.content.descriptors import IMAGE_CONFIG, Descriptor
from systemfiles.content.index import SOURCE
from systemfiles.content.layout import Layout
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    IntegrityError,
    InvalidDigest,
    NotFound,
    SizeMismatch,
    SourceRefused,
    StoreError,
    require_fault_of_file,
)
from systemfiles.foundation.manifests import DOCKER_CONFIG, Manifest, for_platform, parse_manifest, require_platform
from systemfiles.foundation.paths import Paths
from systemfiles.foundation.units import printable

LARGEST_LAYER = 16 << 30
_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.(nondistributable\.)?v1\.tar|docker\.image\.rootfs\.(foreign\.)?diff\.tar)"
    r"([+.](gzip|zstd))?"
)


@dataclass(frozen=True, slots=True)
class Image:
    """An image for one architecture, all of it in the content store.

    `reference` is what it was asked for by, `digest` its manifest's, `config` its whole configuration (image-spec,
    config.md). `layers` are blobs, lowest first; other processes may read them at any time.
    """

    reference: str
    digest: Digest
    arch: Arch
    config: Mapping[str, Any]
    layers: tuple[Path, ...]


def pulled_name(reference: str, arch: Arch) -> str:
    """What an image that was pulled from a registry is called in index.json."""
    return f"{reference}-{arch}"


def find_image(paths: Paths, reference: str, arch: Arch) -> Image | None:
    """The image of this name, digest (`sha256:…`) or registry reference; None when nothing here is called that.

    A reference with a digest gives just that, whatever it is called here. Raises IntegrityError for one that is not
    whole, SourceRefused for what is no image for `arch`, StoreError.
    """
    return _Lookup(paths, reference, arch).find()


def copy_command(paths: Paths, reference: str, arch: Arch) -> str:
    """A command that brings an image into the content store under this name."""
    alone = _digest(reference) == reference
    name = "NAME" if alone else reference.partition("@")[0]
    source = f"REPOSITORY@{reference}" if alone else reference
    words = ["systemfiles", "lock", "--data-dir", str(paths.data_dir), "--", "skopeo"]
    words += [] if arch is Arch.host() else ["--override-arch", arch.debian]
    return shlex.join([*words, "copy", f"docker://{source}", f"oci:{paths.oci_cache}:{name}"])


def parts_of(manifest: Manifest, *, subject: str) -> list[Descriptor]:
    """The config and the layers of an image. Raises SourceRefused."""
    try:
        parts = [Descriptor.from_json(part) for part in (manifest.value["config"], *manifest.value["layers"])]
    except (StoreError, KeyError, TypeError) as error:
        raise SourceRefused(subject, f"its manifest is broken ({error})") from error
    sizes: dict[Digest, int] = {}
    for part in parts:
        if part.size > LARGEST_LAYER:
            raise SourceRefused(subject, f"its layer {part.digest} is {part.size} bytes long")
        if sizes.setdefault(part.digest, part.size) != part.size:
            raise SourceRefused(subject, f"its manifest is broken ({part.digest} has two sizes)")
    return parts


def entry_of(value: Mapping[str, Any], *, subject: str) -> Descriptor:
    """An entry of an index. Raises SourceRefused."""
    try:
        return Descriptor.from_json(value)
    except StoreError as error:
        raise SourceRefused(subject, f"its index is broken ({error})") from error


def read_config(layout: Layout, config: Descriptor, *, subject: str) -> dict[str, Any]:
    """The configuration of an image. Raises SourceRefused for what is no JSON object of at most 4 MiB."""
    try:
        return layout.read_json(config.digest)
    except StoreError as error:
        raise SourceRefused(subject, f"its configuration is broken ({error.summary})") from error


def _digest(reference: str) -> Digest | None:
    """The one that a reference ends with, or is."""
    try:
        return Digest.parse(reference.rpartition("@")[2])
    except InvalidDigest:
        return None


class _Lookup:
    """The search for one image."""

    def __init__(self, paths: Paths, reference: str, arch: Arch) -> None:
        self._paths = paths
        self._layout = Layout(paths)
        self._reference = reference
        self._digest = _digest(reference)
        self._arch = arch

    def find(self) -> Image | None:
        if target := self._target():
            return self._open(self._read(target.digest, target.media_type))
        if self._digest and self._digest == self._reference and self._layout.blob(self._digest).exists():
            return self._open(self._read(self._digest, None))
        return None

    def _target(self) -> Descriptor | None:
        """What index.json has for the reference."""
        named = self._layout.names()
        if self._digest is None:
            return named.get(pulled_name(self._reference, self._arch)) or named.get(self._reference)
        for target in named.values():
            if target.digest == self._digest:
                return target
        # pulled by the digest of an index, which is not kept here
        for known in (self._reference, self._reference.partition("@")[0]):
            pulled = named.get(pulled_name(known, self._arch))
            if pulled is not None and pulled.annotations.get(SOURCE) == self._digest:
                return pulled
        return None

    def _read(self, digest: Digest, media_type: str | None) -> Manifest:
        try:
            return parse_manifest(self._layout.read(digest), media_type, subject=self._reference)
        except NotFound as error:
            raise self._not_whole(digest, "a manifest", "no file") from error

    def _entry(self, value: Mapping[str, Any]) -> Manifest:
        entry = entry_of(value, subject=self._reference)
        return self._read(entry.digest, entry.media_type)

    def _open(self, found: Manifest) -> Image:
        subject = self._reference
        manifest = for_platform(found, self._arch, self._entry, subject=subject)
        config, *layers = parts_of(manifest, subject=subject)
        _require_image(config, layers, subject=subject)
        for part in (config, *layers):
            self._require_there(part)
        told = read_config(self._layout, config, subject=subject)
        require_platform(told, self._arch, subject=subject)
        blobs = tuple(self._layout.blob(layer.digest) for layer in layers)
        return Image(subject, manifest.digest, self._arch, told, blobs)

    def _require_there(self, part: Descriptor) -> None:
        path = self._layout.blob(part.digest)
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            require_fault_of_file(error, path)
            size = None
        if size != part.size:
            raise self._not_whole(part.digest, f"{part.size} bytes", "no file" if size is None else f"{size} bytes")

    def _not_whole(self, digest: Digest, expected: str, got: str) -> IntegrityError:
        path = self._layout.blob(digest)
        there = path.exists()
        kind = SizeMismatch if there else IntegrityError
        error = kind(path, expected=expected, got=got, consequence=f"the image {self._reference} is not whole")
        again = copy_command(self._paths, self._reference, self._arch)
        error.hint = f"{'remove that file and ' if there else ''}bring the image in again, such as by: {again}"
        return error


def _require_image(config: Descriptor, layers: Sequence[Descriptor], *, subject: str) -> None:
    """Refuses an artifact of another kind; kernels and initrds are some in this store."""
    if config.media_type not in (IMAGE_CONFIG, DOCKER_CONFIG):
        raise SourceRefused(subject, f"it is no image: its configuration is {printable(config.media_type)!r}")
    for layer in layers:
        if not _LAYER.fullmatch(layer.media_type):
            raise SourceRefused(subject, f"it is no image: one of its layers is {printable(layer.media_type)!r}")
