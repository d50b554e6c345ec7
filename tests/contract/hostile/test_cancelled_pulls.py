"""Pulls that are of no use any more: what is in flight is given up, and nothing more is asked for.

Bounds are wide here, so that it is not they that end anything.
"""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from systemfiles.foundation.errors import SourceUnavailable
from systemfiles.sources import transport
from tests.contract.answers import Answer, Exchange, content, repeated, silent, status
from tests.contract.hostile.world import (
    BOUNDS,
    ROOT,
    SLACK,
    TAG,
    World,
    an_image,
    assert_nothing_is_left_but_intact_blobs,
    assert_whole,
    pull,
)
from tests.contract.origins import digest_of

PATIENT = replace(BOUNDS, total=3600, attempts=3, longest_pause=60)
STUCK = b"stuck"
BLOB_OF_STUCK = f"/blobs/{digest_of(STUCK)}"
HOLD = """
import fcntl, select, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
select.select([sys.stdin], [], [], 20)
"""


@pytest.fixture(autouse=True)
def _patience(world: World) -> None:
    world.monkeypatch.setattr(transport, "BOUNDS", PATIENT)


def beside(world: World, answer: Answer, *, size: int = len(STUCK)) -> threading.Event:
    """An image of two layers, of which one is answered like this, and the other then; gives the moment between them."""
    asked = threading.Event()
    root = world.registry.answers.get(world.registry.path("blobs", digest_of(ROOT)), content(ROOT))

    def first(x: Exchange) -> None:
        asked.set()
        answer(x)

    def second(x: Exchange) -> None:
        assert asked.wait(10)
        root(x)

    stuck: dict[str, Any] = {**world.registry.add_blob(STUCK), "size": size}
    world.registry.add_image(stuck, ROOT, tags=[TAG])
    world.registry.answers[world.registry.path("blobs", digest_of(STUCK))] = first
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = second
    return asked


def cancelled(world: World) -> float:
    """Pulls until the other layer comes; returns the seconds it took to end."""

    def cancel(subject: str, done: int, total: int | None) -> None:
        if total == len(ROOT):
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pull(world, cancel)
    assert_nothing_is_left_but_intact_blobs(world)
    return time.monotonic() - begun


def test_whoever_watches_may_cancel_a_pull(world: World) -> None:
    layers = [gzip.compress(random.Random(seed).randbytes(50_000)) for seed in range(40)]
    world.registry.add_image(*layers, tags=[TAG])

    def cancel(subject: str, done: int, total: int | None) -> None:
        if total and total > 10_000:  # a layer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(world, cancel)
    assert_nothing_is_left_but_intact_blobs(world)
    assert 2 <= len(world.registry.asked("/blobs/")) < len(layers)
    an_image(world)
    assert_whole(world)


def test_a_layer_that_says_nothing_is_not_asked_for_again_by_a_pull_that_was_cancelled(world: World) -> None:
    beside(world, silent)
    assert cancelled(world) < SLACK
    assert len(world.registry.asked(BLOB_OF_STUCK)) == 1


def test_a_pull_that_was_cancelled_does_not_wait_until_a_layer_may_be_asked_for_again(world: World) -> None:
    beside(world, status(429, Retry_After="12"))
    assert cancelled(world) < SLACK
    assert len(world.registry.asked(BLOB_OF_STUCK)) == 1


def test_a_pull_that_was_cancelled_does_not_wait_for_another_process(world: World) -> None:
    lock = world.paths.lock(f"blob-{digest_of(STUCK)[7:]}")
    lock.parent.mkdir(parents=True)
    words = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        nobody_will_ask = beside(world, content(STUCK))
        nobody_will_ask.set()
        assert cancelled(world) < SLACK
        holder.communicate("")
    assert world.registry.asked(BLOB_OF_STUCK) == []


@pytest.mark.parametrize(
    ("answer", "size"),
    [
        (silent, len(STUCK)),
        (status(503, Retry_After="12"), len(STUCK)),
        (repeated(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 28), bytes(1 << 14), 0.05), 1 << 28),
    ],
    ids=["silent", "busy", "long"],
)
def test_where_one_layer_fails_those_in_flight_are_given_up(answer: Answer, size: int, world: World) -> None:
    world.registry.answers[world.registry.path("blobs", digest_of(ROOT))] = status(404)
    beside(world, answer, size=size)
    begun = time.monotonic()
    with pytest.raises(SourceUnavailable, match="HTTP 404"):
        pull(world)
    assert time.monotonic() - begun < SLACK
    assert len(world.registry.asked(BLOB_OF_STUCK)) == 1
    assert_nothing_is_left_but_intact_blobs(world)
