"""The base images that initrds are built on, in the content store as the OCI images they are.

A busybox from a distribution's package becomes an image of one layer there; one from a registry is pulled as it is.
"""

from __future__ import annotations

import logging
from pathlib import Path

from systemfiles.content.layout import IMAGE_CONFIG, MANIFEST, Descriptor, image_config, manifest
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import IntegrityError, StoreError, blaming
from systemfiles.foundation.lock import locked
from systemfiles.foundation.lockfile import PackagePin
from systemfiles.provision.rolling import name_of_version
from systemfiles.provision.site import FORGOTTEN, Site
from systemfiles.recipes.busybox import layer_from_deb

log = logging.getLogger(__name__)

LAYER = "application/vnd.oci.image.layer.v1.tar"
SOURCE = "io.systemfiles.source"


class Images:
    """Provides base images in one data directory's content store."""

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
        with locked(self._site.paths.lock(_name(source, arch)), timeout=self._site.timeout):
            if kept := self.kept(source, arch):
                return kept
            target = self._from_package(source, arch) if isinstance(source, PackagePin) else self._pull(source, arch)
            self._layout.name(_name(source, arch), target)
            return self._layers(target)

    def repair(self, source: PackagePin | str, arch: Arch) -> None:
        """Fetches an image again that is named here and not intact. Raises as `busybox`."""
        if _name(source, arch) in self._layout.names():
            self.busybox(source, arch)

    def _layers(self, target: Descriptor) -> tuple[Path, ...]:
        layers = map(Descriptor.from_json, self._layout.read_json(target.digest)["layers"])
        return tuple(self._layout.blob(layer.digest) for layer in layers)

    def _pull(self, reference: str, arch: Arch) -> Descriptor:
        from systemfiles.provision.pull import Puller  # 100 ms for `requests`, and most runs fetch nothing

        target = Puller(self._site).pull(reference, arch)
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
    return f"{source.partition('@')[0]}-{arch}"


def _identity(source: PackagePin | str) -> str:
    return f"sha256:{source.sha256}" if isinstance(source, PackagePin) else source.rpartition("@")[2]
