"""Building a release: every version twice, in fresh data directories and different surroundings, and compared.

The two builds differ in umask, time zone, locale, working directory, home, hash seed, the place and the length of the
data directory's name, and in when they run. Nothing is taken from a registry or from an earlier build. What rolling
names stand for is decided once, before both.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from systemfiles.content.artifacts import Artifact, Artifacts
from systemfiles.content.descriptors import canonical
from systemfiles.content.packaging import public_urls, without_host_facts
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import Catalog
from systemfiles.foundation.digest import hash_file
from systemfiles.foundation.errors import IntegrityError, SystemFilesError, ToolFailed, UsageError
from systemfiles.foundation.files import STAGED, make_dirs, remove_abandoned, replace_directory, scratch_dir, write_file
from systemfiles.foundation.lockfile import VersionsLock, read_lock
from systemfiles.foundation.paths import INITRD, KERNEL, KINDS, Paths
from systemfiles.foundation.progress import ProgressBars
from systemfiles.foundation.units import human_size
from systemfiles.provision.provisioner import Provisioner
from systemfiles.release.dist import LOCK, SUMS, write_artifact, write_sums
from systemfiles.release.documents import documents, require_origin

Target = tuple[str, str | None, Arch]
"""A kernel, the initrd to go with it if any, and for which architecture."""

_CHILD = "from systemfiles.release.building import build_in_child; build_in_child()"
_SURROUNDINGS = (
    ("a", 0o022, {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "0"}),
    ("second-build", 0o077, {"TZ": "Pacific/Chatham", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "4242"}),
)
_OF_DOWNLOADS = re.compile(
    r"PATH|APT_CONFIG|(https?|no|all)_proxy|SYSTEMFILES_CREDENTIALS|DOCKER_CONFIG|NETRC|SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE",
    re.IGNORECASE,
)
"""What of the environment says how to reach an origin, and is the same for both builds."""


class Origin(NamedTuple):
    """What a provenance says: who builds (a URI), of which commit, and when (seconds since 1970, UTC)."""

    builder: str
    source: str | None
    when: int


def release(
    targets: Iterable[Target], catalog: Catalog, lock: Path, dist: Path, origin: Origin
) -> tuple[Artifact, ...]:
    """Builds `targets` twice and leaves them at `dist`, in place of what was there; returns what is in it.

    `lock` is a versions.lock that says what rolling names stand for, if it exists. Raises IntegrityError when the two
    builds differ, and whatever building raises; then `dist` is as it was.
    """
    require_origin(**origin._asdict())
    if dist.exists() and not (dist / SUMS).exists() and any(dist.iterdir()):
        msg = f"{dist} is there and is no release"
        raise UsageError(msg, hint="move it elsewhere: a release takes its place")
    remove_abandoned(dist.parent, STAGED)
    with scratch_dir(dist.parent, prefix=STAGED) as work:
        wanted = [*targets]
        places = [Paths(work / name) for name, _, _ in _SURROUNDINGS]
        _settle(wanted, catalog, lock, places)
        for paths, (_, umask, environ) in zip(places, _SURROUNDINGS, strict=True):
            _build(wanted, catalog, paths, umask, environ)
        made = [*_compared(*places)]
        whole = work / "dist"
        for artifact in made:
            write_artifact(whole, artifact, documents(artifact, **origin._asdict()))
        if places[0].versions_lock.exists():
            lock_of_release = canonical(_reduced(read_lock(places[0].versions_lock), made))
            write_file(whole / LOCK, lock_of_release, scratch=work, mode=0o644)
        write_sums(whole)
        replace_directory(dist, whole)
    return tuple(made)


def _settle(targets: list[Target], catalog: Catalog, lock: Path, places: list[Paths]) -> None:
    """Writes the same versions.lock, which knows all that rolls, for each build."""
    first, *others = places
    make_dirs(first.system)
    if lock.exists():
        read_lock(lock)  # refuses one that is damaged, by its own name
        shutil.copyfile(lock, first.versions_lock)
    rolling = Provisioner(first, catalog, Artifacts(first)).rolling
    for kernel, initrd, arch in targets:
        rolling.resolve([kernel], [initrd] if initrd else [], arch)
    for place in others:
        make_dirs(place.system)
        if first.versions_lock.exists():
            shutil.copyfile(first.versions_lock, place.versions_lock)


def _build(targets: list[Target], catalog: Catalog, paths: Paths, umask: int, environ: Mapping[str, str]) -> None:
    order = {
        "data_dir": str(paths.data_dir),
        "catalog": catalog.model_copy(update={"registries": (), "build": True}).model_dump_json(by_alias=True),
        "targets": [(kernel, initrd, arch.value) for kernel, initrd, arch in targets],
        "umask": umask,
    }
    inherited = {name: value for name, value in os.environ.items() if _OF_DOWNLOADS.fullmatch(name)}
    inherited = {"DOCKER_CONFIG": str(Path.home() / ".docker"), "NETRC": str(Path.home() / ".netrc"), **inherited}
    home = paths.data_dir / "home"
    make_dirs(home)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(order),
        stdout=subprocess.PIPE,
        text=True,
        cwd=home,
        env={**inherited, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), **environ},
        check=False,
    )
    if done.returncode:
        command = f"{sys.executable} -c {_CHILD!r}"
        raise ToolFailed(command, status=done.returncode, output=done.stdout)


def build_in_child() -> None:
    """What the process of one build does: reads its order from stdin, and says on stdout why it failed."""
    order: dict[str, Any] = json.load(sys.stdin)
    os.umask(order["umask"])
    bars = ProgressBars()
    paths = Paths(Path(order["data_dir"]))
    catalog = Catalog.model_validate_json(order["catalog"])
    provisioner = Provisioner(paths, catalog, Artifacts(paths), progress=bars)
    try:
        for kernel, initrd, arch in order["targets"]:
            provisioner.provide(kernel, [initrd] if initrd else [], Arch(arch))
    except SystemFilesError as error:
        sys.stdout.write(str(error))
        raise SystemExit(1) from None
    finally:
        bars.close()


def _compared(first: Paths, second: Paths) -> Iterator[Artifact]:
    """What both builds made, the same. Raises IntegrityError."""
    ones, others = Artifacts(first), Artifacts(second)
    for kind in KINDS:
        versions = [*ones.versions(kind)]
        if versions != (there := [*others.versions(kind)]):
            _differ(f"the {kind} versions", versions, there)
        for version, arch in versions:
            one, other = (artifacts.load(kind, version, arch) for artifacts in (ones, others))
            _require_equal(one, other)
            yield one


def _require_equal(one: Artifact, other: Artifact) -> None:
    subject = f"{one.kind} {one.version} ({one.arch})"
    for name in one.files.keys() | other.files.keys():
        pair = (one.directory / name, other.directory / name)
        with contextlib.suppress(FileNotFoundError):
            if filecmp.cmp(*pair, shallow=False):
                continue
        _differ(f"{name} of {subject}", *(hash_file(path)[0] if path.exists() else "none" for path in pair))
    records = [without_host_facts(each.record) for each in (one, other)]
    if records[0] != records[1]:
        _differ(f"the record of {subject}", *records)


def _reduced(lock: VersionsLock, made: Iterable[Artifact]) -> dict[str, Any]:
    """What versions.lock says of what is released, and nothing that else was made here."""
    versions = {(artifact.kind, artifact.version) for artifact in made}
    kernels = {version: pins for version, pins in lock.kernel.items() if (KERNEL, version) in versions}
    current = {
        name: {kernel: initrds for kernel, initrds in known.items() if (KERNEL, kernel) in versions}
        for name, known in lock.current.items()
    }
    parts: dict[str, Any] = {
        "kernel": kernels,
        "initrd": {version: pins for version, pins in lock.initrd.items() if (INITRD, version) in versions},
        "rolling": {
            name: arches for name, arches in lock.rolling.items() if any(each in kernels for each in arches.values())
        },
        "current": {name: known for name, known in current.items() if known},
        "busybox": lock.busybox,
    }
    reduced = VersionsLock(**parts).model_dump(mode="json", by_alias=True, exclude_none=True)
    return dict(public_urls(reduced))


def _differ(subject: str, one: object, other: object) -> NoReturn:
    expected = f"what the first build made: {one}"
    got = f"from the second: {other}"
    raise IntegrityError(subject, expected=expected, got=got, consequence="nothing was released")


# ── whose release it is ──────────────────────────────────────────────────────────────────────────────────────────


def origin_of(checkout: Path | None, environ: Mapping[str, str] = os.environ) -> Origin:
    """What a provenance says of a build here: of $SYSTEMFILES_BUILDER, $SOURCE_DATE_EPOCH, and the commit that is out.

    Raises UsageError when there is neither a commit nor $SOURCE_DATE_EPOCH (reproducible-builds.org/specs), by which
    two releases of one commit are the same bytes.
    """
    git = ["git", "-C", str(checkout)]
    own = checkout is not None and _output(*git, "rev-parse", "--show-toplevel") == str(checkout.resolve())
    commit = _output(*git, "rev-parse", "--verify", "HEAD") if own else ""
    told = environ.get("SOURCE_DATE_EPOCH") or (commit and _output(*git, "log", "-1", "--format=%ct"))
    if not told or not told.isdecimal():
        msg = "it cannot be told when this release is made"
        raise UsageError(msg, hint="release from a git checkout, or set SOURCE_DATE_EPOCH to seconds since 1970 (UTC)")
    changed = not commit or _output(*git, "status", "--porcelain") != ""
    remote = _output(*git, "remote", "get-url", "origin") or ""
    remote = remote if "://" in remote else "file://local"
    source = None if changed else f"git+{remote}@{commit}"
    return Origin(environ.get("SYSTEMFILES_BUILDER") or "urn:systemfiles:builder:local", source, int(told))


def _output(*command: str) -> str | None:
    """What a command says; None when it fails or is not installed."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None
    return None


def told(dist: Path, made: Iterable[Artifact]) -> str:
    """What a release is, for the line of its task."""
    artifacts = [*made]
    size = sum(facts.size for artifact in artifacts for facts in artifact.files.values())
    lines = [f"{dist}: {len(artifacts)} artifacts, {human_size(size)}, built twice and the same"]
    return "\n   ".join([*lines, *(f"{each.kind} {each.version} ({each.arch})" for each in artifacts)])
