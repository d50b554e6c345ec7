"""What is on the disk and in the registry, read with the standard library alone: none of the code under test helps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("kernel", "initrd")
MANAGED, SOURCE, BASE = "io.systemfiles.managed", "io.systemfiles.source", "io.systemfiles.base"
REF_NAME = "org.opencontainers.image.ref.name"
CONVERTED = "io.systemfiles.converted-from"


class Thing(NamedTuple):
    """A kernel or an initrd on the disk; `files` by name, as sha256 in hex. `made` is UTC, ISO 8601."""

    kind: str
    version: str
    arch: str
    directory: Path
    files: dict[str, str]
    made: str
    requires: str | None

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.version}-{self.arch}"


class Plain:
    """One data directory."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.layout = data / "system" / "oci-cache"
        self.blobs = self.layout / "blobs" / "sha256"

    def things(self) -> dict[str, Thing]:
        """By id, whatever has a record."""
        found = {}
        for kind in KINDS:
            for path in sorted((self.data / "system" / kind).glob("*/*/artifact.json")):
                record = json.loads(path.read_bytes())
                files = {name: facts["sha256"] for name, facts in record["files"].items()}
                version, arch = path.parts[-3:-1]
                thing = Thing(
                    kind, version, arch, path.parent, files, record["created_at"], record.get("requires_kernel")
                )
                found[thing.id] = thing
        return found

    def damage(self, thing: Thing) -> Iterator[str]:
        """What is wrong with its files or their blobs."""
        for name, sha256 in thing.files.items():
            for path in (thing.directory / name, self.blobs / sha256):
                if not path.exists():
                    yield f"{path} is gone"
                elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                    yield f"{path} is damaged"

    def entries(self) -> list[dict[str, Any]]:
        """index.json's."""
        with contextlib.suppress(FileNotFoundError):
            entries: list[dict[str, Any]] = json.loads((self.layout / "index.json").read_bytes())["manifests"]
            return entries
        return []

    def reached(self, entry: dict[str, Any]) -> set[str]:
        """The digests, in hex, of all that an entry refers to and is there."""
        found, todo = set(), [entry]
        while todo:
            part = todo.pop()
            name = part["digest"].removeprefix("sha256:")
            path = self.blobs / name
            found.add(name)
            if "manifest" in part["mediaType"] or "index" in part["mediaType"]:
                value = json.loads(path.read_bytes()) if path.exists() else {}
                todo += [*value.get("manifests", ()), *value.get("layers", ())]
                todo += [value["config"]] if "config" in value else []
        return found

    def orphans(self) -> set[str]:
        """Blobs that neither index.json, nor a thing, nor a pin needs."""
        needed = {sha256 for thing in self.things().values() for sha256 in thing.files.values()}
        for entry in self.entries():
            needed |= self.reached(entry)
        for path in (self.data / "system" / "pins").glob("*.json"):
            pin = json.loads(path.read_bytes())
            for kind in KINDS:
                needed |= {facts["sha256"] for facts in pin[kind]["record"]["files"].values()}
        return {path.name for path in self.blobs.glob("*")} - needed

    def idle_names(self) -> Iterator[str]:
        """Names of ours that hold nothing."""
        things = self.things()
        told = " ".join((thing.directory / "artifact.json").read_text() for thing in things.values())
        told += " ".join(path.read_text() for path in (self.data / "system" / "pins").glob("*.json"))
        converted = set()
        ours = [entry for entry in self.entries() if MANAGED in entry.get("annotations", {})]
        for entry in ours:
            manifest = json.loads((self.blobs / entry["digest"].removeprefix("sha256:")).read_bytes())
            converted.add(manifest.get("annotations", {}).get(CONVERTED))
        for entry in ours:
            annotations = entry["annotations"]
            name = annotations[REF_NAME]
            if BASE in annotations:
                idle = annotations[SOURCE].removeprefix("sha256:") not in told
            elif name.startswith("docker-"):
                idle = entry["digest"] not in converted
            else:
                idle = SOURCE not in annotations and name not in things
            if idle:
                yield name

    def pins(self) -> dict[str, set[str]]:
        """By name, the ids of what is pinned."""
        found = {}
        for path in (self.data / "system" / "pins").glob("*.json"):
            pin = json.loads(path.read_bytes())
            found[path.stem] = {f"{kind}-{pin[kind]['version']}-{pin[kind]['arch']}" for kind in KINDS}
        return found

    def current(self) -> set[str]:
        """The ids of what the catalog's default profile and versions.lock name."""
        found = {
            f"{kind}-{name}-{arch}" for kind, name in (("kernel", "steady"), ("initrd", "plain")) for arch in _ARCHES
        }
        path = self.data / "system" / "versions.lock"
        lock = json.loads(path.read_bytes()) if path.exists() else {"rolling": {}, "current": {}}
        kernels = {(arch, kernel) for arches in lock["rolling"].values() for arch, kernel in arches.items()}
        found |= {f"kernel-{kernel}-{arch}" for arch, kernel in kernels}
        for of_kernel in lock["current"].values():
            for kernel, initrds in of_kernel.items():
                found |= {
                    f"initrd-{version}-{arch}"
                    for arch, version in initrds.items()
                    if (arch, kernel) in kernels or kernel == "steady"
                }
        return found

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """What the registry says; nothing where there is none."""
        path = self.data / "registry.sqlite"
        if not path.exists():
            return []
        connection = sqlite3.connect(path, timeout=30)
        try:
            return connection.execute(statement, values).fetchall()
        finally:
            connection.close()

    def located(self) -> dict[str, str]:
        """By asset, where the registry says that its bytes are."""
        return dict(self.rows("SELECT asset_id, path FROM asset_locations"))

    def accessed(self) -> dict[str, int]:
        """When each asset was last used: a lease that has ended by itself was a use until then."""
        ends = "SELECT max(expires_at) FROM asset_leases WHERE asset_id = assets.id"
        return dict(self.rows(f"SELECT id, max(last_accessed_at, coalesce(({ends}), 0)) FROM assets"))


_ARCHES = ("x86_64", "aarch64")


def listing(data: Path) -> dict[str, tuple[int, ...] | bytes]:
    """Everything there is: the inode, mode, size and mtime of each file and directory, and every byte.

    But for -shm, in which those who have an SQLite database open tell each other of themselves, and which holds
    nothing. This process must not have it open: whoever closes a file gives up all locks that it had on it.
    """
    found: dict[str, tuple[int, ...] | bytes] = {}
    for path in [data, *sorted(data.rglob("*"))]:
        stat = path.lstat()
        name = str(path.relative_to(data))
        if name.endswith("-shm"):
            continue
        found[name] = (stat.st_ino, stat.st_mode, stat.st_nlink, stat.st_size, stat.st_mtime_ns)
        if path.is_file():
            found[f"{name}: bytes"] = path.read_bytes()
    return found
