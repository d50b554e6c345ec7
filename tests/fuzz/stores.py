"""Files of the data directory and of its owner, changed by somebody else, given to those who read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from systemfiles.content.artifacts import RECORD, STAMPS, Artifacts, parse_record
from systemfiles.content.descriptors import MANIFEST, Descriptor
from systemfiles.content.index import REF_NAME
from systemfiles.content.layout import Layout
from systemfiles.content.packaging import TITLE
from systemfiles.content.store import Store
from systemfiles.foundation import catalog
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.lockfile import editing_lock, read_lock
from systemfiles.foundation.manifests import DOCKER_LIST, IMAGE_INDEX
from systemfiles.foundation.paths import KERNEL, Paths
from tests.unit import test_artifacts as artifacts
from tests.unit import test_lockfile as locks

X86 = Arch.X86_64

# --- catalog and versions.lock ---

CATALOG = catalog.shipped_catalog().read_bytes()
CATALOG_WORDS = (
    *(b"schema = 1\n", b'[kernel."x"]\n', b"[[kernel]]\n", b"[profile.debian]\n", b"kernel.x.y.z = 1\n", b"apt = {}\n"),
    *(b"load = [[]]\n", b"'''", b'"""', b"\\ud800", b"\\U0010FFFF", b"0xffffffffffffffffff", b"inf", b"nan", b"1e400"),
    *(b"1979-05-27T07:32:00-99:99", b"9999-99-99", b"x = " + b"[" * 900, b"x = " + b"{a=" * 240, b"." * 900),
    *(b"[" + b"a." * 490 + b"a]\n", b"size = 99999999999999999999\n", b"amd64 = ", b"\r\n", b"\r", b"\xef\xbb\xbf"),
)


def take_catalog(data: bytes, work: Path) -> None:
    path = work / "versions.toml"
    path.write_bytes(data)
    taken = catalog.load_catalog(path, environ={})
    for name in taken.kernel:
        taken.find_kernel(name, taken.kernel[name].arches[0])


def take_mirrors(data: bytes, _: Path) -> None:
    text = data.decode("utf-8", "surrogateescape")
    catalog.load_catalog(environ={catalog.MIRRORS_VARIABLE: text})


LOCK = json.loads(locks.filled().model_dump_json(by_alias=True))


def take_lock(data: bytes, work: Path) -> None:
    paths = Paths(work)
    paths.versions_lock.parent.mkdir()
    paths.versions_lock.write_bytes(data)
    taken = read_lock(paths.versions_lock)
    for name in ("k", "i"):
        taken.stands_for(name, X86)
    taken.find_initrd({"tree": 1}, X86)
    with editing_lock(paths, timeout=5) as lock:
        lock.rolling.setdefault("another", {})[X86] = "another-1"
    assert read_lock(paths.versions_lock).rolling["another"] == {X86: "another-1"}


# --- records, stamps and the content store ---

INITRD_RECORD = artifacts.record(
    kind="initrd", files={"initrd": artifacts.facts(b"x")}, content_sha256="ab" * 32, requires_kernel="k1"
)
RECORDS = (artifacts.record(), INITRD_RECORD, artifacts.record(inputs={"kernel": {"modules": "ab" * 32}}))
STAMP = {"vmlinux": [1, 2, 3, "ab" * 32], "modules.tar": [64768, 12, 1_795_176_000_000_000_000, "cd" * 32]}
JSON_WORDS = (
    RECORD,
    STAMPS,
    MANIFEST,
    IMAGE_INDEX,
    DOCKER_LIST,
    REF_NAME,
    TITLE,
    "vmlinux",
    "initrd",
    "kernel",
    "amd64",
)


def take_record(data: bytes, _: Path) -> None:
    record = parse_record(data, "a record")
    for name, facts in record["files"].items():
        assert "/" not in name
        assert Digest.from_hex(facts["sha256"])
        assert facts["size"] >= 0
    json.dumps(record)


def fresh_store(work: Path) -> tuple[Paths, Store]:
    """A data directory with one kernel and one foreign image: copied, since making one takes a while."""
    template = work.parent / "template"
    if not template.exists():
        paths = Paths(template)
        store = Store(paths, Artifacts(paths))
        parts = {"vmlinux": artifacts.DATA, "modules.tar": artifacts.MORE}
        store.put(artifacts.record(), {name: store.layout.add_bytes(part, "x") for name, part in parts.items()})
    shutil.copytree(template, work, dirs_exist_ok=True)
    paths = Paths(work)
    return paths, Store(paths, Artifacts(paths))


def take_stamps(data: bytes, work: Path) -> None:
    paths, store = fresh_store(work)
    path = paths.artifact(KERNEL, "k1", X86) / STAMPS
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    artifact = store.artifacts.load(KERNEL, "k1", X86)
    store.artifacts.check(artifact, *artifact.files)
    assert store.kept(KERNEL, "k1", X86, None) == artifact


def take_artifact(data: bytes, work: Path) -> None:
    """An artifact.json that somebody put there, and all that is done with one."""
    paths, store = fresh_store(work)
    path = paths.artifact(KERNEL, "k1", X86) / RECORD
    path.unlink()
    path.write_bytes(data)
    store.kept(KERNEL, "k1", X86, None)
    store.reassert()
    for error in store.verify():
        assert str(error)
    store.artifacts.load(KERNEL, "k1", X86)


def put_blob(layout: Layout, data: bytes) -> dict[str, Any]:
    digest = Digest.of(data)
    layout.blob(digest).write_bytes(data)
    return {"mediaType": MANIFEST, "digest": digest, "size": len(data)}


def use_layout(paths: Paths, store: Store, index: bytes) -> None:
    (paths.oci_cache / "index.json").write_bytes(index)
    names = store.layout.names()
    for target in names.values():
        for part in store.layout.reachable(target):
            assert Digest.parse(part.digest)
    for error in store.verify():
        assert str(error)
    store.is_asserted()
    shutil.rmtree(paths.artifact(KERNEL, "k1", X86))
    if recovered := store.recover(KERNEL, "k1", X86, None):
        store.artifacts.check(recovered)
    store.reassert()
    store.layout.name("another", Descriptor(MANIFEST, Digest.of(b""), 0))
    assert "another" in store.layout.names()


def take_layout_index(data: bytes, work: Path) -> None:
    paths, store = fresh_store(work)
    use_layout(paths, store, data)


def take_layout_manifest(data: bytes, work: Path) -> None:
    paths, store = fresh_store(work)
    entry = {**put_blob(store.layout, data), "annotations": {REF_NAME: "kernel-k1-x86_64"}}
    use_layout(paths, store, json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())


def take_layout_record(data: bytes, work: Path) -> None:
    paths, store = fresh_store(work)
    described = {"mediaType": "application/octet-stream", "annotations": {TITLE: RECORD}}
    parts = [{**put_blob(store.layout, data), **described}]
    for name, part in (("vmlinux", artifacts.DATA), ("modules.tar", artifacts.MORE)):
        parts.append({**described, "digest": Digest.of(part), "size": len(part), "annotations": {TITLE: name}})
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": parts[0], "layers": parts}
    entry = {**put_blob(store.layout, json.dumps(manifest).encode()), "annotations": {REF_NAME: "kernel-k1-x86_64"}}
    use_layout(paths, store, json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())


INDEX_ENTRY = {"mediaType": MANIFEST, "digest": Digest.of(b"{}"), "size": 2}
INDEXES = (
    {"schemaVersion": 2, "manifests": [{**INDEX_ENTRY, "annotations": {REF_NAME: "kernel-k1-x86_64"}}, INDEX_ENTRY]},
    {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": [], "annotations": {"a": "b"}},
)
LAYOUT_MANIFESTS = (
    {"schemaVersion": 2, "config": INDEX_ENTRY, "layers": [{**INDEX_ENTRY, "annotations": {TITLE: RECORD}}]},
    {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": [INDEX_ENTRY]},
)
