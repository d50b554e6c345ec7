"""Artifact directories and content store in step: each is written again from the other, and nothing is renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from systemfiles.content.artifacts import MODULES, RECORD, Artifact, Artifacts
from systemfiles.content.descriptors import MANIFEST, Descriptor, canonical
from systemfiles.content.index import REF_NAME
from systemfiles.content.layout import Layout
from systemfiles.content.packaging import TITLE
from systemfiles.content.store import Store, changes, layout_name
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import IntegrityError, StoreError, VersionConflict
from systemfiles.foundation.paths import INITRD, KERNEL, Paths

BLOB = "application/octet-stream"
X86 = Arch.X86_64
CONTENTS = {"vmlinux": b"vmlinux" * 1000, MODULES: b"modules" * 500}
INPUTS = {"package": "linux", "init": {"version": "v1", "sha256": "aa"}}
KERNEL_1 = (KERNEL, "k1", X86)
NOON = 1_795_176_000.0  # 2026-11-20T12:00:00Z


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


@pytest.fixture
def store(paths: Paths) -> Store:
    return open_store(paths)


def open_store(paths: Paths) -> Store:
    return Store(paths, Artifacts(paths), clock=lambda: NOON)


def put(
    store: Store,
    version: str = "k1",
    *,
    kind: str = KERNEL,
    contents: Mapping[str, bytes] = CONTENTS,
    inputs: Mapping[str, Any] = INPUTS,
    **more: object,
) -> Artifact:
    files = {name: store.layout.add_bytes(data, BLOB) for name, data in contents.items()}
    record = {
        "schema": 1,
        "kind": kind,
        "version": version,
        "arch": X86.value,
        "files": {name: {"sha256": file.digest.hex, "size": file.size} for name, file in files.items()},
        "inputs": inputs,
        **more,
    }
    return store.put(record, files)


def put_initrd(store: Store, content: str, compressed: bytes) -> Artifact:
    return put(store, "i1", kind=INITRD, contents={"initrd": compressed}, content_sha256=content)


def blob_of(store: Store, name: str) -> Path:
    return store.layout.blob(Digest.of(CONTENTS[name]))


def manifest_of(store: Store, name: str = "kernel-k1-x86_64") -> dict[str, Any]:
    return store.layout.read_json(store.layout.names()[name].digest)


def damage(path: Path) -> None:
    data = bytes(path.stat().st_size)
    path.unlink()
    path.write_bytes(data)


def remove(directory: Path) -> None:
    shutil.rmtree(directory)


# taking in


def test_what_is_put_is_on_disk_once_and_named_in_the_layout(store: Store) -> None:
    artifact = put(store)
    for name, data in CONTENTS.items():
        assert (artifact.directory / name).read_bytes() == data
        assert (artifact.directory / name).samefile(blob_of(store, name))
    assert layout_name(*KERNEL_1) in store.layout.names()
    assert list(store.layout.verify()) == []


def test_its_record_says_when_and_by_which_release(store: Store) -> None:
    record = put(store).record
    assert record["created_at"] == "2026-11-20T12:00:00Z"
    assert record["created_by"].startswith("systemfiles ")


def test_its_manifest_names_the_record_and_the_files(store: Store) -> None:
    put(store)
    manifest = manifest_of(store)
    assert [layer["annotations"][TITLE] for layer in manifest["layers"]] == [RECORD, MODULES, "vmlinux"]
    config = store.layout.read_json(Digest.parse(manifest["config"]["digest"]))
    assert (config["architecture"], config["os"]) == ("amd64", "linux")


def test_the_same_artifact_has_the_same_manifest_whenever_it_is_made(paths: Paths) -> None:
    one, other = Paths(paths.data_dir / "one"), Paths(paths.data_dir / "other")
    put(open_store(one))
    put(Store(other, Artifacts(other)))
    assert Layout(one).names() == Layout(other).names()


def test_putting_it_again_changes_nothing_but_is_fine(store: Store) -> None:
    before = put(store)
    target = store.layout.names()
    assert put(store).inputs == before.inputs
    assert store.layout.names() == target


def test_a_version_on_record_never_gets_other_content(store: Store) -> None:
    artifact = put(store)
    artifact.path.unlink()  # damaged, so that provisioning makes it again
    with pytest.raises(VersionConflict) as caught:
        put(store, contents={**CONTENTS, "vmlinux": b"another kernel"})
    assert "content" in caught.value.changes
    assert (caught.value.kind, caught.value.version, caught.value.arch) == (KERNEL, "k1", "x86_64")
    assert store.artifacts.load(*KERNEL_1).files == artifact.files


def test_an_initrd_is_the_same_whatever_compressed_it(store: Store) -> None:
    put_initrd(store, "ab" * 32, b"compressed by one zlib")
    again = put_initrd(store, "ab" * 32, b"compressed by another")
    assert again.path.read_bytes() == b"compressed by another"
    with pytest.raises(VersionConflict):
        put_initrd(store, "cd" * 32, b"other content")


# keeping


def test_what_is_intact_and_of_todays_inputs_is_kept(store: Store) -> None:
    artifact = put(store)
    assert store.kept(*KERNEL_1, INPUTS) == artifact
    assert store.kept(*KERNEL_1, None) == artifact


def test_what_was_never_made_is_not_kept(store: Store) -> None:
    assert store.kept(*KERNEL_1, INPUTS) is None


@pytest.mark.parametrize("name", ["vmlinux", MODULES, RECORD])
def test_what_lacks_any_of_its_files_is_not_kept(store: Store, name: str) -> None:
    (put(store).directory / name).unlink()
    assert store.kept(*KERNEL_1, INPUTS) is None


@pytest.mark.parametrize("name", ["vmlinux", MODULES, RECORD])
def test_what_has_a_damaged_file_is_not_kept(store: Store, name: str) -> None:
    damage(put(store).directory / name)
    assert store.kept(*KERNEL_1, INPUTS) is None


def test_a_record_with_a_nonsensical_digest_is_not_kept_but_made_again(store: Store) -> None:
    artifact = put(store)
    record = {**artifact.record, "files": {name: {"sha256": "ab", "size": 1} for name in CONTENTS}}
    (artifact.directory / RECORD).unlink()
    (artifact.directory / RECORD).write_text(json.dumps(record))
    assert store.kept(*KERNEL_1, INPUTS) is None
    assert put(store).files == artifact.files


def test_changed_inputs_are_a_conflict_that_names_each_change(store: Store) -> None:
    put(store)
    today = {"package": "linux", "init": {"version": "v2", "sha256": "aa"}, "tree": 2}
    with pytest.raises(VersionConflict) as caught:
        store.kept(*KERNEL_1, today)
    assert caught.value.changes == {"init.version": ("v1", "v2"), "tree": (None, 2)}
    assert "init.version  v1 -> v2" in str(caught.value)


def test_changes_are_told_by_dotted_name() -> None:
    before = {"same": 1, "gone": 2, "deep": {"er": {"x": 1, "y": 2}}, "kind": {"a": 1}}
    now = {"same": 1, "new": 3, "deep": {"er": {"x": 1, "y": 5}}, "kind": "text"}
    assert changes(before, now) == {
        "gone": (2, None),
        "new": (None, 3),
        "deep.er.y": (2, 5),
        "kind": ({"a": 1}, "text"),
    }
    assert changes(before, before) == {}


# recovering


def test_a_deleted_directory_is_recovered_from_the_layout(store: Store, paths: Paths) -> None:
    artifact = put(store)
    remove(artifact.directory)
    assert open_store(paths).kept(*KERNEL_1, INPUTS) is None
    recovered = store.recover(*KERNEL_1, INPUTS)
    assert recovered == artifact
    assert store.kept(*KERNEL_1, INPUTS) == artifact


def test_a_damaged_file_is_recovered_as_a_new_inode(store: Store, paths: Paths) -> None:
    artifact = put(store)
    artifact.path.unlink()
    artifact.path.write_bytes(b"damaged")
    held = paths.data_dir / "held"
    os.link(artifact.path, held)
    assert store.recover(*KERNEL_1, INPUTS) is not None
    assert artifact.path.read_bytes() == CONTENTS["vmlinux"]
    assert held.read_bytes() == b"damaged"


def test_it_is_recovered_without_knowing_its_inputs(store: Store) -> None:
    artifact = put(store)
    remove(artifact.directory)
    assert store.recover(*KERNEL_1, None) == artifact


def test_changed_inputs_are_a_conflict_when_recovering_too(store: Store) -> None:
    remove(put(store).directory)
    with pytest.raises(VersionConflict) as caught:
        store.recover(*KERNEL_1, {**INPUTS, "package": "other"})
    assert caught.value.changes == {"package": ("linux", "other")}


def test_what_the_layout_never_held_is_not_recovered(store: Store) -> None:
    assert store.recover(*KERNEL_1, INPUTS) is None


@pytest.mark.parametrize("happens", [Path.unlink, damage])
@pytest.mark.parametrize("part", ["manifest", RECORD, "vmlinux", MODULES])
def test_what_the_layout_does_not_hold_intact_is_not_recovered(store: Store, part: str, happens: Any) -> None:
    artifact = put(store)
    layers = {layer["annotations"][TITLE]: layer["digest"] for layer in manifest_of(store)["layers"]}
    target = store.layout.names()[layout_name(*KERNEL_1)]
    happens(store.layout.blob(target.digest if part == "manifest" else Digest.parse(layers[part])))
    remove(artifact.directory)
    assert store.recover(*KERNEL_1, INPUTS) is None
    assert not artifact.directory.exists()
    put(store)
    assert store.kept(*KERNEL_1, INPUTS) is not None
    assert list(store.layout.verify()) == []


def test_without_an_index_nothing_is_recovered_and_it_is_made_again(store: Store) -> None:
    artifact = put(store)
    remove(artifact.directory)
    (store.layout.root / "index.json").unlink()
    assert store.recover(*KERNEL_1, INPUTS) is None
    assert put(store).files == artifact.files
    assert store.recover(*KERNEL_1, INPUTS) is not None


def test_a_broken_index_is_a_store_error(store: Store) -> None:
    put(store)
    (store.layout.root / "index.json").write_text("{")
    with pytest.raises(StoreError):
        store.recover(*KERNEL_1, INPUTS)
    with pytest.raises(StoreError):
        store.reassert()


def test_a_name_that_points_to_another_artifact_is_not_believed(store: Store) -> None:
    remove(put(store, "k1").directory)
    other = put(store, "k2", contents={"vmlinux": b"k2"})
    store.layout.name(layout_name(*KERNEL_1), store.layout.names()[layout_name(KERNEL, "k2", X86)])
    assert store.recover(*KERNEL_1, None) is None
    assert other.path.read_bytes() == b"k2"


def _layer(store: Store, title: str, data: bytes) -> dict[str, Any]:
    return store.layout.add_bytes(data, BLOB, annotations={TITLE: title}).to_json()


def _hostile(store: Store, **changed: object) -> dict[str, Any]:
    """A manifest of one file whose record says something else than it should."""
    data = b"a kernel"
    record = {
        "schema": 1,
        "kind": KERNEL,
        "version": "k1",
        "arch": "x86_64",
        "files": {"vmlinux": {"sha256": Digest.of(data).hex, "size": len(data)}},
        "inputs": INPUTS,
        **changed,
    }
    return {"layers": [_layer(store, RECORD, canonical(record)), _layer(store, "vmlinux", data)]}


HOSTILE = {
    "no JSON": lambda store: b"not json",
    "no layers": lambda store: {},
    "layers a number": lambda store: {"layers": 5},
    "layers of nothing": lambda store: {"layers": [None]},
    "no record": lambda store: {"layers": [_layer(store, "vmlinux", b"x")]},
    "no titles": lambda store: {"layers": [store.layout.add_bytes(b"x", BLOB).to_json()]},
    "digest that leaves the store": lambda store: {
        "layers": [{"mediaType": BLOB, "digest": "sha256:../../../x", "size": 1, "annotations": {TITLE: RECORD}}]
    },
    "record that is no JSON": lambda store: {"layers": [_layer(store, RECORD, b"x")]},
    "record without a digest": lambda store: _hostile(store, files={"vmlinux": {"sha256": "ab", "size": 8}}),
    "record of other bytes": lambda store: _hostile(store, files={"vmlinux": {"sha256": "ab" * 32, "size": 8}}),
    "record of more files": lambda store: _hostile(
        store, files={"vmlinux": {"sha256": "ab" * 32, "size": 8}, MODULES: {"sha256": "ab" * 32, "size": 8}}
    ),
    "file that leaves its directory": lambda store: _hostile(
        store, files={"vmlinux": {"sha256": "ab" * 32, "size": 8}, "../../x": {"sha256": "ab" * 32, "size": 8}}
    ),
    "another architecture": lambda store: _hostile(store, arch="mips"),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_under_our_name_recovers_nothing(store: Store, paths: Paths, make: Any) -> None:
    value = make(store)
    raw = value if isinstance(value, bytes) else canonical(value)
    store.layout.name(layout_name(*KERNEL_1), store.layout.add_bytes(raw, MANIFEST))
    assert store.recover(*KERNEL_1, None) is None
    assert not paths.kind(KERNEL).exists()


def test_a_well_formed_manifest_recovers_so_the_hostile_ones_fail_for_their_own_reason(store: Store) -> None:
    store.layout.name(layout_name(*KERNEL_1), store.layout.add_bytes(canonical(_hostile(store)), MANIFEST))
    assert store.recover(*KERNEL_1, INPUTS) is not None


# reasserting


def test_an_index_that_others_rewrote_gets_our_names_back_and_keeps_theirs(store: Store) -> None:
    put(store, "k1")
    put(store, "k2")
    before = store.layout.names()
    theirs = {"mediaType": MANIFEST, "digest": str(Digest.of(b"x")), "size": 1, "annotations": {REF_NAME: "alpine:3"}}
    (store.layout.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [theirs]}))
    assert not store.is_asserted()
    store.reassert()
    assert store.is_asserted()
    names = store.layout.names()
    assert {name: names[name].digest for name in before} == {name: target.digest for name, target in before.items()}
    assert "alpine:3" in names


def test_a_lost_index_is_written_again(store: Store) -> None:
    put(store)
    (store.layout.root / "index.json").unlink()
    assert not store.is_asserted()
    store.reassert()
    assert store.is_asserted()
    assert list(store.layout.verify()) == []


def test_a_lost_layout_is_linked_again_from_the_artifacts(store: Store) -> None:
    artifact = put(store)
    remove(store.layout.root)
    store.reassert()
    assert store.is_asserted()
    assert list(store.layout.verify()) == []
    assert artifact.path.samefile(blob_of(store, "vmlinux"))


@pytest.mark.parametrize(
    ("part", "happens"),
    # other damage is what `verify` reads every byte for
    [("manifest", damage), ("manifest", Path.unlink), ("config", Path.unlink), (RECORD, Path.unlink)],
)
def test_a_lost_or_damaged_part_of_our_manifests_is_written_again(store: Store, part: str, happens: Any) -> None:
    put(store)
    manifest = manifest_of(store)
    digests = {layer["annotations"][TITLE]: layer["digest"] for layer in manifest["layers"]}
    digests["manifest"] = store.layout.names()[layout_name(*KERNEL_1)].digest
    digests["config"] = manifest["config"]["digest"]
    happens(store.layout.blob(Digest.parse(digests[part])))
    assert not store.is_asserted()
    store.reassert()
    assert store.is_asserted()
    assert list(store.layout.verify()) == []


def test_a_lost_blob_is_linked_again(store: Store) -> None:
    put(store)
    blob_of(store, MODULES).unlink()
    assert not store.is_asserted()
    store.reassert()
    assert store.is_asserted()
    assert list(store.layout.verify()) == []


def test_nothing_to_reassert_writes_nothing(store: Store) -> None:
    store.reassert()
    put(store)
    before = (store.layout.root / "index.json").stat().st_mtime_ns
    store.reassert()
    assert (store.layout.root / "index.json").stat().st_mtime_ns == before


def test_a_damaged_artifact_is_not_named_and_keeps_no_other_from_it(store: Store) -> None:
    damaged = put(store, "k1")
    put(store, "k2", contents={"vmlinux": b"k2"})
    remove(store.layout.root)
    damage(damaged.path)
    with contextlib.suppress(IntegrityError):
        store.reassert()
    assert set(store.layout.names()) == {layout_name(KERNEL, "k2", X86)}


def test_names_of_the_layout_say_what_they_are() -> None:
    assert layout_name(KERNEL, "debian-cloud-6.1.192-2", Arch.AARCH64) == "kernel-debian-cloud-6.1.192-2-aarch64"
    assert Descriptor(BLOB, Digest.of(b""), 0).annotations == {}
