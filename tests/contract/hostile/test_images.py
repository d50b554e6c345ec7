"""What images are made of: layers that are missing, too long, elsewhere, or for another machine."""

from __future__ import annotations

import json

import pytest

from systemfiles.foundation.errors import DigestMismatch, SizeMismatch, SourceUnavailable
from tests.contract.answers import body, content, cut, in_turn, repeated, status
from tests.contract.hostile.images import BLOB_OF_ROOT, gives_layer, layer, on_arm, registry_has
from tests.contract.hostile.world import (
    HTML,
    OK,
    ROOT,
    TAG,
    Check,
    Row,
    World,
    an_image,
    nobody_else_was_asked,
    run_row,
)
from tests.contract.origins import DOCKER_LIST, DOCKER_MANIFEST, IMAGE_CONFIG, LAYER, Registry, digest_of, for_platform


def docker_image(registry: Registry) -> None:
    described = registry.add_blob(ROOT, "application/vnd.docker.image.rootfs.diff.tar.gzip")
    image = registry.add_image(described, mediaType=DOCKER_MANIFEST, config=registry.add_blob(b"{}", DOCKER_CONFIG))
    registry.add_index(for_platform(image, "linux/amd64"), mediaType=DOCKER_LIST, tags=[TAG])


def empty_layer_without_end(world: World) -> None:
    layer(digest=digest_of(b""), size=0)(world)
    endless = repeated(OK + b"\r\n", bytes(65536))
    world.registry.answers[world.registry.path("blobs", digest_of(b""))] = endless


def foreign_layer(world: World) -> None:
    layer(urls=[world.other.url("/file")], mediaType="application/vnd.oci.image.layer.nondistributable.v1.tar")(world)
    world.registry.blobs.pop(digest_of(ROOT))


def many_missing_layers(registry: Registry) -> None:
    missing = [{"mediaType": LAYER, "digest": f"sha256:{n:064x}", "size": 9} for n in range(10_000)]
    registry.add_image(*missing, tags=[TAG])


def few_blobs_were_asked_for(world: World) -> None:
    assert len(world.registry.asked("/blobs/")) < 100


def for_machine(config: object, media_type: str = IMAGE_CONFIG) -> Check:
    """An image with this configuration, which may be anything; it is asked for without an index."""
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    return registry_has(
        lambda registry: registry.add_image(ROOT, tags=[TAG], config=registry.add_blob(raw, media_type))
    )


def index_that_lies(registry: Registry) -> None:
    config = registry.add_blob(json.dumps(ARM).encode(), IMAGE_CONFIG)
    registry.add_index(for_platform(registry.add_image(ROOT, config=config), "linux/amd64"), tags=[TAG])


def two_sizes(*sizes: int) -> Check:
    """An image that names one layer twice, with other sizes."""

    def build(registry: Registry) -> None:
        described = registry.add_blob(ROOT)
        registry.add_image(*({**described, "size": len(ROOT) + size} for size in sizes), tags=[TAG])

    return registry_has(build)


def config_that_is_a_layer_too(registry: Registry) -> None:
    config = registry.add_blob(json.dumps(AMD).encode(), IMAGE_CONFIG)
    registry.add_image({**config, "mediaType": LAYER, "size": 9}, tags=[TAG], config=config)


DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
AMD, ARM = ({"os": "linux", "architecture": name} for name in ("amd64", "arm64"))
NO_ROOT = {BLOB_OF_ROOT: 0}
IMAGES = [
    # for another machine
    Row("an image for this machine", an_image, for_machine(AMD), asked={BLOB_OF_ROOT: 1}),
    Row("an image for this other machine", an_image, on_arm(for_machine({**ARM, "variant": "v8"}))),
    Row(
        "an image for another machine",
        an_image,
        for_machine(ARM),
        SourceUnavailable,
        ["linux/arm64, and linux/amd64 is wanted"],
        NO_ROOT,
    ),
    Row(
        "an image for another machine than this other one",
        an_image,
        on_arm(for_machine(AMD)),
        SourceUnavailable,
        ["linux/amd64, and linux/arm64 is wanted"],
        NO_ROOT,
    ),
    Row(
        "an image for another system",
        an_image,
        for_machine({"os": "windows", "architecture": "amd64"}),
        SourceUnavailable,
        ["windows/amd64, and linux/amd64"],
        NO_ROOT,
    ),
    Row("Docker's image for another", an_image, for_machine(ARM, DOCKER_CONFIG), SourceUnavailable, ["arm64"], NO_ROOT),
    Row("an index that lies", an_image, registry_has(index_that_lies), SourceUnavailable, ["linux/arm64"], NO_ROOT),
    *(
        Row(f"an image for {value!r:.20}", an_image, for_machine(config), SourceUnavailable, ["it is for"], NO_ROOT)
        for value in (5, ["linux"], {"a": 1}, "\x1b[2J", "x" * 100_000)
        for config in ({**AMD, "os": value}, {**AMD, "architecture": value})
    ),
    *(
        Row(f"an image for any machine ({config!r:.30})", an_image, for_machine(config), asked={BLOB_OF_ROOT: 1})
        for config in ({}, {"os": "linux"}, {"architecture": "amd64"}, {"os": None, "architecture": ""})
    ),
    Row("a config of an unknown type", an_image, for_machine(b"no image", "application/vnd.unknown")),
    *(
        Row(
            f"a config that is {raw[:12]!r}",
            an_image,
            for_machine(raw),
            SourceUnavailable,
            ["configuration is broken"],
            NO_ROOT,
        )
        for raw in (b"", b"[]", b"null", b"5", HTML, b"\xff\xfe\0", b"[" * 100_000, b'{"os": ' + b"9" * 5000 + b"}")
    ),
    Row(
        "a config of 5 MB",
        an_image,
        for_machine(b"{" + b" " * 5_000_000 + b"}"),
        SourceUnavailable,
        ["configuration is broken"],
        NO_ROOT,
    ),
    # one digest, two sizes
    Row("a layer with two sizes", an_image, two_sizes(0, 1), SourceUnavailable, ["two sizes"], {"/blobs/": 0}),
    Row("a layer with two sizes in turn", an_image, two_sizes(1, 0), SourceUnavailable, ["two sizes"], {"/blobs/": 0}),
    Row(
        "a layer that is the config, with another size",
        an_image,
        registry_has(config_that_is_a_layer_too),
        SourceUnavailable,
        ["two sizes"],
        {"/blobs/": 0},
    ),
    # Docker's types, unknown types, repeated layers
    Row("Docker's manifests", an_image, registry_has(docker_image)),
    Row("a layer of an unknown type", an_image, layer(mediaType="application/vnd.unknown")),
    Row(
        "the same layer ten times",
        an_image,
        registry_has(lambda registry: registry.add_image(*[ROOT] * 10, tags=[TAG])),
        asked={BLOB_OF_ROOT: 1},
    ),
    # blobs
    Row("other bytes for a layer", an_image, gives_layer(content(bytes(len(ROOT)))), DigestMismatch, [digest_of(ROOT)]),
    Row("a web page for a layer", an_image, gives_layer(body(HTML)), SizeMismatch, [f"{len(ROOT)} bytes"]),
    Row("a layer without end", an_image, gives_layer(repeated(OK + b"\r\n", bytes(65536))), SizeMismatch),
    Row("a layer larger than it says", an_image, layer(size=len(ROOT) - 1), SizeMismatch, [f"{len(ROOT) - 1} bytes"]),
    Row("a layer smaller than it says", an_image, layer(size=len(ROOT) + 1), SizeMismatch, [f"{len(ROOT) + 1} bytes"]),
    Row("a layer that should be empty", an_image, layer(size=0), SizeMismatch, ["0 bytes"]),
    Row("a layer that should be empty, without end", an_image, empty_layer_without_end, SizeMismatch, [" 0 bytes"]),
    Row("a packed layer", an_image, gives_layer(body(ROOT, Content_Encoding="gzip")), SourceUnavailable, ["encoded"]),
    Row("a cut layer", an_image, gives_layer(in_turn(cut(ROOT, 99), content(ROOT))), asked={BLOB_OF_ROOT: 2}),
    Row("a layer cut for ever", an_image, gives_layer(cut(ROOT, 0)), SourceUnavailable, [], {BLOB_OF_ROOT: 3}),
    Row("404 for a layer", an_image, gives_layer(status(404)), SourceUnavailable, ["HTTP 404"], {BLOB_OF_ROOT: 1}),
    Row(
        "503 for a layer, then well",
        an_image,
        gives_layer(in_turn(status(503), content(ROOT))),
        asked={BLOB_OF_ROOT: 2},
    ),
    Row(
        "a layer that is elsewhere", an_image, foreign_layer, SourceUnavailable, ["HTTP 404"], {}, nobody_else_was_asked
    ),
    Row(
        "10000 layers that are missing",
        an_image,
        registry_has(many_missing_layers),
        SourceUnavailable,
        [],
        {},
        few_blobs_were_asked_for,
    ),
]


@pytest.mark.parametrize("row", IMAGES, ids=str)
def test_an_origin_may_do_what_it_wants(row: Row, world: World) -> None:
    run_row(row, world)
