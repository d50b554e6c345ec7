"""Registries that take what is sent to them slowly, or with pauses, or not at all."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from dataclasses import replace
from io import BufferedIOBase

import pytest

from systemfiles.foundation.digest import Digest
from systemfiles.foundation.errors import SourceUnavailable
from systemfiles.sources import connection
from systemfiles.sources.oci import Repository
from systemfiles.sources.transport import Bounds, Transport
from tests.contract.answers import REPOSITORY, status
from tests.contract.hostile.world import BOUNDS, SLACK, World

Way = Callable[[BufferedIOBase, int], bytes]
BLOB = random.Random(3).randbytes(12_000_000)  # more than the kernel takes off our hands
UPLOADS = f"/v2/{REPOSITORY}/blobs/uploads/"
QUICK = replace(BOUNDS, attempts=2, total=60)


class Taking:
    """How a registry reads the body of an upload: one way after another, and the last one ever after."""

    def __init__(self, *ways: Way) -> None:
        self.times = 0
        self._ways = ways

    def __call__(self, stream: BufferedIOBase, size: int) -> bytes:
        if not size:
            return b""
        self.times += 1
        return self._ways[min(self.times, len(self._ways)) - 1](stream, size)


def at_once(stream: BufferedIOBase, size: int) -> bytes:
    return stream.read(size)


def at_pace(step: int, pause: float) -> Way:
    def take(stream: BufferedIOBase, size: int) -> bytes:
        data = bytearray()
        while len(data) < size and (piece := stream.read(min(step, size - len(data)))):
            data += piece
            time.sleep(pause)
        return bytes(data)

    return take


def after_a_pause(seconds: float) -> Way:
    def take(stream: BufferedIOBase, size: int) -> bytes:
        time.sleep(seconds)
        return stream.read(size)

    return take


def push(world: World, *ways: Way, bounds: Bounds, data: bytes = BLOB) -> Taking:
    """Pushes a blob to a registry that takes it in these ways."""
    world.registry.answers[UPLOADS] = status(202, Location=f"{UPLOADS}1")
    world.registry.answers[f"{UPLOADS}1"] = status(201)
    world.registry.buffer(1 << 16)
    taking = world.registry.take = Taking(*ways)
    repository = Repository(world.registry.host, REPOSITORY, transport=Transport(bounds))
    repository.push_blob(Digest.of(data), len(data), io.BytesIO(data))
    assert world.registry.asked("", "PUT")[-1].body == data
    return taking


def test_a_blob_is_sent_in_one_request(world: World) -> None:
    assert push(world, at_once, bounds=QUICK).times == 1


def test_a_registry_that_pauses_for_longer_than_a_connection_may_take_gets_all_of_it(world: World) -> None:
    assert push(world, after_a_pause(0.8), bounds=replace(QUICK, connect=0.2, read=5)).times == 1


def test_a_registry_that_stalls_is_tried_again(world: World) -> None:
    world.monkeypatch.setattr(connection, "SENDING", 0.4)
    assert push(world, after_a_pause(2), at_once, bounds=QUICK).times == 2


@pytest.mark.parametrize("way", [after_a_pause(3), at_pace(10, 0.05)], ids=["not at all", "at a trickle"])
def test_a_registry_that_does_not_take_it_is_given_up(way: Way, world: World) -> None:
    world.monkeypatch.setattr(connection, "SENDING", 0.4)
    begun = time.monotonic()
    with pytest.raises(SourceUnavailable, match="timed out"):
        push(world, way, bounds=QUICK)
    assert time.monotonic() - begun < SLACK


def test_a_registry_that_takes_less_than_it_must_is_given_up(world: World) -> None:
    begun = time.monotonic()
    with pytest.raises(SourceUnavailable, match="it took only"):
        push(world, at_pace(20_000, 0.1), bounds=replace(QUICK, slowest=2_000_000))
    assert time.monotonic() - begun < SLACK


def test_an_upload_takes_no_longer_than_all_of_it_may(world: World) -> None:
    begun = time.monotonic()
    with pytest.raises(SourceUnavailable, match="it took longer than 1 s in all"):
        push(world, at_pace(20_000, 0.1), bounds=replace(QUICK, total=1))
    assert time.monotonic() - begun < SLACK


def test_an_empty_blob_has_a_length_and_no_chunks(world: World) -> None:
    push(world, at_once, bounds=QUICK, data=b"")
    (put,) = world.registry.asked("", "PUT")
    assert put.headers["content-length"] == "0"
    assert "transfer-encoding" not in put.headers
