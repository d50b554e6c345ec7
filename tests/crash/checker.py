"""Reads a data directory with the standard library alone and says what must not be so, however it came about.

It knows the formats and none of the code that writes them: the OCI image layout (image-spec, image-layout.md),
artifact.json, versions.lock, SHA256SUMS (sha256sum(1)). Who holds what is read by ledger.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from tests.crash import ledger
from tests.crash.ledger import Ledger

KINDS = ("kernel", "initrd")
BOOT_FILES = {"kernel": {"x86_64": "vmlinux", "aarch64": "Image"}, "initrd": {"x86_64": "initrd", "aarch64": "initrd"}}
BESIDE_FILES = {"artifact.json", "stamp.json"}
MANAGED = "io.systemfiles.managed"
REF_NAME = "org.opencontainers.image.ref.name"
JOURNAL = "registry.sqlite-journal"
LISTED = " in SHA256SUMS"
"""Behind the directory of an artifact: its lines there."""
TEMPORARY = re.compile(r"\.systemfiles-.*|new-.*|work-.*|.*\.(?:tmp|part|partial)")
_LOST_FILE = re.compile(r"^.+(?=: FAILED open or read$)", re.MULTILINE)
_MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json")


class Problem(NamedTuple):
    """What is wrong, and with what: a path below the data directory."""

    subject: str
    what: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.what}"


@dataclass(frozen=True)
class State:
    """What a data directory holds.

    `artifacts` has the sha256 of every file in a directory with a record; `answers` is all that callers and other
    tools are told, without times; `foreign` are the entries of others in index.json, as JSON text; `blobs` are
    digests in hex, and `needs` has those that each name in index.json, artifact or pin relies on, by "name NAME", its
    path, or "pin NAME". `begun` are directories of artifacts without a record, `unlisted` files that SHA256SUMS does
    not know, `left` is what has a temporary name.
    """

    artifacts: dict[str, str]
    answers: dict[str, Any]
    foreign: tuple[str, ...]
    blobs: frozenset[str]
    needs: dict[str, frozenset[str]]
    begun: frozenset[str]
    lock: dict[str, Any]
    ledger: Ledger
    problems: tuple[Problem, ...]
    unlisted: frozenset[str]
    left: tuple[str, ...]

    @property
    def broken(self) -> frozenset[str]:
        return frozenset(problem.subject for problem in self.problems)


@dataclass(frozen=True)
class Goes:
    """What may go: paths of artifacts and of assets' files, "name NAME", "lease HOLDER", "pin NAME", as patterns of
    fnmatch(3); and with `blobs` all blobs that only these need, or nothing."""

    what: frozenset[str] = frozenset()
    blobs: bool = False

    def may(self, what: str) -> bool:
        return any(fnmatchcase(what, pattern) for pattern in self.what)

    def __or__(self, other: Goes) -> Goes:
        return Goes(self.what | other.what, self.blobs or other.blobs)


NOTHING = Goes()


def read(data_dir: Path) -> State:
    """All that is in the directory, and what is wrong with it in itself."""
    reader = _Reader(data_dir)
    problems = [*reader.problems()]
    holds, told = ledger.read(data_dir)
    problems += [Problem(*each) for each in told]
    needs = reader.needs | {f"pin {name}": digests for name, digests in holds.pinned.items()}
    return State(
        artifacts=reader.artifacts,
        answers=reader.answers | holds.answers,
        foreign=tuple(reader.foreign),
        blobs=frozenset(reader.blobs),
        needs=needs,
        begun=frozenset(reader.begun),
        lock=reader.lock,
        ledger=holds,
        problems=tuple(problems),
        unlisted=frozenset({path.removeprefix("system/") for path in reader.artifacts} - {*reader.listed}),
        left=tuple(reader.left),
    )


def losses(before: State, after: State, goes: Goes = NOTHING) -> Iterator[Problem]:
    """What was whole before and is not there any more, or is something else, or was of others and changed."""
    for path, sha256 in before.artifacts.items():
        found = after.artifacts.get(path)
        if path not in before.broken and found != sha256 and not (goes.may(path.rpartition("/")[0]) and found is None):
            yield Problem(path, f"was there with sha256 {sha256}, now {found}")
    for path in sorted(after.begun & before.needs.keys()):
        yield Problem(path, "was there as a whole, and a part of it is left")
    needed = {digest for what, digests in before.needs.items() if not goes.may(what) for digest in digests}
    for digest in sorted((before.blobs - after.blobs) & (needed if goes.blobs else before.blobs)):
        if (name := f"system/oci-cache/blobs/sha256/{digest}") not in before.broken:
            yield Problem(name, "was there and is lost")
    for what in before.needs.keys() - after.needs.keys():
        if what.startswith("name ") and not goes.may(what):
            yield Problem("system/oci-cache/index.json", f"{what} is lost")
    for told in ledger.losses(before.ledger, after.ledger, goes.may):
        yield Problem(*told)
    if before.foreign and before.foreign != after.foreign:
        yield Problem("system/oci-cache/index.json", f"entries of others were {before.foreign}, are {after.foreign}")
    for table in ("kernel", "initrd", "busybox"):
        for version, arches in before.lock.get(table, {}).items():
            for arch, pin in arches.items():
                found = after.lock.get(table, {}).get(version, {}).get(arch)
                more = isinstance(pin, list) and isinstance(found, list) and all(one in found for one in pin)
                moved = table == "busybox" and found is not None  # its key is a name that may move
                if found != pin and not more and not moved:
                    yield Problem("system/versions.lock", f"{table} {version} ({arch}) was {pin}, is {found}")


def temporary(data_dir: Path) -> list[Path]:
    """All that has a temporary name in the directory, and beside it."""
    found = {path for path in data_dir.parent.rglob("*") if TEMPORARY.fullmatch(path.name) or path.name == JOURNAL}
    in_tmp = {*(data_dir / "tmp").glob("*")}
    below = {path for path in found if (data_dir / "tmp") in path.parents}
    return sorted((found - below) | in_tmp)


class _Reader:
    def __init__(self, data_dir: Path) -> None:
        self._root = data_dir
        self._layout = data_dir / "system" / "oci-cache"
        self.artifacts: dict[str, str] = {}
        self.answers: dict[str, Any] = {}
        self.foreign: list[str] = []
        self.blobs: set[str] = set()
        self.needs: dict[str, frozenset[str]] = {}
        self.begun: set[str] = set()
        self.lock: dict[str, Any] = {}
        self.listed: list[str] = []
        self.left: list[str] = []

    def problems(self) -> Iterator[Problem]:
        yield from self._names()
        for kind in KINDS:
            for directory in sorted((self._root / "system" / kind).glob("*/*")):
                yield from self._artifact(kind, directory)
        yield from self._blobs()
        yield from self._index()
        yield from self._lock()
        yield from self._sums()

    def _names(self) -> Iterator[Problem]:
        """What is temporary is in tmp/, but for a directory that is being made."""
        for path in temporary(self._root):
            self.left.append(self._name(path))
            made = path.name.startswith(".systemfiles-new-") and path.is_dir() and not any(path.iterdir())
            if path.parent != self._root / "tmp" and not made and path.name != JOURNAL:  # which SQLite takes back
                yield Problem(self._name(path), "is temporary and outside of tmp/")

    def _artifact(self, kind: str, directory: Path) -> Iterator[Problem]:
        """A directory with a record has every file of it, whole and read-only; one without hands out nothing."""
        path = directory / "artifact.json"
        if not path.exists():
            self.begun |= {self._name(directory)} if any(directory.iterdir()) else set()
            return
        try:
            record = json.loads(path.read_bytes())
            files = {name: (facts["sha256"], facts["size"]) for name, facts in record["files"].items()}
            told = (record["kind"], record["version"], record["arch"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield Problem(self._name(path), f"is no record ({error!r})")
            return
        if told != (kind, directory.parent.name, directory.name):
            yield Problem(self._name(path), f"is the record of {told}")
        if BOOT_FILES[kind].get(directory.name) not in files:
            yield Problem(self._name(path), "names no file to boot")
        for name in {found.name for found in directory.iterdir()} - {*files, *BESIDE_FILES}:
            yield Problem(self._name(directory / name), "is beside an artifact and on no record")
        for name, (sha256, size) in files.items():
            yield from self._file(directory / name, sha256, size)
        self.needs[self._name(directory)] = frozenset(sha256 for sha256, _ in files.values())
        self.answers[self._name(path)] = {key: value for key, value in record.items() if key != "created_at"}

    def _file(self, path: Path, sha256: str, size: int) -> Iterator[Problem]:
        try:
            found, mode = path.read_bytes(), path.lstat().st_mode
        except OSError as error:
            yield Problem(self._name(path), f"is on record and cannot be read ({error.strerror})")
            return
        self.artifacts[self._name(path)] = got = hashlib.sha256(found).hexdigest()
        if (got, len(found)) != (sha256, size):
            yield Problem(self._name(path), f"has sha256 {got} and {len(found)} bytes, on record {sha256} and {size}")
        if not stat.S_ISREG(mode) or stat.S_IMODE(mode) != 0o444:
            yield Problem(self._name(path), f"has mode {stat.filemode(mode)}")

    def _blobs(self) -> Iterator[Problem]:
        """Every blob has the digest that is its name."""
        for path in sorted((self._layout / "blobs" / "sha256").glob("*")):
            self.blobs.add(path.name)
            if (got := hashlib.sha256(path.read_bytes()).hexdigest()) != path.name:
                yield Problem(self._name(path), f"has sha256 {got}")

    def _index(self) -> Iterator[Problem]:
        """The layout is one, and every entry reaches blobs of the size that it says."""
        marker, path = self._layout / "oci-layout", self._layout / "index.json"
        if marker.exists() and _json(marker).get("imageLayoutVersion") != "1.0.0":
            yield Problem(self._name(marker), "is not the mark of an OCI layout")
        if not path.exists():
            return
        index = _json(path)
        entries = index.pop("manifests", None)
        if index.get("schemaVersion") != 2 or not isinstance(entries, list):
            yield Problem(self._name(path), "is no OCI index")
            return
        if not marker.exists():
            yield Problem(self._name(path), "is there without oci-layout")
        ours = [entry for entry in entries if MANAGED in (entry.get("annotations") or {})]
        others = {key: value for key, value in index.items() if key not in ("schemaVersion", "mediaType")}
        self.foreign = [json.dumps(others), *(json.dumps(entry) for entry in entries if entry not in ours)]
        self.answers["index.json"] = sorted(json.dumps(entry, sort_keys=True) for entry in ours)
        for entry in entries:
            name = f"name {(entry.get('annotations') or {}).get(REF_NAME, entry['digest'])}"
            reached = set[str]()
            yield from self._reached(entry, reached)
            self.needs[name] = self.needs.get(name, frozenset()) | reached

    def _reached(self, descriptor: dict[str, Any], reached: set[str]) -> Iterator[Problem]:
        reached.add(digest := descriptor["digest"].removeprefix("sha256:"))
        path = self._layout / "blobs" / "sha256" / digest
        if not path.is_file():
            yield Problem(self._name(path), "is reached from index.json and not there")
            return
        if (size := path.stat().st_size) != descriptor["size"]:
            yield Problem(self._name(path), f"has {size} bytes, index.json reaches it as {descriptor['size']}")
        if descriptor["mediaType"] in _MANIFESTS and (value := _json(path)):
            for part in (*value.get("manifests", ()), *value.get("layers", ()), value.get("config")):
                if part:
                    yield from self._reached(part, reached)

    def _lock(self) -> Iterator[Problem]:
        """versions.lock is whole, what a name stands for is pinned, and a current initrd is there."""
        path = self._root / "system" / "versions.lock"
        if not path.exists():
            return
        self.lock = lock = self.answers["versions.lock"] = _json(path)
        if lock.get("schema") != 1:
            yield Problem(self._name(path), "is not versions.lock, schema 1")
            return
        for name, arches in lock["rolling"].items():
            for arch, version in arches.items():
                if arch not in lock["kernel"].get(version, {}):
                    yield Problem(self._name(path), f"{name} stands for {version} ({arch}), which is not pinned")
        for name, kernels in lock["current"].items():
            for arch, version in (pair for arches in kernels.values() for pair in arches.items()):
                if arch not in lock["initrd"].get(version, {}):
                    yield Problem(self._name(path), f"{name} stands for {version} ({arch}), which is not pinned")

    def _sums(self) -> Iterator[Problem]:
        """sha256sum accepts SHA256SUMS; it may not know the newest yet."""
        path = self._root / "system" / "SHA256SUMS"
        if not path.exists():
            return
        self.answers["SHA256SUMS"] = told = path.read_text()
        self.listed = [line.partition("  ")[2] for line in told.splitlines()]
        if not path.stat().st_size:
            return
        command = ["sha256sum", "--check", "--strict", "--quiet", path.name]
        done = subprocess.run(command, cwd=path.parent, check=False, capture_output=True, text=True)
        lost = {each[0] for each in _LOST_FILE.finditer(done.stdout)}
        for name in sorted(lost):
            yield Problem(f"system/{name.rpartition('/')[0]}{LISTED}", f"{name} is listed and not there")
        if done.returncode and not lost:
            yield Problem(self._name(path), f"is not accepted: {done.stdout}{done.stderr}")

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root)) if path.is_relative_to(self._root) else f"../{path.name}"


def _json(path: Path) -> dict[str, Any]:
    """The JSON object at `path`; an empty one where that is something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def registry_problems(repository: str, *, whole: bool) -> Iterator[str]:
    """What is wrong with tag 1 of a repository, given by its URL; `whole`: it must be there."""
    accept = {"Accept": ", ".join(_MANIFESTS)}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{repository}/manifests/1", headers=accept)) as answer:
            manifest = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        if whole or error.code != 404:
            yield f"{repository} answers {error.code}"
        return
    for part in (manifest["config"], *manifest["layers"]):
        request = urllib.request.Request(f"{repository}/blobs/{part['digest']}", method="HEAD")
        try:
            with urllib.request.urlopen(request) as answer:
                size = int(answer.headers["Content-Length"])
        except urllib.error.HTTPError as error:
            error.close()
            size = -error.code
        if size != part["size"]:
            yield f"{repository} has a manifest that refers to {part['digest']}, of which it has {size} bytes"
