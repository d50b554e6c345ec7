"""Whatever is done to a release in its registry, a host that has the public keys refuses it, and says why."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest

from systemfiles import SystemFiles
from systemfiles.content.packaging import DOCUMENTS, Document
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import (
    IntegrityError,
    SignatureRefused,
    SourceUnavailable,
    SystemFilesError,
    UsageError,
)
from systemfiles.foundation.paths import KINDS
from systemfiles.sources.oci import Repository
from systemfiles.sources.signatures import tag_of
from systemfiles.sources.transport import Answered
from tests.release.conftest import Key, Press, delete, entries, new_key

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def refused(host: SystemFiles, error: type[SystemFilesError], *words: str) -> None:
    """Nothing of it may be there afterwards."""
    with pytest.raises(error) as caught:
        host.ensure("k-2", "i-2")
    for word in words:
        assert word in str(caught.value)
    assert not any(host.artifacts())
    assert not any(path.is_file() for kind in KINDS for path in host.paths.kind(kind).rglob("*"))
    assert [*host.paths.tmp.iterdir()] == []


@pytest.fixture
def key(press: Press) -> Key:
    key = press.key()
    press.publish(key)
    return key


def sign(press: Press, key: Key, version: str = "k-2") -> None:
    """Signs whatever has that tag, as one who has the key would."""
    from systemfiles.release.publishing import _Publishing
    from systemfiles.sources.oci import Reference

    reference = Reference.parse(f"{press.registry}/kernel:{version}")
    digest = press.repository().manifest(version).digest
    _Publishing(reference, "kernel", version, lambda *_: None)._sign(digest, [key.private])


def put(press: Press, index: dict[str, Any], tag: str = "k-2") -> None:
    press.repository().push_manifest(json.dumps(index).encode(), INDEX, tag)


def test_a_changed_blob(press: Press, key: Key) -> None:
    (layer, *_) = [
        layer
        for layer in press.repository().manifest(entries(press.index("k-2"))["amd64"]["digest"]).value["layers"]
        if layer["annotations"]["org.opencontainers.image.title"] == "vmlinux"
    ]
    path = press.blob(layer["digest"])
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        refused(press.host(trusted=(key,)), IntegrityError, layer["digest"])
    finally:
        path.write_bytes(good)  # other presses share it


def test_a_changed_manifest(press: Press, key: Key) -> None:
    digest = entries(press.index("k-2"))["amd64"]["digest"]
    path = press.blob(digest)
    good = path.read_bytes()
    try:
        path.write_bytes(good.replace(b"vmlinux", b"vmlinuz"))
        refused(press.host(trusted=(key,)), SystemFilesError)
    finally:
        path.write_bytes(good)


def test_an_index_that_nobody_signed(press: Press, key: Key) -> None:
    put(press, {**press.index("k-2"), "annotations": {"org.opencontainers.image.version": "k-2", "more": "words"}})
    refused(press.host(trusted=(key,)), SignatureRefused, "no signature")


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("trusting", [False, True])
def test_swapped_architectures(press: Press, key: Key, signed: bool, trusting: bool) -> None:
    """Even when the index of it is signed."""
    index = press.index("k-2")
    one, other = (entry["platform"] for entry in index["manifests"])
    index["manifests"][0]["platform"], index["manifests"][1]["platform"] = other, one
    put(press, index)
    if signed:
        sign(press, key)
    refused(press.host(trusted=(key,) if trusting else ()), SystemFilesError)


@pytest.mark.parametrize("trusting", [False, True])
def test_an_older_version_under_a_newer_name(press: Press, key: Key, trusting: bool) -> None:
    put(press, press.index("k-1"))
    press.repository().push_manifest(press.repository().manifest("k-1").raw, INDEX, "k-2")
    words = ("k-1", "k-2")
    if trusting:
        refused(press.host(trusted=(key,)), SignatureRefused, *words)
    else:
        refused(press.host(), IntegrityError, *words)


def test_a_manifest_of_another_version_in_a_version_of_ones_own_making(press: Press, key: Key) -> None:
    """Each is signed, in an index of its own, and the mixture is not."""
    index = press.index("k-2")
    index["manifests"] = press.index("k-1")["manifests"]
    put(press, index)
    refused(press.host(trusted=(key,)), SignatureRefused, "no signature")


def test_the_signature_of_another_key(press: Press, tmp_path_factory: pytest.TempPathFactory) -> None:
    press.publish(press.key())
    stranger = new_key(tmp_path_factory.mktemp("keys"))
    refused(press.host(trusted=(stranger,)), SignatureRefused, "a key that is not trusted here")


@pytest.mark.parametrize("kept", [True, False])
def test_the_signature_of_a_revoked_key(press: Press, key: Key, kept: bool) -> None:
    """Whether the host still has that key, or was told its id only."""
    trusted = (key, press.key()) if kept else (press.key(),)
    refused(press.host(trusted=trusted, revoked=(key.id,)), SignatureRefused, "revoked", key.id)


def test_a_missing_signature(press: Press, key: Key) -> None:
    press.publish()
    other = press.key()
    unsigned = press.elsewhere("unsigned")
    unsigned.publish()
    refused(unsigned.host(trusted=(key, other)), SignatureRefused, "no signature")


def test_the_signature_of_another_version(press: Press, key: Key) -> None:
    repository = press.repository()
    put(press, {**press.index("k-2"), "annotations": {"org.opencontainers.image.version": "k-2", "more": "words"}})
    theirs = repository.manifest(tag_of(repository.manifest("k-1").digest))
    repository.push_manifest(theirs.raw, MANIFEST, tag_of(repository.manifest("k-2").digest))
    refused(press.host(trusted=(key,)), SignatureRefused, "of something else")


@pytest.mark.parametrize("document", DOCUMENTS, ids=[document.file for document in DOCUMENTS])
def test_a_stripped_document(press: Press, key: Key, document: Document) -> None:
    digest = entries(press.index("k-2"))["amd64"]["annotations"][document.annotation]
    delete(press, digest)
    refused(press.host(trusted=(key,)), SignatureRefused, document.file)


def _no_layers(manifest: dict[str, Any]) -> None:
    manifest["layers"] = []


def _no_base64(manifest: dict[str, Any]) -> None:
    manifest["layers"][0]["annotations"]["dev.cosignproject.cosign/signature"] = "%%%"


def _no_ascii(manifest: dict[str, Any]) -> None:
    manifest["layers"][0]["annotations"]["dev.cosignproject.cosign/signature"] = "é"


def _no_annotations(manifest: dict[str, Any]) -> None:
    del manifest["layers"][0]["annotations"]


def _of_nothing(manifest: dict[str, Any]) -> None:
    manifest["layers"][0]["digest"] = f"sha256:{'0' * 64}"


def _cut_short(manifest: dict[str, Any]) -> None:
    notes = manifest["layers"][0]["annotations"]
    notes["dev.cosignproject.cosign/signature"] = notes["dev.cosignproject.cosign/signature"][:-8]


@pytest.mark.parametrize("spoil", [_no_layers, _no_base64, _no_ascii, _no_annotations, _of_nothing, _cut_short])
def test_signatures_that_are_none(press: Press, key: Key, spoil: Callable[[dict[str, Any]], None]) -> None:
    repository = press.repository()
    tag = tag_of(repository.manifest("k-2").digest)
    manifest = json.loads(repository.manifest(tag).raw)
    spoil(manifest)
    raw = json.dumps(manifest).encode()
    # docker-registry looks whether the blobs are there
    path = press.blob(repository.push_manifest(repository.manifest(tag).raw, MANIFEST, tag))
    good = path.read_bytes()
    try:
        if spoil is _of_nothing:
            path.write_bytes(raw)
            refused(press.host(trusted=(key,)), SystemFilesError)
        else:
            repository.push_manifest(raw, MANIFEST, tag)
            refused(press.host(trusted=(key,)), SignatureRefused)
    finally:
        path.write_bytes(good)


def test_a_payload_of_other_types(press: Press, key: Key) -> None:
    """It is signed, by whoever may sign other things with this key."""
    repository = press.repository()
    digest = repository.manifest("k-2").digest
    critical = {"image": {"docker-manifest-digest": 5}, "type": "cosign container image signature"}
    data = json.dumps({"critical": critical}).encode()
    repository.push_blob(Digest.of(data), len(data), io.BytesIO(data))
    manifest = json.loads(repository.manifest(tag_of(digest)).raw)
    manifest["layers"][0] |= {"digest": Digest.of(data), "size": len(data)}
    repository.push_manifest(json.dumps(manifest).encode(), MANIFEST, tag_of(digest))
    refused(press.host(trusted=(key,)), SignatureRefused, "something else")


def test_a_manifest_in_place_of_the_index_though_it_is_signed(press: Press, key: Key) -> None:
    """As `cosign sign --recursive` would sign it."""
    repository = press.repository()
    repository.push_manifest(repository.manifest(entries(press.index("k-2"))["amd64"]["digest"]).raw, MANIFEST, "k-2")
    sign(press, key)
    refused(press.host(trusted=(key,)), SignatureRefused, "a manifest")


def test_another_image_under_the_name(press: Press, key: Key) -> None:
    """The next registry is asked all the same."""
    other = press.elsewhere("image")
    image = Repository(press.world.host, "guest-0")
    manifest = image.manifest("1")
    target = other.repository()
    for part in (manifest.value["config"], *manifest.value["layers"]):
        data = image.small_blob(Digest.parse(part["digest"]))
        target.push_blob(Digest.of(data), len(data), io.BytesIO(data))
    target.push_manifest(manifest.raw, MANIFEST, "k-2")
    assert press.host(registries=(other.registry, press.registry)).ensure("k-2", "i-2").kernel.version == "k-2"
    refused(press.host(registries=(other.registry,)), IntegrityError, "k-2")


# ── other ways in ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_vms_record_alone_is_no_reason_to_take_what_is_not_signed(press: Press, key: Key) -> None:
    """It says what the kernel is, and nothing of the modules beside it."""
    unsigned = press.elsewhere("unsigned")
    unsigned.publish()
    record = press.host(trusted=(key,)).ensure("k-2", "i-2").to_dict()
    host = unsigned.host(trusted=(key,))
    with pytest.raises(SourceUnavailable, match="is not what it should be"):
        host.restore(record)
    assert press.host(trusted=(key,)).restore(record).kernel.sha256 == record["kernel"]["sha256"]


def test_what_may_not_be_built_is_not_built_by_restore_either(press: Press, key: Key) -> None:
    record = press.host(trusted=(key,)).ensure("k-2", "i-2").to_dict()
    with pytest.raises(SourceUnavailable, match="build = false"):
        press.host(registries=()).restore(record)


def test_what_may_not_be_built_is_not_asked_of_apt(press: Press, key: Key) -> None:
    with pytest.raises(SourceUnavailable, match=r"versions\.lock"):
        press.host().ensure("packaged", "modular")


# ── who publishes believes the registry no more ──────────────────────────────────────────────────────────────────


def test_what_somebody_added_to_a_version_is_not_signed_by_the_next_release(press: Press) -> None:
    """A part of it is in the release, and the rest came from whoever may write to the registry."""
    key = press.key()
    press.publish(key)
    mine = tuple(each for each in press.artifacts if each.arch is Arch.X86_64)
    fresh = press.elsewhere("added")
    fresh.publish(key, artifacts=mine)
    theirs = {**fresh.index("k-2")}
    other = entries(press.index("k-1"))["arm64"]
    repository = fresh.repository()
    for part in (other["digest"], *other["annotations"].values()):
        copy(press, fresh, part)
    theirs["manifests"] = [*theirs["manifests"], other]
    put(fresh, theirs)
    with pytest.raises(SignatureRefused, match="aarch64") as caught:
        fresh.publish(key, artifacts=mine)
    assert "every architecture" in str(caught.value.hint)
    with pytest.raises(Answered):
        repository.manifest(tag_of(repository.manifest("k-2").digest))


def test_documents_that_somebody_exchanged_are_not_signed_by_the_next_release(press: Press) -> None:
    key = press.key()
    before = press.publish(key)
    index = press.index("k-2")
    for entry in index["manifests"]:
        entry["annotations"] = entries(press.index("k-1"))[entry["platform"]["architecture"]]["annotations"]
    put(press, index)
    assert press.publish(key) == before
    assert press.host(trusted=(key,)).ensure("k-2", "i-2").kernel.version == "k-2"


def test_a_signed_index_of_another_version_is_not_built_upon(press: Press) -> None:
    """Whoever may write to the registry puts it there before the release comes."""
    key = press.key()
    press.publish(key)
    late = press.elsewhere("late")
    for version in ("k-1", "k-2"):
        late.publish(key, artifacts=tuple(each for each in press.artifacts if each.arch is Arch.AARCH64))
        put(late, late.index("k-1"), version)
    mine = tuple(each for each in press.artifacts if each.arch is Arch.X86_64 and each.version == "k-2")
    late.publish(key, artifacts=mine)
    assert entries(late.index("k-2")).keys() == {"amd64"}
    late.publish(key)
    assert late.index("k-2") == press.index("k-2")


def test_what_is_there_and_something_else_is_not_replaced_without_a_key(press: Press) -> None:
    press.publish()
    before = press.index("k-1")
    put(press, before, "k-2")
    with pytest.raises(UsageError, match="something else"):
        press.publish()
    assert press.index("k-2") == before


def test_whoever_adds_to_a_version_has_every_key_that_it_is_signed_with(press: Press) -> None:
    """Hosts that trust only the other one could not take any more what they could."""
    old, new = press.key(), press.key()
    half = tuple(each for each in press.artifacts if each.arch is Arch.X86_64)
    press.publish(old, new, artifacts=half)
    before = press.index("k-2")
    with pytest.raises(UsageError, match="more is to be added") as caught:
        press.publish(new)
    assert old.id in str(caught.value)
    assert press.index("k-2") == before
    press.publish(new, old)
    for key in (old, new):
        assert press.host(trusted=(key,), arch=Arch.AARCH64).ensure("k-2", "i-2").kernel.version == "k-2"


def test_a_signature_is_where_hosts_look_whatever_else_is_there(press: Press) -> None:
    digest = press.publish()["k-2"].rpartition("@")[2]
    repository = press.repository()
    layers = []
    for number in range(9):
        data = b"%d" % number
        repository.push_blob(Digest.of(data), len(data), io.BytesIO(data))
        layers.append({"mediaType": MANIFEST, "digest": Digest.of(data), "size": len(data)})
    manifest = {**repository.manifest(entries(press.index("k-2"))["amd64"]["digest"]).value, "layers": layers}
    repository.push_manifest(json.dumps(manifest).encode(), MANIFEST, tag_of(Digest.parse(digest)))
    key = press.key()
    press.publish(key)
    assert press.host(trusted=(key,)).ensure("k-2", "i-2").kernel.version == "k-2"


def test_an_entry_that_names_no_manifest_is_mended(press: Press) -> None:
    """An annotation of the entry points to an index instead of a document."""
    before = press.publish()
    index = press.index("k-2")
    entries(index)["amd64"]["annotations"][DOCUMENTS[0].annotation] = press.repository().manifest("k-1").digest
    put(press, index)
    assert press.publish() == before


# ── what is no tampering ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_either_kind_of_key_will_do(press: Press, kind: str) -> None:
    key = press.key(kind)
    press.publish(key)
    assert press.host(trusted=(press.key(), key)).ensure("k-2", "i-2").kernel.version == "k-2"


def test_keys_may_be_changed_one_after_the_other(press: Press) -> None:
    """Hosts trust both, the release is signed with both, and then the old key is revoked."""
    old, new = press.key(), press.key()
    press.publish(old)
    press.publish(new)
    for host in (
        press.host(trusted=(old,)),
        press.host(trusted=(new,)),
        press.host(trusted=(old, new), revoked=(old.id,)),
    ):
        assert host.ensure("k-2", "i-2").kernel.version == "k-2"


def test_a_key_may_be_a_file(press: Press, key: Key) -> None:
    path = press.directory / "trusted.pub"
    path.write_text(key.public)
    assert press.host(trusted=(Key(key.path, str(path)),)).ensure("k-2", "i-2").kernel.version == "k-2"


def test_a_key_that_is_none_is_told(press: Press, key: Key) -> None:
    host = press.host(trusted=(Key(key.path, "-----BEGIN PUBLIC KEY-----\nno\n-----END PUBLIC KEY-----"),))
    with pytest.raises(UsageError, match="not a public key"):
        host.ensure("k-2", "i-2")


def test_a_pinned_file_comes_back_from_a_registry_whose_key_was_revoked(press: Press, key: Key) -> None:
    """The pin itself says which bytes: whoever keeps them may give them back."""
    host = press.host(trusted=(key, press.key()))
    files = host.ensure("k-2", "i-2")
    host.pin("snapshot", files)
    after = SystemFiles(host.paths.data_dir, catalog=press.host(trusted=(key,), revoked=(key.id,))._catalog_path)
    for file in (files.kernel, files.initrd):
        file.path.unlink()
        blob = host.paths.oci_cache / "blobs" / "sha256" / file.sha256
        blob.unlink()
    assert after.restore("snapshot") == files


def copy(source: Press, target: Press, digest: str) -> None:
    """Copies a manifest, and all it names."""
    manifest = source.repository().manifest(digest)
    for part in (manifest.value["config"], *manifest.value["layers"]):
        data = source.blob(part["digest"]).read_bytes()
        target.repository().push_blob(Digest.of(data), len(data), io.BytesIO(data))
    target.repository().push_manifest(manifest.raw, MANIFEST, digest)
