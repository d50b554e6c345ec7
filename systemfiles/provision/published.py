"""Versions that were built elsewhere: `<registry>/<kind>:<version>`, from the registries that the catalog names.

What may be taken for one is decided in gate.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from systemfiles.content.artifacts import Artifact, boot_file
from systemfiles.content.descriptors import Descriptor
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.errors import (
    IntegrityError,
    InvalidKernel,
    SourceError,
    SourceUnavailable,
    StoreError,
    SystemFilesError,
    VersionConflict,
    blaming,
)
from systemfiles.foundation.kernelimage import check_kernel
from systemfiles.foundation.paths import KERNEL
from systemfiles.foundation.units import human_size
from systemfiles.provision.gate import REFUSED, VersionGate, Wanted, as_promised, require_wanted
from systemfiles.provision.images import Images
from systemfiles.provision.site import Made, Site
from systemfiles.recipes.initrd import check_content

log = logging.getLogger(__name__)

_NOT_BUILT = "publish it there, or let it be built here: systemfiles provision, without build = false in the catalog"
_NO_REGISTRY = 'name one: $SYSTEMFILES_REGISTRY, or registries = ["…"] in a catalog'


class Published:
    """Takes published versions in. Safe to share among threads."""

    def __init__(self, site: Site, images: Images) -> None:
        self._site = site
        self._images = images

    def take(
        self, kind: str, version: str, arch: Arch, inputs: Mapping[str, Any] | None, *, content: str = ""
    ) -> Made | None:
        """This version from the first registry that has it; None when none has, and it may be built here.

        `inputs` are what it must have been made from, `content` is how the sha256 of its content begins, as far as that
        is known. Call it under the artifact's lock. Raises SignatureRefused and other IntegrityErrors, InvalidKernel,
        StoreError; SourceUnavailable when it may not be built here.
        """
        wanted = Wanted(kind, version, arch, inputs, content)
        tried: list[tuple[str, str]] = []
        wrong: SystemFilesError | None = None
        for registry in self._site.catalog.registries:
            try:
                artifact = self._take(f"{registry}/{kind}:{version}", wanted)
            except (IntegrityError, InvalidKernel) as error:
                wrong = wrong or error
                tried.append((registry, error.summary))
            except SourceUnavailable as error:
                wrong = wrong or error.wrong
                tried += error.tried
            except SourceError as error:
                tried.append((registry, error.summary))
            else:
                if tried:
                    log.warning("%s came from %s; before that, %s", wanted, registry, _told(tried))
                size = sum(facts.size for facts in artifact.files.values())
                return Made(artifact, f"{human_size(size)} fetched from {registry}")
        if wrong is not None or wanted.refused:
            raise wrong or wanted.refused[0]
        if self._site.catalog.build is False:
            hint = _NOT_BUILT if tried else _NO_REGISTRY
            raise SourceUnavailable(str(wanted), tried=tried or [("registries", "none is configured")], hint=hint)
        if tried:
            log.warning("no registry has %s: %s", wanted, _told(tried))
        return None

    def recover(
        self, reference: str, kind: str, version: str, arch: Arch, *, promised: Mapping[str, Any] | None
    ) -> None:
        """Takes in what a registry has as `reference`, if it is this version with the content that was promised.

        `promised` is its record, where the whole of that is known: then that counts and not what the registry says, and
        no signature is needed. Raises SourceError, IntegrityError, InvalidKernel, StoreError.
        """
        with self._site.locked(kind, version, arch):
            if not self._site.store.kept(kind, version, arch, None):  # else somebody else was here first
                self._take(reference, Wanted(kind, version, arch, promised=promised))

    def _take(self, reference: str, wanted: Wanted) -> Artifact:
        """The version from one registry. Raises as `recover`, and SignatureRefused."""
        pulled = self._images.fetch(reference, wanted.arch, gate=VersionGate(wanted, self._site.catalog.trust))
        try:
            return self._put(reference, pulled, wanted)
        except VersionConflict as error:  # with what is on record here
            ((before, now),) = error.changes.values()
            raise IntegrityError(reference, expected=before, got=now, consequence=REFUSED) from error
        except RecursionError as error:
            got = "one that is nested too deeply"
            raise IntegrityError(reference, expected="a record", got=got, consequence=REFUSED) from error

    def _put(self, reference: str, pulled: Descriptor, wanted: Wanted) -> Artifact:
        store = self._site.store
        try:
            record, files = store.describe(pulled)
        except StoreError as error:
            expected = f"the manifest of {wanted}"
            raise IntegrityError(reference, expected=expected, got=error.summary, consequence=REFUSED) from error
        require_wanted(reference, record, wanted)
        boot = store.layout.blob(files[boot_file(wanted.kind, wanted.arch)].digest)
        if wanted.kind == KERNEL:
            with blaming(reference):
                check_kernel(boot, wanted.arch)
        else:
            check_content(boot, record["content_sha256"], subject=reference)
        return store.put(as_promised(record, wanted.promised), files)


def _told(tried: list[tuple[str, str]]) -> str:
    return "; ".join(f"{where}: {why}" for where, why in tried)
