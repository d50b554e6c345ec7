"""Reading everything that is on disk, and comparing it with what is on record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from systemfiles.content.artifacts import Artifact, Artifacts
from systemfiles.content.store import Store
from systemfiles.foundation.catalog import Catalog
from systemfiles.foundation.errors import IntegrityError, SystemFilesError
from systemfiles.foundation.lockfile import read_lock
from systemfiles.foundation.paths import KINDS, Paths
from systemfiles.provision.provisioner import Provisioner
from systemfiles.provision.repair import repair


class Verification(NamedTuple):
    """How many artifacts were read in full, all that is wrong with them or with the content store, and what was mended.

    After a repair that could not mend everything, `problems` says why as well.
    """

    artifacts: int
    problems: tuple[SystemFilesError, ...]
    repaired: tuple[SystemFilesError, ...] = ()


def verify_and_repair(paths: Paths, artifacts: Artifacts, provisioner: Provisioner, catalog: Catalog) -> Verification:
    """Reads everything, and makes again what is damaged or missing. Raises StoreError, CatalogError."""
    found = verify(paths, artifacts)
    provisioner.sweep()
    if not found.problems:
        if not provisioner.manifest_is_current():
            provisioner.write_manifest()
        return found
    failures: list[SystemFilesError] = []
    try:
        failures += repair(provisioner, catalog)
    except SystemFilesError as error:  # such as a versions.lock that cannot be read
        failures.append(error)
    left = verify(paths, artifacts)
    still = {str(problem) for problem in left.problems}
    repaired = tuple(problem for problem in found.problems if str(problem) not in still)
    return Verification(left.artifacts, (*left.problems, *(failures if left.problems else ())), repaired)


def verify(paths: Paths, artifacts: Artifacts) -> Verification:
    """Reads every byte of every artifact and of the content store. Raises StoreError where nothing ever was."""
    paths.require_used()
    every: list[Artifact] = []
    problems: list[SystemFilesError] = []
    count = 0
    for kind in KINDS:
        for version, arch in artifacts.versions(kind):
            count += 1
            try:
                artifact = artifacts.load(kind, version, arch)
                every.append(artifact)
                problems += artifacts.verify(artifact)
            except SystemFilesError as error:
                problems.append(error)
    try:
        problems += Store(paths, artifacts).verify()
    except SystemFilesError as error:  # such as an index that cannot be read
        problems.append(error)
    problems += _unreadable_lists(paths, every)
    return Verification(count, tuple(problems))


def _unreadable_lists(paths: Paths, artifacts: list[Artifact]) -> Iterator[SystemFilesError]:
    """What is wrong with versions.lock and SHA256SUMS; the latter need not know what `ensure` just made."""
    try:
        read_lock(paths.versions_lock)
    except SystemFilesError as error:
        yield error
    known = {line for artifact in artifacts for line in artifact.sums}
    try:
        lines = paths.sha256sums.read_text(errors="replace").splitlines()
    except OSError:
        return  # it is written by the next run
    for line in lines:
        if line not in known:
            yield IntegrityError(
                paths.sha256sums,
                expected="a line for each file of each artifact",
                got=repr(line[:100]),
                consequence="sha256sum -c would refuse it",
            )
            return
