"""A registry that nobody trusts: what a pin promises may come from there, and only that."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from systemfiles import SystemFiles
from systemfiles.content.artifacts import RECORD
from systemfiles.content.packaging import TITLE
from systemfiles.foundation import cpio
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import IntegrityError, SourceUnavailable, SystemFilesError
from systemfiles.sources.oci import Repository
from tests.release.conftest import Key, Press, entries

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
Change = Callable[[dict[str, Any], dict[str, bytes]], None]


def push(target: Repository, data: bytes) -> dict[str, Any]:
    target.push_blob(Digest.of(data), len(data), io.BytesIO(data))
    return {"digest": Digest.of(data), "size": len(data)}


def republish(press: Press, other: Press, change: Change, *, version: str = "i-2") -> None:
    """Lets `other` have the initrd of `press` with its record and files changed."""
    source, target = press.repository("initrd"), other.repository("initrd")
    index = press.index(version, "initrd")
    manifest = json.loads(source.manifest(entries(index)["amd64"]["digest"]).raw)
    parts = {
        layer["annotations"][TITLE]: source.small_blob(Digest.parse(layer["digest"])) for layer in manifest["layers"]
    }
    record, (kind, file_type) = json.loads(parts.pop(RECORD)), (each["mediaType"] for each in manifest["layers"])
    change(record, parts)
    record["files"] = {name: {"sha256": Digest.of(data).hex, "size": len(data)} for name, data in parts.items()}
    files = {RECORD: json.dumps(record).encode(), **parts}
    manifest["layers"] = [
        {"mediaType": kind if name == RECORD else file_type, **push(target, data), "annotations": {TITLE: name}}
        for name, data in files.items()
    ]
    manifest["config"] |= push(target, source.small_blob(Digest.parse(manifest["config"]["digest"])))
    raw = json.dumps(manifest).encode()
    target.push_manifest(raw, MANIFEST, Digest.of(raw))
    index["manifests"] = [{**entries(index)["amd64"], "digest": Digest.of(raw), "size": len(raw)}]
    target.push_manifest(json.dumps(index).encode(), INDEX, version)


def pinned_and_lost(press: Press, key: Key, other: Press) -> SystemFiles:
    """A host whose pinned initrd is gone, and which now asks `other`."""
    host = press.host(trusted=(key,))
    files = host.ensure("k-2", "i-2")
    host.pin("snapshot", files)
    files.initrd.path.unlink()
    (host.paths.oci_cache / "blobs" / "sha256" / files.initrd.sha256).unlink()
    return SystemFiles(host.paths.data_dir, catalog=other.host(trusted=(key,))._catalog_path)


@pytest.fixture
def key(press: Press) -> Key:
    key = press.key()
    press.publish(key)
    return key


def as_the_kernel_unpacks(packed: bytes) -> bytes:
    """What lib/decompress_inflate.c makes of it: behind ten bytes and a name, whatever other flags there are."""
    begin = 10
    if packed[3] & 8:
        begin = packed.index(0, begin) + 1
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed[begin:])


def with_two_faces(packed: bytes) -> bytes:
    """A gzip member that zlib finds the content of `packed` in, and the kernel another one."""
    written = io.BytesIO()
    cpio.write([cpio.file("init", b"#!/bin/sh\necho somebody else's\n", mode=0o755)], written)
    evil = written.getvalue()
    # one stored block and an empty last one, whose first two bytes are the length of the extra field as well
    evil = evil.ljust((len(evil) // 256 + 1) * 256 + 16, b"\0")
    field = struct.pack("<BHH", 0, len(evil), len(evil) ^ 0xFFFF) + evil + b"\x03\x00"
    length = struct.unpack_from("<H", field)[0]
    return b"\x1f\x8b\x08\x04" + packed[4:10] + field.ljust(length + 2, b"\0") + packed[10:]


def _another_for_the_kernel(record: dict[str, Any], files: dict[str, bytes]) -> None:
    changed = with_two_faces(files["initrd"])
    same = zlib.decompressobj(zlib.MAX_WBITS | 16)
    assert Digest.of(same.decompress(changed)).hex == record["content_sha256"]
    assert b"somebody else's" in as_the_kernel_unpacks(changed)
    files["initrd"] = changed


def _a_named_member(record: dict[str, Any], files: dict[str, bytes]) -> None:
    packed = files["initrd"]
    files["initrd"] = packed[:3] + b"\x08" + packed[4:10] + b"initrd\0" + packed[10:]


def _one_file_more(record: dict[str, Any], files: dict[str, bytes]) -> None:
    files["surprise.sh"] = b"#!/bin/sh\n"


def _too_long(record: dict[str, Any], files: dict[str, bytes]) -> None:
    files["initrd"] += bytes(record["content_size"] * 2)


@pytest.mark.parametrize("change", [_another_for_the_kernel, _a_named_member, _one_file_more, _too_long])
def test_a_pin_takes_nothing_else_from_a_mirror(press: Press, key: Key, change: Change) -> None:
    mirror = press.elsewhere("mirror")
    republish(press, mirror, change)
    host = pinned_and_lost(press, key, mirror)
    with pytest.raises(SystemFilesError):
        host.restore("snapshot")
    assert not any(path.name in ("initrd", "surprise.sh") for path in host.paths.kind("initrd").rglob("*"))


def test_what_a_mirror_has_too_much_is_not_fetched(press: Press, key: Key) -> None:
    mirror = press.elsewhere("mirror")
    republish(press, mirror, _too_long)
    host = pinned_and_lost(press, key, mirror)
    before = {*(host.paths.oci_cache / "blobs" / "sha256").iterdir()}
    with pytest.raises(SourceUnavailable, match=r"expected at most [0-9]+ bytes of initrd"):
        host.restore("snapshot")
    assert {*(host.paths.oci_cache / "blobs" / "sha256").iterdir()} == before


def test_what_it_promises_does_come_back_from_there(press: Press, key: Key) -> None:
    mirror = press.elsewhere("mirror")
    republish(press, mirror, lambda record, files: None)
    host = pinned_and_lost(press, key, mirror)
    assert host.restore("snapshot").initrd.path.is_file()


def _other_content(record: dict[str, Any], files: dict[str, bytes]) -> None:
    content = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(files["initrd"]) + bytes(512)
    pack = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    files["initrd"] = pack.compress(content) + pack.flush()
    record["content_sha256"] = Digest.of(content).hex


def _nested(record: dict[str, Any], files: dict[str, bytes]) -> None:
    value: Mapping[str, Any] = {}
    for _ in range(600):
        value = {"a": value}
    record["more"] = value


@pytest.mark.parametrize("change", [_other_content, _nested])
def test_the_next_registry_is_asked_when_one_has_something_else(press: Press, change: Change) -> None:
    press.publish()
    other = press.elsewhere("other")
    other.publish()
    republish(press, other, change)
    host = press.host()
    host.ensure("k-2", "i-2")
    (host.paths.artifact("initrd", "i-2", host.arch) / "initrd").unlink()
    for file in host.paths.oci_cache.glob("blobs/sha256/*"):
        file.unlink()
    both = press.host(registries=(other.registry, press.registry))
    again = SystemFiles(host.paths.data_dir, catalog=both._catalog_path)
    assert again.ensure("k-2", "i-2").initrd.path.is_file()


def test_wrong_bytes_of_a_mirror_are_not_forgotten_when_the_registry_is_down(press: Press) -> None:
    """They are no reason to build it here."""
    press.publish()
    digest = entries(press.index("k-2"))["amd64"]["digest"]
    layers = press.repository().manifest(digest).value["layers"]
    wrong = next(layer for layer in layers if layer["annotations"][TITLE] == "vmlinux")
    path = press.blob(wrong["digest"])
    good = path.read_bytes()
    down = "127.0.0.1:9/release"
    host = press.host(build=True, registries=(down,))
    catalog = host._catalog_path
    assert catalog
    catalog.write_text(f'{catalog.read_text()}\n[mirrors]\n"{down}" = ["{press.registry}"]\n')
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(IntegrityError):
            host.ensure("k-2", "i-2")
    finally:
        path.write_bytes(good)
    assert not any(host.artifacts())
