"""Images that come into the content store, as the OCI images they are: the bases of initrds, and guests'.

A busybox from a distribution's package becomes an image of one layer there; one from a registry is pulled as it is.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from systemfiles.content.descriptors import IMAGE_CONFIG, MANIFEST, Descriptor, image_config, manifest
from systemfiles.content.images import Image, copy_command, find_image, pulled_name
from systemfiles.content.index import BASE, SOURCE
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import IntegrityError, NotProvisioned, StoreError, UsageError, blaming
from systemfiles.foundation.lock import locked
from systemfiles.foundation.lockfile import PackagePin
from systemfiles.provision.rolling import name_of_version
from systemfiles.provision.site import FORGOTTEN, MIRRORS, Site
from systemfiles.recipes.busybox import layer_from_deb

if TYPE_CHECKING:
    from systemfiles.provision.pull import Gate

log = logging.getLogger(__name__)

_ELSEWHERE = (
    "use a mirror ([mirrors] in versions.toml or $SYSTEMFILES_MIRRORS), "
    "or bring the image in by another tool: systemfiles lock -- skopeo copy …"
)
IMAGE = "image"
LAYER = "application/vnd.oci.image.layer.v1.tar"


class Images:
    """Provides images in one data directory's content store."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._layout = site.store.layout

    def kept(self, source: PackagePin | str, arch: Arch) -> tuple[Path, ...] | None:
        """The image's layers when all of it is here and intact."""
        target = self._layout.names().get(_name(source, arch))
        if target is None or target.annotations.get(SOURCE) != _identity(source):
            return None
        try:
            layers = self._layers(target)
        except (StoreError, IntegrityError, KeyError, TypeError) as error:
            log.warning("%s in the content store cannot be used: %s", _name(source, arch), error)
            return None
        if not all(self._layout.intact(part.digest, part.size) for part in self._layout.reachable(target)):
            return None
        return layers

    def busybox(self, source: PackagePin | str, arch: Arch) -> tuple[Path, ...]:
        """The layers of the busybox image, lowest first, fetched when they are not here.

        Raises SourceError, IntegrityError, InvalidArchive, StoreError.
        """
        if kept := self.kept(source, arch):
            return kept
        lock = self._site.paths.lock(_name(source, arch))
        with locked(lock, timeout=self._site.timeout), self._layout.ingesting():
            if kept := self.kept(source, arch):
                return kept
            target = self._from_package(source, arch) if isinstance(source, PackagePin) else self._pull(source, arch)
            self._layout.name(_name(source, arch), replace(target, annotations={**target.annotations, BASE: "true"}))
            return self._layers(target)

    def repair(self, source: PackagePin | str, arch: Arch) -> None:
        """Fetches an image again that is named here and not intact. Raises as `busybox`."""
        if _name(source, arch) in self._layout.names():
            self.busybox(source, arch)

    def image(self, reference: str, arch: Arch) -> Image:
        """The image of this name or digest; pulled when it is not here, whole, and `reference` names its registry.

        Raises NotProvisioned when it does not, SourceError, IntegrityError, LockTimeout, StoreError.
        """
        if not _names_registry(reference):
            if found := find_image(self._site.paths, reference, arch):
                return found
            provide = copy_command(self._site.paths, reference, arch)
            raise NotProvisioned(IMAGE, reference, arch.value, looked_in=self._layout.root, provide=provide)
        name = pulled_name(reference, arch)
        # a reference may be longer than a file's name
        lock = self._site.paths.lock(f"image-{Digest.of(name.encode()).hex}")
        with locked(lock, timeout=self._site.timeout), self._layout.ingesting():
            if found := self._found_whole(reference, arch):
                return found
            self._site.sweep()
            self._layout.name(name, self._pull(reference, arch, hint=_ELSEWHERE))
            found = find_image(self._site.paths, reference, arch)
            assert found
            return found

    def _found_whole(self, reference: str, arch: Arch) -> Image | None:
        try:
            return find_image(self._site.paths, reference, arch)
        except IntegrityError as error:
            log.warning("the image %s is pulled again: %s", reference, error)
            return None

    def fetch(self, reference: str, arch: Arch, *, gate: Gate | None = None) -> Descriptor:
        """Pulls an image or an artifact, which has no name here yet. Call it while `ingesting`.

        `gate` as in `Puller.pull`. Raises as `image`.
        """
        return self._pull(reference, arch, gate=gate)

    def _layers(self, target: Descriptor) -> tuple[Path, ...]:
        layers = map(Descriptor.from_json, self._layout.read_json(target.digest)["layers"])
        return tuple(self._layout.blob(layer.digest) for layer in layers)

    def _pull(self, reference: str, arch: Arch, *, hint: str = MIRRORS, gate: Gate | None = None) -> Descriptor:
        from systemfiles.provision.pull import Puller  # 100 ms for `requests`, and most runs fetch nothing

        target = Puller(self._site).pull(reference, arch, hint=hint, gate=gate)
        return Descriptor(target.media_type, target.digest, target.size, {SOURCE: _identity(reference)})

    def _from_package(self, pin: PackagePin, arch: Arch) -> Descriptor:
        from systemfiles.sources.apt import apt_proxies
        from systemfiles.sources.http import fetch

        with self._layout.new_file() as package:
            fetch(
                pin.url,
                package,
                subject=f"busybox {pin.version} ({arch})",
                digest=Digest.from_hex(pin.sha256),
                size=pin.size,
                mirrors=self._site.catalog.mirrors,
                proxies=apt_proxies(),
                hint=FORGOTTEN,
                progress=self._site.progress,
            )
            with blaming(pin.url):
                data = layer_from_deb(package.path, arch)
        layer = self._layout.add_bytes(data, LAYER)
        described = self._layout.add_bytes(image_config(arch, [layer]), IMAGE_CONFIG)
        annotations = {SOURCE: _identity(pin), "org.opencontainers.image.version": pin.version}
        return self._layout.add_bytes(manifest(described, [layer], annotations), MANIFEST, annotations=annotations)


def _name(source: PackagePin | str, arch: Arch) -> str:
    if isinstance(source, PackagePin):
        return f"{source.package}-{name_of_version(source.version)}-{arch}"
    return pulled_name(source.partition("@")[0], arch)


def _identity(source: PackagePin | str) -> str:
    return f"sha256:{source.sha256}" if isinstance(source, PackagePin) else source.rpartition("@")[2]


def _names_registry(reference: str) -> bool:
    """Whether it is a full reference, with the registry's host in it: short ones may be names of this content store."""
    from systemfiles.sources.oci import Reference  # 100 ms for `requests`

    try:
        return str(Reference.parse(reference)) == reference
    except UsageError:
        return False
