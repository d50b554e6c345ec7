"""The hosts of a table, and a world for each of its rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from systemfiles.sources import http, transport
from tests.contract.hostile.world import BOUNDS, LARGEST, Hosts, World
from tests.contract.origins import ELSEWHERE, Origin, Registry


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with contextlib.ExitStack() as stack:
        running = Hosts(Origin(), Origin(), Registry(), Origin(ELSEWHERE))
        for server in (running.origin, running.tokens, running.registry, running.other):
            stack.callback(server.close)
        yield running


@pytest.fixture
def world(hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Nobody's credentials, no proxies, and little patience."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("SYSTEMFILES_CREDENTIALS", "DOCKER_CONFIG", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(transport, "BOUNDS", BOUNDS)
    monkeypatch.setattr(http, "LARGEST", LARGEST)
    with contextlib.ExitStack() as stack:
        yield World(hosts, tmp_path, monkeypatch, stack)
