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
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from systemfiles.content.artifacts import Artifact, Artifacts
from systemfiles.content.packaging import HOST_FACTS
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import Catalog
from systemfiles.foundation.digest import hash_file
from systemfiles.foundation.errors import IntegrityError, SystemFilesError, ToolFailed, UsageError
from systemfiles.foundation.files import STAGED, make_dirs, remove_abandoned, replace_directory, scratch_dir, write_file
from systemfiles.foundation.lockfile import read_lock
from systemfiles.foundation.paths import KINDS, Paths
from systemfiles.foundation.progress import ProgressBars
from systemfiles.foundation.units import human_size
from systemfiles.provision.provisioner import Provisioner
from systemfiles.release.dist import LOCK, write_artifact, write_sums
from systemfiles.release.documents import documents

Target = tuple[str, str | None, Arch]
"""A kernel, the initrd to go with it if any, and for which architecture."""

_CHILD = "from systemfiles.release.building import build_in_child; build_in_child()"
_SURROUNDINGS = (
    ("a", 0o022, {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "0"}),
    ("second-build", 0o077, {"TZ": "Pacific/Chatham", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "4242"}),
)
_PASSED_ON = ("PATH", "SYSTEMFILES_MIRRORS", "SYSTEMFILES_CREDENTIALS", "http_proxy", "https_proxy", "no_proxy")


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
            write_file(whole / LOCK, places[0].versions_lock.read_bytes(), scratch=work, mode=0o644)
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
    inherited = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
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
    records = [{key: each.record[key] for key in each.record if key not in HOST_FACTS} for each in (one, other)]
    if records[0] != records[1]:
        _differ(f"the record of {subject}", *records)


def _differ(subject: str, one: object, other: object) -> NoReturn:
    expected = f"what the first build made: {one}"
    got = f"from the second: {other}"
    raise IntegrityError(subject, expected=expected, got=got, consequence="nothing was released")


# ── whose release it is ──────────────────────────────────────────────────────────────────────────────────────────


def origin_of(checkout: Path, environ: Mapping[str, str] = os.environ) -> Origin:
    """What a provenance says of a build here: of $SYSTEMFILES_BUILDER, $SOURCE_DATE_EPOCH, and the commit that is out.

    Raises UsageError when there is neither a commit nor $SOURCE_DATE_EPOCH (reproducible-builds.org/specs), by which
    two releases of one commit are the same bytes.
    """
    git = ["git", "-C", str(checkout)]
    commit = _output(*git, "rev-parse", "--verify", "HEAD")
    told = environ.get("SOURCE_DATE_EPOCH") or (commit and _output(*git, "log", "-1", "--format=%ct"))
    if not told or not told.isdecimal():
        msg = "it cannot be told when this release is made"
        raise UsageError(msg, hint="release from a git checkout, or set SOURCE_DATE_EPOCH to seconds since 1970 (UTC)")
    changed = not commit or _output(*git, "status", "--porcelain", "--untracked-files=no") != ""
    remote = _output(*git, "remote", "get-url", "origin") or f"file://{checkout.name}"
    remote = remote if "://" in remote else "file://local"
    source = None if changed else f"git+{remote}@{commit}"
    return Origin(environ.get("SYSTEMFILES_BUILDER") or "urn:systemfiles:builder:local", source, int(told))


def _output(*command: str) -> str:
    """What a command says; nothing when it fails or is not installed."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def told(dist: Path, made: Iterable[Artifact]) -> str:
    """What a release is, for the line of its task."""
    artifacts = [*made]
    size = sum(facts.size for artifact in artifacts for facts in artifact.files.values())
    lines = [f"{dist}: {len(artifacts)} artifacts, {human_size(size)}, built twice and the same"]
    return "\n   ".join([*lines, *(f"{each.kind} {each.version} ({each.arch})" for each in artifacts)])
