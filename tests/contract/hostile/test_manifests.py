"""Manifests and indexes: other digests, other types, other JSON, and platforms that are not ours."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from systemfiles.foundation.errors import DigestMismatch, SourceUnavailable
from tests.contract.answers import body, content, cut, in_turn, repeated, status
from tests.contract.hostile.images import (
    BLOB_OF_ROOT,
    NO_BLOB,
    changed,
    gives_manifest,
    layer,
    manifest,
    on_arm,
    registry_has,
)
from tests.contract.hostile.world import HTML, OK, ROOT, TAG, Check, Row, World, an_image, run_row
from tests.contract.origins import IMAGE_INDEX, IMAGE_MANIFEST, Registry, digest_of, for_platform


def entry(**changes: Any) -> Check:
    """An index whose entry is changed."""

    def build(registry: Registry) -> None:
        registry.add_index({**for_platform(registry.add_image(ROOT), "linux/amd64"), **changes}, tags=[TAG])

    return registry_has(build)


def platforms(*names: str) -> Check:
    """An index of one image for each of these platforms."""

    def build(registry: Registry) -> None:
        images = [(registry.add_image(ROOT, annotations={"for": name}), name) for name in names]
        registry.add_index(*(for_platform(*pair) for pair in images), tags=[TAG])

    return registry_has(build)


def by_digest(build: Callable[[Registry, str], object]) -> Check:
    """The image is asked for by its digest; `build` changes what the registry has under that."""

    def hostile(world: World) -> None:
        world.registry.forget()
        world.target = world.registry.add_image(ROOT)["digest"]
        build(world.registry, world.target)

    return hostile


def other_manifest(registry: Registry, digest: str) -> None:
    other = registry.add_image(ROOT, annotations={"evil": "1"})["digest"]
    registry.manifests[digest] = registry.manifests[other]


def lying_header(registry: Registry, digest: str) -> None:
    raw, kind = registry.manifests[digest]
    lie = content(raw, kind, Docker_Content_Digest=digest_of(b""))
    registry.answers[registry.path("manifests", digest)] = lie


def index_of_other_bytes(registry: Registry) -> None:
    entry = registry.add_image(ROOT)
    registry.add_index(for_platform(entry, "linux/amd64"), tags=[TAG])
    registry.manifests[entry["digest"]] = registry.manifests[registry.add_image(ROOT, annotations={"a": "b"})["digest"]]


def index_of_itself(registry: Registry) -> None:
    digest = digest_of(b"itself")
    registry.add_index({"mediaType": IMAGE_INDEX, "digest": digest, "size": 500}, tags=[TAG])
    registry.manifests[digest] = registry.manifests[TAG]


def nested(depth: int) -> Callable[[Registry], None]:
    def build(registry: Registry) -> None:
        inner = for_platform(registry.add_image(ROOT), "linux/amd64")
        for _ in range(depth):
            inner = registry.add_index(inner)
        registry.manifests[TAG] = registry.manifests[inner["digest"]]

    return build


def second_of_two_indexes(registry: Registry) -> None:
    image = registry.add_image(ROOT)
    inner = [registry.add_index(for_platform(image, name)) for name in ("linux/s390x", "linux/amd64")]
    registry.add_index(*inner, tags=[TAG])


def many_indexes(registry: Registry) -> None:
    image = registry.add_image(ROOT)
    registry.add_index(*(registry.add_index(for_platform(image, f"os{n}/x")) for n in range(20)), tags=[TAG])


def pulled(platform: str) -> Check:
    """That the image for this platform is in the store, and the only one."""

    def check(world: World) -> None:
        blobs = world.paths.oci_cache / "blobs" / "sha256"
        found = [json.loads(blob.read_bytes()) for blob in blobs.iterdir() if b"schemaVersion" in blob.read_bytes()]
        assert [manifest["annotations"]["for"] for manifest in found] == [platform]

    return check


TRAVERSAL = "sha256:../../../../../../../tmp/evil"


MANIFESTS = [
    # digests that are none
    Row("a layer whose digest is a path", an_image, layer(digest=TRAVERSAL), SourceUnavailable, ["broken"], NO_BLOB),
    Row(
        "a config whose digest is a path",
        an_image,
        changed(config={"mediaType": "x", "digest": TRAVERSAL, "size": 1}),
        SourceUnavailable,
        ["manifest is broken"],
        NO_BLOB,
    ),
    Row("an entry whose digest is a path", an_image, entry(digest=TRAVERSAL), SourceUnavailable, ["index is broken"]),
    Row("a digest with a newline", an_image, layer(digest=digest_of(ROOT) + "\n"), SourceUnavailable, ["broken"]),
    Row("a digest in capitals", an_image, layer(digest=digest_of(ROOT).upper()), SourceUnavailable, ["broken"]),
    Row("a digest of another kind", an_image, layer(digest=f"sha512:{'0' * 128}"), SourceUnavailable, ["broken"]),
    Row("a digest that is a number", an_image, layer(digest=5), SourceUnavailable, ["broken"], NO_BLOB),
    Row(
        "a digest in the header that is a path",
        an_image,
        gives_manifest(lambda raw: content(raw, IMAGE_MANIFEST, Docker_Content_Digest=TRAVERSAL)),
        DigestMismatch,
        ["/manifests/1", TRAVERSAL],
        NO_BLOB,
    ),
    Row(
        "another digest in the header, by tag",
        an_image,
        gives_manifest(lambda raw: content(raw, IMAGE_MANIFEST, Docker_Content_Digest=digest_of(b""))),
        DigestMismatch,
        [digest_of(b"")],
        NO_BLOB,
    ),
    Row("another digest in the header, by digest", an_image, by_digest(lying_header)),
    # manifests
    Row("another manifest, by digest", an_image, by_digest(other_manifest), DigestMismatch, [], NO_BLOB),
    Row("another manifest than the index says", an_image, registry_has(index_of_other_bytes), DigestMismatch),
    Row("a manifest of 5 MB", an_image, manifest(b" " * 5_000_000), SourceUnavailable, ["longer than 4194304 bytes"]),
    Row(
        "a manifest without end",
        an_image,
        gives_manifest(lambda raw: repeated(OK + b"\r\n", b"[" * 65536)),
        SourceUnavailable,
        ["longer than"],
    ),
    Row(
        "a manifest that trickles",
        an_image,
        gives_manifest(lambda raw: repeated(OK + b"\r\n", b" ", 0.02)),
        SourceUnavailable,
    ),
    Row(
        "a manifest that breaks off, then well",
        an_image,
        gives_manifest(lambda raw: in_turn(cut(raw, 9), content(raw, IMAGE_MANIFEST))),
        asked={"/manifests/1": 2},
    ),
    Row(
        "429 and 503 for a manifest, then well",
        an_image,
        gives_manifest(lambda raw: in_turn(status(429), status(503), content(raw, IMAGE_MANIFEST))),
        asked={"/manifests/1": 3},
    ),
    Row(
        "503 for a manifest for ever",
        an_image,
        gives_manifest(lambda raw: status(503)),
        SourceUnavailable,
        ["HTTP 503"],
    ),
    Row("404 for a manifest", an_image, gives_manifest(lambda raw: status(404)), SourceUnavailable, ["HTTP 404"]),
    Row("302 for a manifest", an_image, gives_manifest(lambda raw: status(302)), SourceUnavailable, ["HTTP 302"]),
    *(
        Row(f"a manifest that is {raw[:12]!r}", an_image, manifest(raw), SourceUnavailable, ["no manifest or index"])
        for raw in (
            b"",
            b"[]",
            b"null",
            b"5",
            b'"layers"',
            HTML,
            b"\xff\xfe\0",
            b'{"schemaVersion": 2}',
            b"[" * 100_000,
            b'{"layers":' * 100_000,
            b'{"schemaVersion": ' + b"9" * 5000 + b"}",
        )
    ),
    Row(
        "a manifest of schema version 1",
        an_image,
        manifest({"schemaVersion": 1, "fsLayers": []}, "application/vnd.docker.distribution.manifest.v1+prettyjws"),
        SourceUnavailable,
        ["v1+prettyjws"],
    ),
    Row(
        "a manifest of an unknown type",
        an_image,
        manifest({"schemaVersion": 2, "layers": []}, "application/vnd.unknown+json"),
        SourceUnavailable,
        ["vnd.unknown"],
    ),
    Row(
        "a manifest with blobs and images", an_image, changed(manifests=[]), SourceUnavailable, ["no manifest or index"]
    ),
    Row(
        "a manifest that says it is an index",
        an_image,
        changed(mediaType=IMAGE_INDEX),
        SourceUnavailable,
        ["image.index"],
    ),
    *(
        Row(
            f"a manifest whose type is {value!r:.20}",
            an_image,
            manifest({"schemaVersion": 2, "mediaType": value, "layers": []}),
            SourceUnavailable,
        )
        for value in (5, [IMAGE_MANIFEST], {"a": 1}, "\x1b[2J", "x" * 100_000)
    ),
    Row(
        "a manifest that came as something else",
        an_image,
        gives_manifest(lambda raw: content(raw, IMAGE_INDEX)),
        SourceUnavailable,
        ["came as", "image.index"],
    ),
    Row("a manifest from a plain file server", an_image, gives_manifest(lambda raw: content(raw))),
    Row(
        "a packed manifest",
        an_image,
        gives_manifest(lambda raw: body(gzip.compress(raw), Content_Encoding="gzip")),
        SourceUnavailable,
    ),
    Row("a manifest without layers", an_image, changed(layers=None), SourceUnavailable, ["broken"], NO_BLOB),
    Row("a manifest whose layers are text", an_image, changed(layers="abc"), SourceUnavailable, ["broken"], NO_BLOB),
    Row(
        "a manifest whose layers are a map", an_image, changed(layers={"a": 1}), SourceUnavailable, ["broken"], NO_BLOB
    ),
    Row("a manifest without a config", an_image, changed(config=None), SourceUnavailable, ["broken"], NO_BLOB),
    *(
        Row(
            f"a layer of {size!r:.9} bytes",
            an_image,
            layer(size=size),
            SourceUnavailable,
            ["broken|bytes long"],
            {BLOB_OF_ROOT: 0},
        )
        for size in (-1, 1 << 60, 1.5, "7", None, [1])
    ),
    # indexes
    Row("indexes in indexes", an_image, registry_has(nested(3))),
    Row("indexes in indexes without end", an_image, registry_has(nested(9)), SourceUnavailable, ["nested more than"]),
    Row("the first of two inner indexes has nothing for us", an_image, registry_has(second_of_two_indexes)),
    Row("more inner indexes than anyone looks into", an_image, registry_has(many_indexes), SourceUnavailable, ["16"]),
    Row("an index of itself", an_image, registry_has(index_of_itself), DigestMismatch, [digest_of(b"itself")]),
    Row(
        "an index without our platform",
        an_image,
        platforms("linux/arm64/v8", "windows/amd64", "unknown/unknown", "\x1b[2J/\n"),
        SourceUnavailable,
        ["nothing for linux/amd64", "linux/arm64/v8", "windows/amd64"],
        NO_BLOB,
    ),
    Row("an index of nothing", an_image, platforms(), SourceUnavailable, ["only nothing"]),
    Row("an index of attestations", an_image, platforms("unknown/unknown"), SourceUnavailable, ["only nothing"]),
    Row("an index of 10000 others", an_image, platforms(*(f"os{n}/x" for n in range(10_000))), SourceUnavailable),
    Row("an attestation first", an_image, platforms("unknown/unknown", "linux/amd64"), then=pulled("linux/amd64")),
    Row(
        "arm64 in all its variants",
        an_image,
        on_arm(platforms("linux/arm/v7", "linux/arm64/v9", "linux/arm64/v8", "linux/amd64")),
        then=pulled("linux/arm64/v8"),
    ),
    Row(
        "arm64 without a variant",
        an_image,
        on_arm(platforms("linux/arm64/v9", "unknown/unknown", "linux/arm64")),
        then=pulled("linux/arm64"),
    ),
    *(
        Row(
            f"an index of {value!r:.20}",
            an_image,
            manifest({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": value}, IMAGE_INDEX),
            SourceUnavailable,
            ["nothing for linux/amd64"],
        )
        for value in (None, 5, {"a": 1}, [1, None, "x"], [{"platform": 5}], [{"platform": {"os": ["linux"]}}])
    ),
    Row("an entry without a size", an_image, entry(size=None), SourceUnavailable, ["index is broken"]),
]


@pytest.mark.parametrize("row", MANIFESTS, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
