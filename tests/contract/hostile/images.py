"""What a registry may have instead of an honest image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.contract.answers import Answer
from tests.contract.hostile.world import ROOT, TAG, Check, World
from tests.contract.origins import IMAGE_MANIFEST, Registry, digest_of


def registry_has(build: Callable[[Registry], object]) -> Check:
    """The registry has nothing but what is built here."""

    def hostile(world: World) -> None:
        world.registry.forget()
        build(world.registry)

    return hostile


def manifest(raw: object, media_type: str = IMAGE_MANIFEST) -> Check:
    """The registry gives this out for the manifest."""
    return registry_has(lambda registry: registry.add_manifest(raw, media_type, TAG))


def changed(**changes: Any) -> Check:
    """An image whose manifest is changed."""
    return registry_has(lambda registry: registry.add_image(ROOT, tags=[TAG], **changes))


def layer(**changes: Any) -> Check:
    """An image whose layer's descriptor is changed."""
    return registry_has(lambda registry: registry.add_image({**registry.add_blob(ROOT), **changes}, tags=[TAG]))


def gives_layer(answer: Answer) -> Check:
    """The registry answers with this when it is asked for the layer."""

    def hostile(world: World) -> None:
        registry_has(lambda registry: registry.add_image(ROOT, tags=[TAG]))(world)
        world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = answer

    return hostile


def gives_manifest(answer: Callable[[bytes], Answer]) -> Check:
    """The registry answers with what `answer` makes of the manifest that the tag stands for."""

    def hostile(world: World) -> None:
        changed()(world)
        raw, _ = world.registry.manifests[TAG]
        world.registry.answers[world.registry.path("manifests", TAG)] = answer(raw)

    return hostile


def on_arm(does: Check) -> Check:
    def hostile(world: World) -> None:
        world.arch = "aarch64"
        does(world)

    return hostile


BLOB_OF_ROOT = f"/blobs/{digest_of(ROOT)}"
NO_BLOB = {"/blobs/": 0}
