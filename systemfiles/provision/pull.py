"""Images from OCI registries into the content store: every blob as the bytes it is there."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from systemfiles.content.layout import IMAGE_CONFIG, Descriptor
from systemfiles.content.layout import manifest as image_manifest
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import SourceRefused, StoreError
from systemfiles.foundation.lock import locked
from systemfiles.provision.site import MIRRORS, Site
from systemfiles.sources.http import candidates, try_each
from systemfiles.sources.manifests import DOCKER_MANIFEST, IMAGE_MANIFEST, INDEXES, Manifest, choose
from systemfiles.sources.oci import Reference, Repository

PARALLEL = 4
DEEPEST_INDEX = 4
LARGEST_LAYER = 16 << 30
CONVERTED = "io.systemfiles.converted-from"
_AS_OCI = {
    "application/vnd.docker.container.image.v1+json": IMAGE_CONFIG,
    "application/vnd.docker.image.rootfs.diff.tar": "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
}


class Puller:
    """Pulls images; the same blob is fetched once, however many ask at the same time."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._layout = site.store.layout

    def pull(self, reference: str, arch: Arch) -> Descriptor:
        """The manifest of image `reference` for `arch`, with all it refers to in the content store.

        Mirrors are tried first, the registry last. Raises SourceUnavailable, IntegrityError, UsageError, StoreError.
        """
        pulled: list[Descriptor] = []

        def get(place: str) -> None:
            pulled.append(self._pull_from(Reference.parse(place), arch))

        try_each(candidates(reference, self._site.catalog.mirrors), get, subject=f"image {reference}", hint=MIRRORS)
        return pulled[-1]

    def _pull_from(self, reference: Reference, arch: Arch) -> Descriptor:
        repository = Repository(reference.registry, reference.repository)
        manifest = self._for_arch(repository, repository.manifest(reference.target), arch)
        try:
            parts = [Descriptor.from_json(part) for part in (manifest.value["config"], *manifest.value["layers"])]
        except (StoreError, KeyError, TypeError) as error:
            raise SourceRefused(str(reference), f"its manifest is broken ({error})") from error
        self._layout.create()
        # a layer may be named twice, and is fetched once
        distinct = {part.digest: part for part in parts}.values()
        with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
            try:
                for fetched in [pool.submit(self._fetch, repository, part) for part in distinct]:
                    fetched.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # without one of them the others are of no use
                raise
        return self._keep(manifest, parts)

    def _keep(self, manifest: Manifest, parts: Sequence[Descriptor]) -> Descriptor:
        """The manifest in the content store: as it came, or a Docker one in OCI's terms.

        Whoever shares the layout knows no others, and would collect all that such a manifest refers to.
        """
        if manifest.media_type != DOCKER_MANIFEST:
            return self._layout.add_bytes(manifest.raw, manifest.media_type)
        config, *layers = (replace(part, media_type=_AS_OCI.get(part.media_type, part.media_type)) for part in parts)
        raw = image_manifest(config, layers, {CONVERTED: manifest.digest})
        return self._layout.add_bytes(raw, IMAGE_MANIFEST)

    def _for_arch(self, repository: Repository, found: Manifest, arch: Arch) -> Manifest:
        """`found` itself, or what it has for `arch` when it is an index, perhaps of indexes."""
        for _ in range(DEEPEST_INDEX):
            if found.media_type not in INDEXES:
                return found
            entry = choose(found, arch, subject=repository.name)[0]
            try:
                found = repository.manifest(Descriptor.from_json(entry).digest)
            except StoreError as error:
                raise SourceRefused(repository.name, f"its index is broken ({error})") from error
        raise SourceRefused(repository.name, f"its indexes are nested more than {DEEPEST_INDEX} deep")

    def _fetch(self, repository: Repository, part: Descriptor) -> None:
        if part.size > LARGEST_LAYER:
            raise SourceRefused(repository.name, f"its layer {part.digest} is {part.size} bytes long")
        with locked(self._site.paths.lock(f"blob-{part.digest.hex}"), timeout=self._site.timeout):
            if self._layout.intact(part.digest, part.size):
                return
            with self._layout.new_file() as out:
                subject = f"{repository.name} {part.digest.hex[:12]}"
                repository.blob(part.digest, part.size, out, subject=subject, progress=self._site.progress)
                self._layout.add(out, part.media_type)
