"""Images from OCI registries into the content store: every blob as the bytes it is there."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, Protocol

from systemfiles.content.descriptors import IMAGE_CONFIG, Descriptor
from systemfiles.content.descriptors import manifest as image_manifest
from systemfiles.content.images import entry_of, parts_of, read_config
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import NoSpace
from systemfiles.foundation.files import free_bytes
from systemfiles.foundation.lock import Patience, locked, patience
from systemfiles.foundation.manifests import (
    DOCKER_CONFIG,
    DOCKER_MANIFEST,
    IMAGE_MANIFEST,
    Manifest,
    for_platform,
    require_platform,
)
from systemfiles.provision.site import MIRRORS, Site
from systemfiles.sources.http import candidates, try_each
from systemfiles.sources.oci import Reference, Repository
from systemfiles.sources.transport import Transport


class Gate(Protocol):
    """What is pulled must pass it; each raises unless that is acceptable."""

    def named(self, repository: Repository, found: Manifest) -> None:
        """`found` is what the reference names in `repository`."""

    def holds(self, config: Descriptor, layers: Sequence[Descriptor]) -> None:
        """These are the blobs of the image, of which none is fetched yet."""


PARALLEL = 4
CONVERTED = "io.systemfiles.converted-from"
_AS_OCI = {
    DOCKER_CONFIG: IMAGE_CONFIG,
    "application/vnd.docker.image.rootfs.diff.tar": "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
}


class Puller:
    """Pulls images; the same blob is fetched once, however many ask at the same time."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._layout = site.store.layout

    def pull(self, reference: str, arch: Arch, *, hint: str = MIRRORS, gate: Gate | None = None) -> Descriptor:
        """The manifest of image `reference` for `arch`, with all it refers to in the content store.

        Mirrors are tried first, the registry last; `hint` is for when none has it. What each has must pass
        `gate`. Raises SourceUnavailable, IntegrityError, UsageError, StoreError.
        """
        pulled: list[Descriptor] = []

        def get(place: str) -> None:
            pulled.append(self._pull_from(Reference.parse(place), arch, gate))

        try_each(candidates(reference, self._site.catalog.mirrors), get, subject=f"image {reference}", hint=hint)
        return pulled[-1]

    def _pull_from(self, reference: Reference, arch: Arch, gate: Gate | None) -> Descriptor:
        stop = threading.Event()
        repository = Repository(
            reference.registry,
            reference.repository,
            transport=Transport(stop=stop),
            plain_http=reference.plain_http,
        )

        def get(entry: Mapping[str, Any]) -> Manifest:
            return repository.manifest(entry_of(entry, subject=repository.name).digest)

        found = repository.manifest(reference.target)
        if gate:
            gate.named(repository, found)
        manifest = for_platform(found, arch, get, subject=repository.name)
        config, *layers = parts = parts_of(manifest, subject=str(reference))
        if gate:
            gate.holds(config, layers)
        self._layout.create()
        self._require_space(parts)
        self._fetch(repository, config, stop)
        self._require_platform(config, arch, str(reference))
        self._fetch_all(repository, layers, stop)
        return self._keep(manifest, parts)

    def _require_space(self, parts: Sequence[Descriptor]) -> None:
        missing = {part.digest: part.size for part in parts if not self._layout.blob(part.digest).exists()}
        needed, free = sum(missing.values()), free_bytes(self._layout.root)
        if needed > free:
            raise NoSpace(self._layout.root, needed=needed, free=free)

    def _require_platform(self, config: Descriptor, arch: Arch, subject: str) -> None:
        """Refuses an image that says it is for another machine: a manifest may be named without any index."""
        if config.media_type not in (IMAGE_CONFIG, DOCKER_CONFIG):
            return
        require_platform(read_config(self._layout, config, subject=subject), arch, subject=subject)

    def _fetch_all(self, repository: Repository, parts: Sequence[Descriptor], stop: threading.Event) -> None:
        # a layer may be named twice, and is fetched once
        distinct = {part.digest: part for part in parts}.values()
        with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
            try:
                fetching = [pool.submit(self._fetch, repository, part, stop) for part in distinct]
                for fetched in as_completed(fetching):
                    fetched.result()
            except BaseException:
                stop.set()  # without one of them, or when nobody waits any more, the others are of no use
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _keep(self, manifest: Manifest, parts: Sequence[Descriptor]) -> Descriptor:
        """The manifest in the content store: as it came, and a Docker one in OCI's terms as well.

        Whoever shares the layout knows no others, and would collect all that such a manifest refers to. The one it came
        as has a name of its own there: it is what a pinned digest is the digest of.
        """
        came = self._layout.add_bytes(manifest.raw, manifest.media_type)
        if manifest.media_type != DOCKER_MANIFEST:
            return came
        self._layout.name(f"docker-{came.digest.hex[:12]}", came)
        config, *layers = (replace(part, media_type=_AS_OCI.get(part.media_type, part.media_type)) for part in parts)
        raw = image_manifest(config, layers, {CONVERTED: manifest.digest})
        return self._layout.add_bytes(raw, IMAGE_MANIFEST)

    def _fetch(self, repository: Repository, part: Descriptor, stop: threading.Event) -> None:
        def check() -> None:
            if stop.is_set():
                raise CancelledError
            patience(self._site.timeout).check()

        def progress(subject: str, done: int, total: int | None) -> None:
            check()
            self._site.progress(subject, done, total)

        lock = self._site.paths.lock(f"blob-{part.digest.hex}")
        with locked(lock, timeout=Patience(patience(self._site.timeout).seconds, check)):
            if self._layout.intact(part.digest, part.size):
                return
            with self._layout.new_file() as out:
                subject = f"{repository.name} {part.digest.hex[:12]}"
                repository.blob(part.digest, part.size, out, subject=subject, progress=progress)
                self._layout.add(out, part.media_type)
