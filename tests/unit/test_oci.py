"""References, manifests and indexes as registries have them, and who may learn a password."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from systemfiles.foundation.arch import Arch
from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceRefused, UsageError
from systemfiles.foundation.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    IMAGE_INDEX,
    IMAGE_MANIFEST,
    Manifest,
    choose,
    parse_manifest,
)
from systemfiles.sources.oci import Reference

X86, ARM = Arch.X86_64, Arch.AARCH64
DIGEST = Digest.of(b"")
HEX = DIGEST.hex

# references


@pytest.mark.parametrize(
    ("text", "reference", "target"),
    [
        ("busybox", Reference("docker.io", "library/busybox"), "latest"),
        ("busybox:1.37", Reference("docker.io", "library/busybox", "1.37"), "1.37"),
        ("me/busybox", Reference("docker.io", "me/busybox"), "latest"),
        ("docker.io/library/busybox", Reference("docker.io", "library/busybox"), "latest"),
        (f"busybox@{DIGEST}", Reference("docker.io", "library/busybox", None, DIGEST), DIGEST),
        ("localhost/x", Reference("localhost", "x"), "latest"),
        ("localhost:5000/x:1", Reference("localhost:5000", "x", "1"), "1"),
        ("127.0.0.1:5000/a/b/c", Reference("127.0.0.1:5000", "a/b/c"), "latest"),
        ("[::1]:5000/x", Reference("[::1]:5000", "x"), "latest"),
        ("[2001:db8::1]/x:1", Reference("[2001:db8::1]", "x", "1"), "1"),
        ("ghcr.io/a/b:v1.0_x-Y", Reference("ghcr.io", "a/b", "v1.0_x-Y"), "v1.0_x-Y"),
        (f"r.example.com/a/b:t@{DIGEST}", Reference("r.example.com", "a/b", "t", DIGEST), DIGEST),
        ("http://r.lan:5000/a:1", Reference("r.lan:5000", "a", "1", None, plain_http=True), "1"),
        ("a/b__c/d.e/f---g", Reference("docker.io", "a/b__c/d.e/f---g"), "latest"),
        (f"a:{'t' * 128}", Reference("docker.io", "library/a", "t" * 128), "t" * 128),
    ],
)
def test_a_reference_is_registry_repository_tag_and_digest(text: str, reference: Reference, target: str) -> None:
    assert Reference.parse(text) == reference
    assert Reference.parse(text).target == target
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "@",
        "/",
        ":tag",
        "a:",
        "a@",
        f"@{DIGEST}",
        "A/b",
        "UPPER",
        "a//b",
        "/a",
        "a/",
        "r.io/",
        "r.io//a",
        "../../etc/passwd",
        "r.io/../../etc/passwd",
        "r.io/a/../b",
        "r.io/a/./b",
        "r.io/.a",
        "r.io/a.",
        "r.io/-a",
        "r.io/a___b",
        "r.io/a..b",
        "r.io/a b",
        "r.io/a\n",
        "r.io/a\0",
        "r.io/é",
        "r.io/a:b c",
        "r.io/a:b\n",
        "r.io/a:.b",
        "r.io/a:-b",
        "r.io/a:b:c",
        f"r.io/a:{'t' * 129}",
        "r.io/" + "a" * 256,
        "r.io/a?b",
        "r.io/a#b",
        "r.io/a%2e%2e",
        "user:pass@r.io/a",
        "user@r.io/a",
        "https://r.io/a",
        "http://",
        "http://http://r.io/a",
        "HTTP://r.io/a",
        "file:///etc/passwd",
        "r.io:port/a",
        "r.io:123456/a",
        "r_x.io/a",
        "r.io\\a/b",
        "[::1/a",
        "[x]:5/a",
        "r.io/a@sha256:abc",
        f"r.io/a@sha256:{HEX.upper()}",
        f"r.io/a@sha512:{HEX}{HEX}",
        f"r.io/a@{HEX}",
        f"r.io/a@{DIGEST}\n",
        f"r.io/a@{DIGEST}/../x",
        f"r.io/a@{DIGEST}@{DIGEST}",
        "sha256:" + HEX,
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    if text == "sha256:" + HEX:  # which is a repository called sha256 and a tag
        assert Reference.parse(text).repository == "library/sha256"
        return
    with pytest.raises(UsageError, match="not an image reference"):
        Reference.parse(text)


@given(st.text(alphabet="ab./:@-_[]1%\n\0 ", max_size=30) | st.text(max_size=40))
def test_any_text_is_a_reference_that_is_safe_in_a_url_or_one_error(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except UsageError:
        return
    assert Reference.parse(str(reference)) == reference
    assert not set(f"{reference.registry}{reference.repository}{reference.tag}") & set("@?#%\\ \n\0")
    assert not {"", ".", ".."} & set(reference.repository.split("/"))


# manifests


def raw(**value: object) -> bytes:
    return json.dumps({"schemaVersion": 2, **value}).encode()


@pytest.mark.parametrize("kind", [IMAGE_MANIFEST, DOCKER_MANIFEST])
def test_a_manifest_is_its_bytes_and_what_they_say(kind: str) -> None:
    data = raw(mediaType=kind, layers=[]) + b"\n"
    assert parse_manifest(data, kind, subject="x") == Manifest(data, Digest.of(data), kind, json.loads(data))


@pytest.mark.parametrize("kind", [IMAGE_INDEX, DOCKER_LIST])
def test_an_index_is_one_too(kind: str) -> None:
    assert parse_manifest(raw(mediaType=kind, manifests=[]), kind, subject="x").media_type == kind


def test_a_manifest_without_a_type_is_what_it_came_as() -> None:
    assert parse_manifest(raw(layers=[]), IMAGE_MANIFEST, subject="x").media_type == IMAGE_MANIFEST


@pytest.mark.parametrize("came_as", ["", "application/octet-stream", "text/plain", "application/json"])
def test_a_server_that_knows_no_types_may_have_it(came_as: str) -> None:
    assert parse_manifest(raw(mediaType=IMAGE_MANIFEST, layers=[]), came_as, subject="x").media_type == IMAGE_MANIFEST
    with pytest.raises(SourceRefused):
        parse_manifest(raw(layers=[]), came_as, subject="x")


@pytest.mark.parametrize("came_as", [DOCKER_MANIFEST, IMAGE_INDEX, DOCKER_LIST])
def test_a_type_that_contradicts_the_one_it_came_as_is_refused(came_as: str) -> None:
    with pytest.raises(SourceRefused, match="came as"):
        parse_manifest(raw(mediaType=IMAGE_MANIFEST, layers=[]), came_as, subject="x")


@pytest.mark.parametrize(
    "data",
    [
        raw(mediaType=IMAGE_INDEX, layers=[]),
        raw(mediaType=IMAGE_MANIFEST, manifests=[]),
        raw(mediaType=IMAGE_MANIFEST, manifests=[], layers=[]),
        raw(mediaType=IMAGE_MANIFEST),
        raw(mediaType=IMAGE_MANIFEST, layers=[], schemaVersion=1),
        raw(mediaType=IMAGE_MANIFEST, layers=[], schemaVersion="2"),
        raw(mediaType=5, layers=[]),
        raw(mediaType={}, layers=[]).replace(b"2", b"3"),
        raw(mediaType=["x"], layers=[]),
        raw(mediaType="\x1b[31m", layers=[]),
        raw(mediaType="application/vnd.oci.artifact.manifest.v1+json", layers=[]),
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 200_000,
    ],
)
def test_what_is_no_manifest_is_refused_in_printable_words(data: bytes) -> None:
    with pytest.raises(SourceRefused, match="no manifest or index") as caught:
        parse_manifest(data, IMAGE_MANIFEST, subject="x")
    assert caught.value.problem.isprintable()
    assert len(caught.value.problem) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)
KEYS = st.sampled_from(
    ["schemaVersion", "mediaType", "manifests", "layers", "platform", "os", "architecture", "digest"]
)


@given(st.dictionaries(KEYS, JSON | st.sampled_from([2, IMAGE_MANIFEST, IMAGE_INDEX])), st.text(max_size=20))
def test_any_json_is_a_manifest_or_one_error(value: Any, came_as: str) -> None:
    with contextlib.suppress(SourceRefused):
        parse_manifest(json.dumps(value).encode(), came_as, subject="x")


# platforms


def index(*entries: object) -> Manifest:
    value = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": list(entries)}
    return parse_manifest(json.dumps(value).encode(), IMAGE_INDEX, subject="x")


def entry(platform: str, name: str = "", media_type: str = IMAGE_MANIFEST) -> dict[str, Any]:
    named = dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False))
    return {"mediaType": media_type, "digest": name or platform, "platform": named}


def chosen(arch: Arch, *entries: object) -> list[str]:
    return [str(found["digest"]) for found in choose(index(*entries), arch, subject="x")]


def test_the_entry_for_the_architecture_is_chosen() -> None:
    entries = [entry("linux/arm64/v8"), entry("linux/386"), entry("linux/amd64"), entry("windows/amd64")]
    assert chosen(X86, *entries) == ["linux/amd64"]
    assert chosen(ARM, *entries) == ["linux/arm64/v8"]


def test_the_usual_variant_comes_first_and_else_the_order_of_the_index_holds() -> None:
    names = ["linux/arm64/v9", "linux/arm64/v8", "linux/arm64", "linux/arm/v8"]
    assert chosen(ARM, *map(entry, names)) == ["linux/arm64/v8", "linux/arm64", "linux/arm64/v9"]
    assert chosen(X86, entry("linux/amd64/v3"), entry("linux/amd64")) == ["linux/amd64", "linux/amd64/v3"]


def test_attestations_are_no_choice() -> None:
    assert chosen(X86, entry("unknown/unknown"), entry("linux/amd64")) == ["linux/amd64"]


def test_an_index_in_an_index_is_looked_into_last() -> None:
    inner = {"mediaType": IMAGE_INDEX, "digest": "inner"}
    assert chosen(X86, inner, entry("linux/amd64")) == ["linux/amd64", "inner"]
    assert chosen(X86, inner, entry("linux/arm64")) == ["inner"]


def test_without_a_choice_the_error_lists_what_there_is() -> None:
    entries = [entry("linux/arm64/v8"), entry("windows/amd64"), entry("unknown/unknown"), entry("linux/arm64/v8")]
    with pytest.raises(SourceRefused) as caught:
        chosen(X86, *entries)
    assert caught.value.problem == "it has nothing for linux/amd64, only linux/arm64/v8, windows/amd64"


def test_a_list_without_end_is_not_printed_to_its_end() -> None:
    with pytest.raises(SourceRefused) as caught:
        chosen(X86, *(entry(f"os{n}/{'x' * 500}\x1b[2J") for n in range(2000)))
    assert len(caught.value.problem) < 5000
    assert caught.value.problem.isprintable()


@given(st.lists(st.dictionaries(KEYS, JSON) | JSON, max_size=5), st.sampled_from([X86, ARM]))
def test_any_entries_are_a_choice_or_one_error(entries: list[object], arch: Arch) -> None:
    with contextlib.suppress(SourceRefused):
        found = choose(index(*entries), arch, subject="x")
        assert found
        assert all(isinstance(choice, Mapping) for choice in found)
