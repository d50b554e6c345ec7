"""Pulls that end early, or need not begin."""

from __future__ import annotations

import gzip
import random

import pytest

from systemfiles.content.artifacts import Artifacts
from systemfiles.content.store import Store
from systemfiles.foundation.arch import Arch
from systemfiles.foundation.catalog import load_catalog
from systemfiles.foundation.errors import NoSpace
from systemfiles.foundation.progress import silent as silent_progress
from systemfiles.provision.pull import Puller
from systemfiles.provision.rolling import Rolling
from systemfiles.provision.site import Site
from tests.contract.hostile.images import BLOB_OF_ROOT
from tests.contract.hostile.world import (
    ROOT,
    TAG,
    World,
    a_file,
    an_image,
    pull,
)
from tests.contract.origins import ELSEWHERE, IMAGE_MANIFEST, Registry, digest_of


def test_what_cannot_fit_is_not_asked_for(world: World) -> None:
    world.size = 1 << 60
    with pytest.raises(NoSpace) as caught:
        a_file(world)
    assert caught.value.needed == 1 << 60
    assert world.origin.requests == []
    assert world.left() == {}


def test_parts_that_fit_one_by_one_and_not_together_are_not_asked_for(world: World) -> None:
    layers = [gzip.compress(random.Random(seed).randbytes(50_000)) for seed in range(3)]
    world.registry.forget()
    world.registry.add_image(*layers, layers[0], tags=[TAG])
    needed = sum(map(len, world.registry.blobs.values()))
    world.monkeypatch.setattr("systemfiles.provision.pull.free_bytes", lambda path: needed - 1)
    with pytest.raises(NoSpace) as caught:
        pull(world)
    assert (caught.value.needed, caught.value.free) == (needed, needed - 1)
    assert [request.path for request in world.registry.requests] == [world.registry.path("manifests", TAG)]
    world.monkeypatch.setattr("systemfiles.provision.pull.free_bytes", lambda path: needed)
    an_image(world)
    world.monkeypatch.setattr("systemfiles.provision.pull.free_bytes", lambda path: 0)
    an_image(world)  # which is all there


def test_what_was_pulled_is_not_asked_for_again(world: World) -> None:
    an_image(world)
    an_image(world)
    assert [len(world.registry.asked(f"/blobs/{digest}")) for digest in world.registry.blobs] == [1, 1]


def test_a_damaged_blob_is_pulled_again(world: World) -> None:
    (root,) = an_image(world)
    root.chmod(0o644)
    root.write_bytes(bytes(len(ROOT)))
    an_image(world)
    assert root.read_bytes() == ROOT
    assert len(world.registry.asked(BLOB_OF_ROOT)) == 2


def test_a_registry_mirror_that_lies_is_passed_over(world: World) -> None:
    """And what the registry may know of us, its mirror may not."""
    world.login(world.registry.host)
    mirror = Registry(ELSEWHERE)
    world.servers.append(mirror)
    world.target = digest_of(world.registry.manifests[TAG][0])
    mirror.manifests[world.target] = b"{}", IMAGE_MANIFEST
    world.monkeypatch.setenv("SYSTEMFILES_MIRRORS", f"{world.registry.host}/={mirror.host}/")
    catalog, store = load_catalog(), Store(world.paths, Artifacts(world.paths))
    site = Site(world.paths, catalog, store, Rolling(world.paths, catalog), silent_progress, None)
    Puller(site).pull(world.registry.reference(world.target), Arch.X86_64)
    mirror.close()
    assert len(mirror.requests) == 1
    assert len(world.registry.asked(BLOB_OF_ROOT)) == 1
    assert world.leaks() == []
