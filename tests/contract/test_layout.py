"""The content store is an OCI image layout (image-spec, image-layout.md) and stays one, whoever else writes to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from systemfiles.content.descriptors import IMAGE_CONFIG, INDEX, MANIFEST, Descriptor, canonical, image_config, manifest
from systemfiles.content.index import MANAGED, REF_NAME
from systemfiles.content.layout import LARGEST_JSON, Layout
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import DigestMismatch, IntegrityError, NotFound, StoreError
from systemfiles.foundation.lock import locked
from systemfiles.foundation.paths import Paths

BLOB = "application/octet-stream"
DATA = b"blob " * 1000
DIGEST = Digest.of(DATA)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


@pytest.fixture
def layout(paths: Paths) -> Layout:
    return Layout(paths)


def read_index(layout: Layout) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((layout.root / "index.json").read_text())
    return value


def write_index(layout: Layout, value: object) -> None:
    layout.create()
    (layout.root / "index.json").write_text(json.dumps(value))


def damage(layout: Layout, digest: Digest) -> None:
    """Other bytes of the same length, as a failing disk would have them."""
    path = layout.blob(digest)
    size = path.stat().st_size
    path.chmod(0o644)
    path.write_bytes(b"\0" * size)


def add_image(layout: Layout, name: str) -> tuple[Descriptor, Descriptor, Descriptor]:
    """A named image of one layer: its manifest, config and layer."""
    layer = layout.add_bytes(f"layer of {name}".encode(), BLOB)
    config = layout.add_bytes(image_config(Arch.AARCH64, [layer]), IMAGE_CONFIG)
    target = layout.add_bytes(manifest(config, [layer], {"a": "b"}), MANIFEST)
    layout.name(name, target)
    return target, config, layer


# the layout itself


def test_an_empty_layout_is_what_the_spec_says(layout: Layout) -> None:
    layout.create()
    assert json.loads((layout.root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert read_index(layout) == {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
    assert (layout.root / "blobs" / "sha256").is_dir()


def test_a_layout_that_is_there_is_left_as_it_is(layout: Layout) -> None:
    layout.create()
    (layout.root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0", "theirs": 1}')
    write_index(layout, {"schemaVersion": 2, "manifests": [], "theirs": 2})
    layout.create()
    assert json.loads((layout.root / "oci-layout").read_text())["theirs"] == 1
    assert read_index(layout)["theirs"] == 2


def test_no_layout_has_no_names_and_no_blobs(layout: Layout) -> None:
    assert layout.names() == {}
    assert list(layout.verify()) == []
    assert not layout.intact(DIGEST)
    with pytest.raises(NotFound):
        layout.read(DIGEST)
    assert not layout.root.exists()


# ingest


def test_a_blob_is_read_only_under_its_digest_and_nothing_else_is_left(layout: Layout, paths: Paths) -> None:
    added = layout.add_bytes(DATA, BLOB, annotations={"a": "b"})
    path = layout.root / "blobs" / "sha256" / DIGEST.hex
    assert added == Descriptor(BLOB, DIGEST, len(DATA), {"a": "b"})
    assert path == layout.blob(DIGEST)
    assert path.read_bytes() == layout.read(DIGEST) == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert list(paths.tmp.iterdir()) == []


def test_a_blob_has_no_name_before_it_is_whole(layout: Layout) -> None:
    with layout.new_file() as new:
        new.write(DATA[:10])
        assert not (layout.root / "blobs").exists()
        new.write(DATA[10:])
        layout.add(new, BLOB)
    assert layout.read(DIGEST) == DATA


def test_an_interrupted_ingest_leaves_nothing(layout: Layout, paths: Paths) -> None:
    def interrupted() -> None:
        with layout.new_file() as new:
            new.write(DATA)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(paths.tmp.iterdir()) == []
    assert not layout.root.exists()


def _add_bytes(layout: Layout, paths: Paths) -> Descriptor:
    return layout.add_bytes(DATA, BLOB)


def _add_path(layout: Layout, paths: Paths) -> Descriptor:
    paths.tmp.mkdir(exist_ok=True)
    (paths.tmp / "work").write_bytes(DATA)
    return layout.add_path(paths.tmp / "work", BLOB)


WAYS_IN = pytest.mark.parametrize("add", [_add_bytes, _add_path])


@WAYS_IN
def test_an_intact_blob_is_kept_as_it_is(
    layout: Layout, paths: Paths, add: Callable[[Layout, Paths], Descriptor]
) -> None:
    add(layout, paths)
    before = layout.blob(DIGEST).stat()
    assert add(layout, paths) == Descriptor(BLOB, DIGEST, len(DATA))
    after = layout.blob(DIGEST).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@WAYS_IN
@pytest.mark.parametrize("content", [b"", DATA[:-1], DATA + b"x", b"X" * len(DATA)])
def test_a_damaged_blob_is_replaced_by_a_new_inode(
    layout: Layout, paths: Paths, content: bytes, add: Callable[[Layout, Paths], Descriptor]
) -> None:
    add(layout, paths)
    held = paths.tmp / "held"
    os.link(layout.blob(DIGEST), held)
    held.chmod(0o644)
    held.write_bytes(content)
    assert not layout.intact(DIGEST)
    add(layout, paths)
    assert layout.intact(DIGEST, len(DATA))
    assert held.read_bytes() == content
    assert not held.samefile(layout.blob(DIGEST))


def test_a_discarded_blob_is_gone_and_may_be_discarded_again(layout: Layout) -> None:
    layout.add_bytes(DATA, BLOB)
    damage(layout, DIGEST)
    layout.discard(DIGEST)
    layout.discard(DIGEST)
    assert not layout.blob(DIGEST).exists()


def test_a_blob_that_somebody_repaired_meanwhile_is_not_discarded(layout: Layout, paths: Paths) -> None:
    layout.add_bytes(DATA, BLOB)
    inode = layout.blob(DIGEST).stat().st_ino
    layout.discard(DIGEST)
    assert layout.blob(DIGEST).read_bytes() == DATA
    assert layout.blob(DIGEST).stat().st_ino == inode
    assert not any(paths.tmp.iterdir())


def test_what_others_are_just_writing_is_read_when_they_have_finished(layout: Layout, paths: Paths) -> None:
    """As skopeo does it: in place, under the lock that `systemfiles lock` takes for it."""
    target, _, _ = add_image(layout, "it")
    index = paths.oci_cache / "index.json"
    whole, told = index.read_bytes(), list[dict[str, Descriptor]]()
    with locked(paths.lock("oci-cache")):
        index.write_bytes(whole[:20])
        reader = threading.Thread(target=lambda: told.append(layout.names()))
        reader.start()
        reader.join(0.3)
        assert told == []
        index.write_bytes(whole)
    reader.join(10)
    assert told[0]["it"].digest == target.digest


def test_a_group_may_write_what_its_tools_rewrite_in_place(paths: Paths) -> None:
    paths.data_dir.mkdir(exist_ok=True)
    paths.data_dir.chmod(0o2775)
    layout = Layout(paths)
    add_image(layout, "it")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths.oci_cache.iterdir() if path.is_file()}
    assert modes == {"index.json": 0o664, "oci-layout": 0o664}


# reading


def test_a_blob_with_other_bytes_is_not_read(layout: Layout) -> None:
    layout.add_bytes(DATA, BLOB)
    damage(layout, DIGEST)
    with pytest.raises(DigestMismatch) as caught:
        layout.read(DIGEST)
    assert (caught.value.expected, caught.value.subject) == (DIGEST, layout.blob(DIGEST))


def test_a_blob_is_not_read_beyond_the_limit(layout: Layout) -> None:
    layout.add_bytes(DATA, BLOB)
    assert layout.read(DIGEST, limit=len(DATA)) == DATA
    with pytest.raises(StoreError, match="longer than"):
        layout.read(DIGEST, limit=len(DATA) - 1)


def test_a_blob_that_is_too_long_is_refused_without_being_read(layout: Layout) -> None:
    layout.create()
    with layout.blob(DIGEST).open("wb") as stream:
        stream.truncate(1 << 33)  # sparse
    with pytest.raises(StoreError, match=str(LARGEST_JSON)):
        layout.read_json(DIGEST)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000]
)
def test_a_blob_that_is_no_json_object_is_a_store_error(layout: Layout, content: bytes) -> None:
    with pytest.raises(StoreError):
        layout.read_json(layout.add_bytes(content, MANIFEST).digest)


# descriptors


GOOD = {"mediaType": MANIFEST, "digest": DIGEST, "size": 3}


def test_a_descriptor_is_read_back_as_it_was_written() -> None:
    for descriptor in (Descriptor(BLOB, DIGEST, 0), Descriptor(BLOB, DIGEST, 9, {"a": "b"})):
        assert Descriptor.from_json(json.loads(json.dumps(descriptor.to_json()))) == descriptor


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        "x",
        {**GOOD, "digest": "sha256:../../../../etc/passwd"},
        {**GOOD, "digest": f"sha256:{'../' * 21}x"},
        {**GOOD, "digest": DIGEST.upper()},
        {**GOOD, "digest": f"sha512:{'ab' * 64}"},
        {**GOOD, "digest": 5},
        {**GOOD, "digest": None},
        {**GOOD, "size": -1},
        {**GOOD, "size": "3"},
        {**GOOD, "size": 1.5},
        {**GOOD, "size": None},
        {**GOOD, "annotations": 5},
        {**GOOD, "annotations": "ab"},
        {"digest": DIGEST, "size": 3},
    ],
    ids=str,
)
def test_what_is_no_descriptor_is_a_store_error(value: Any) -> None:
    with pytest.raises(StoreError):
        Descriptor.from_json(value)


def test_equal_values_are_equal_bytes() -> None:
    assert canonical({"b": [1], "a": "é"}) == b'{"a":"\\u00e9","b":[1]}'
    layer = Descriptor(BLOB, DIGEST, 3)
    assert manifest(layer, [layer], {"b": "1", "a": "2"}) == manifest(layer, [layer], {"a": "2", "b": "1"})


def test_an_images_config_says_its_platform_and_its_layers() -> None:
    config = json.loads(image_config(Arch.AARCH64, [Descriptor(BLOB, DIGEST, 3)]))
    assert (config["architecture"], config["os"]) == ("arm64", "linux")
    assert config["rootfs"] == {"type": "layers", "diff_ids": [DIGEST]}


# names


def test_a_name_points_to_its_target_and_carries_our_mark(layout: Layout) -> None:
    target, _, _ = add_image(layout, "kernel-k1-x86_64")
    assert layout.names()["kernel-k1-x86_64"].digest == target.digest
    (entry,) = read_index(layout)["manifests"]
    assert entry["annotations"] == {REF_NAME: "kernel-k1-x86_64", MANAGED: "true"}


def test_naming_again_moves_the_name_or_does_nothing(layout: Layout) -> None:
    first = layout.add_bytes(b"{}", MANIFEST)
    second = layout.add_bytes(b'{"a": 1}', MANIFEST)
    layout.name("it", first)
    before = (layout.root / "index.json").stat().st_mtime_ns
    layout.name("it", first)
    assert (layout.root / "index.json").stat().st_mtime_ns == before
    layout.name("it", second)
    assert [target.digest for target in layout.names().values()] == [second.digest]
    assert len(read_index(layout)["manifests"]) == 1


THEIRS = [
    {"mediaType": MANIFEST, "digest": str(DIGEST), "size": 3, "platform": {"os": "linux"}, "urls": ["http://x"]},
    {"mediaType": MANIFEST, "digest": str(DIGEST), "size": 3, "annotations": {REF_NAME: "alpine:3", "x": "\ud800"}},
    {"mediaType": MANIFEST, "digest": str(DIGEST), "size": 3, "annotations": None, "data": "e30="},
]


def test_entries_and_fields_of_others_survive(layout: Layout) -> None:
    index = {"schemaVersion": 2, "manifests": THEIRS, "annotations": {"a": "b"}, "theirs": {"deep": [1, 2.5, None]}}
    write_index(layout, index)
    add_image(layout, "ours")
    add_image(layout, "also-ours")
    after = read_index(layout)
    assert after["manifests"][: len(THEIRS)] == THEIRS
    assert {**after, "manifests": THEIRS} == index
    assert set(layout.names()) == {"alpine:3", "ours", "also-ours"}


def test_a_field_of_others_that_is_nested_deeply_survives(layout: Layout) -> None:
    layout.create()
    deep = '{"a":' * 600 + "1" + "}" * 600
    (layout.root / "index.json").write_text(f'{{"schemaVersion": 2, "manifests": [], "theirs": {deep}}}')
    layout.name("ours", layout.add_bytes(b"{}", MANIFEST))
    assert "ours" in layout.names()
    assert "theirs" in read_index(layout)


@pytest.mark.parametrize(
    "entry",
    [
        {"mediaType": MANIFEST, "digest": f"sha512:{'ab' * 64}", "size": 3, "annotations": {REF_NAME: "theirs"}},
        {"annotations": {REF_NAME: "theirs"}},
    ],
)
def test_an_entry_of_others_that_we_do_not_understand_is_in_nobodys_way(layout: Layout, entry: object) -> None:
    write_index(layout, {"schemaVersion": 2, "manifests": [entry]})
    target, _, _ = add_image(layout, "ours")
    assert layout.names()["ours"].digest == target.digest
    assert list(layout.verify()) == []
    assert entry in read_index(layout)["manifests"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"manifests": {}}', '{"schemaVersion": 2}', '{"manifests": [3]}', '{"manifests": null}', "\0"],
)
def test_a_broken_index_is_a_store_error_and_is_not_overwritten(layout: Layout, content: str) -> None:
    layout.create()
    (layout.root / "index.json").write_text(content)
    with pytest.raises(StoreError, match=r"index\.json"):
        layout.names()
    with pytest.raises(StoreError, match=r"index\.json"):
        add_image(layout, "ours")
    assert (layout.root / "index.json").read_text() == content


def test_a_lost_index_is_made_again(layout: Layout) -> None:
    add_image(layout, "one")
    (layout.root / "index.json").unlink()
    assert layout.names() == {}
    add_image(layout, "two")
    assert set(layout.names()) == {"two"}


def _name(data_dir: Path, number: int) -> None:
    layout = Layout(Paths(data_dir))
    for step in range(3):
        add_image(layout, f"image-{number}-{step}")


def test_eight_processes_that_name_different_things_lose_nothing(layout: Layout, paths: Paths) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_name, args=(paths.data_dir, number)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert set(layout.names()) == {f"image-{number}-{step}" for number in range(8) for step in range(3)}
    assert list(layout.verify()) == []


# what a name reaches


def test_a_name_reaches_its_manifest_config_and_layers_each_once(layout: Layout) -> None:
    layer = layout.add_bytes(DATA, BLOB)
    config = layout.add_bytes(image_config(Arch.X86_64, [layer]), IMAGE_CONFIG)
    one = layout.add_bytes(manifest(config, [layer, layer], {}), MANIFEST)
    two = layout.add_bytes(manifest(config, [layer], {"a": "b"}), MANIFEST)
    index = layout.add_bytes(canonical({"manifests": [one.to_json(), two.to_json(), one.to_json()]}), INDEX)
    reached = [descriptor.digest for descriptor in layout.reachable(index)]
    assert sorted(reached) == sorted({index.digest, one.digest, two.digest, config.digest, layer.digest})


def test_a_missing_manifest_ends_its_branch_and_is_reported(layout: Layout) -> None:
    target, _, _ = add_image(layout, "it")
    layout.blob(target.digest).unlink()
    assert [descriptor.digest for descriptor in layout.reachable(target)] == [target.digest]
    (problem,) = layout.verify()
    assert type(problem) is IntegrityError
    assert (problem.subject, problem.got) == (layout.blob(target.digest), "no file")


def test_everything_that_is_damaged_or_missing_is_reported_at_once(layout: Layout) -> None:
    _, _, damaged = add_image(layout, "one")
    _, missing, _ = add_image(layout, "two")
    add_image(layout, "three")
    damage(layout, damaged.digest)
    layout.blob(missing.digest).unlink()
    problems = {problem.subject: problem for problem in layout.verify()}
    assert set(problems) == {layout.blob(damaged.digest), layout.blob(missing.digest)}
    assert isinstance(problems[layout.blob(damaged.digest)], DigestMismatch)
    assert "one is not whole" in str(problems[layout.blob(damaged.digest)])


def test_a_damaged_manifest_is_reported_like_any_other_blob(layout: Layout) -> None:
    target, _, _ = add_image(layout, "one")
    _, _, layer = add_image(layout, "two")
    damage(layout, target.digest)
    damage(layout, layer.digest)
    assert {problem.subject for problem in layout.verify()} == {layout.blob(target.digest), layout.blob(layer.digest)}


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b"[]",
        canonical({"layers": 5}),
        canonical({"layers": None, "manifests": None}),
        canonical({"layers": ["x"]}),
        canonical({"config": [1]}),
        canonical({"layers": [{**GOOD, "digest": "sha256:../../../x"}]}),
    ],
)
def test_a_manifest_of_others_that_is_nonsense_is_a_store_error_at_most(layout: Layout, content: bytes) -> None:
    target = layout.add_bytes(content, MANIFEST)
    layout.name("theirs", target)
    try:
        reached = list(layout.reachable(target))
    except StoreError:
        return
    assert reached[0].digest == target.digest


def test_a_manifest_that_is_nonsense_does_not_hide_the_damage_elsewhere(layout: Layout) -> None:
    layout.name("a-nonsense", layout.add_bytes(b"not json", MANIFEST))
    _, _, layer = add_image(layout, "one")
    damage(layout, layer.digest)
    assert any(str(layout.blob(layer.digest)) in str(problem) for problem in layout.verify())
