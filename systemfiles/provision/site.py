"""What the makers of artifacts share: one data directory, one catalog, and how to wait and to report."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from systemfiles.content.artifacts import Artifact
from systemfiles.content.descriptors import Descriptor
from systemfiles.content.store import Store
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import Catalog
from systemfiles.foundation.errors import NotProvisioned
from systemfiles.foundation.files import NEW, STAGED, WORK, remove_abandoned
from systemfiles.foundation.lock import Timeout, locked
from systemfiles.foundation.paths import KINDS, Paths, check_version
from systemfiles.foundation.progress import Progress
from systemfiles.provision.rolling import Rolling

log = logging.getLogger(__name__)

RECOVERED = "written again from the content store"
MIRRORS = (
    "use a mirror ([mirrors] in versions.toml or $SYSTEMFILES_MIRRORS), or another profile, such as profile=debian"
)
_TRIES = 20
FORGOTTEN = "an archive keeps only its newest packages; doit update moves to what it has now"

T = TypeVar("T")


class Made(NamedTuple):
    """An artifact, and what it took: "" when it was kept as it was."""

    artifact: Artifact
    note: str


def despite_collections(provide: Callable[[], T]) -> T:
    """What `provide` gives, asked again when a collection has taken what it had provided before it came to its end.

    Raises NotProvisioned when collections do so again and again.
    """
    for _ in range(_TRIES):
        try:
            return provide()
        except NotProvisioned as error:
            if error.kind not in KINDS:
                raise  # an image, which somebody else has to bring
            taken = error
            log.info("a collection took %s %s: it is provided once more", error.kind, error.version)
    taken.hint = f"collections took it {_TRIES} times as soon as it was there: let them have a grace period"
    raise taken


@dataclass(frozen=True, slots=True)
class Site:
    """Where artifacts are made, and from what catalog. `timeout` is for each lock."""

    paths: Paths
    catalog: Catalog
    store: Store
    rolling: Rolling
    progress: Progress
    timeout: Timeout

    @contextlib.contextmanager
    def locked(self, kind: str, version: str, arch: Arch) -> Iterator[None]:
        """The lock under which one artifact is made, of blobs that nobody collects meanwhile.

        Raises InvalidName, LockTimeout.
        """
        self.sweep()
        lock = self.paths.lock(f"{kind}-{check_version(kind, version)}-{arch}")
        with locked(lock, timeout=self.timeout), self.store.layout.ingesting():
            yield

    def sweep(self) -> None:
        """Removes what killed processes left in the data directory."""
        data_dir, system = self.paths.data_dir, self.paths.system
        remove_abandoned(self.paths.tmp, NEW, WORK)
        with contextlib.suppress(OSError):  # what cannot be listed cannot be swept
            for directory in (data_dir.parent, data_dir, system, *system.glob("*"), *system.glob("*/*")):
                remove_abandoned(directory, STAGED)


def new_record(
    kind: str, version: str, arch: Arch, files: Mapping[str, Descriptor], inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """What every artifact's record begins with."""
    return {
        "schema": 1,
        "kind": kind,
        "version": version,
        "arch": arch.value,
        "files": {name: {"sha256": file.digest.hex, "size": file.size} for name, file in files.items()},
        "inputs": dict(inputs),
    }
